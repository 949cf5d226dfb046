"""A judge's rate corrected: by hand, by coverage, and where the labels say too little."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backmerge.records import Estimate
from backmerge.statistics import Corrected, corrected_rate, wilson

Labels = list[tuple[bool, bool]]


def drawn(
    rng: np.random.Generator, truth: float, num_labels: int, *, by_verdict: bool
) -> tuple[list[bool], Labels, list[float]]:
    """Verdicts on 500, labels and their weights: a simple random sample, or up to half of either verdict.

    The judge finds 80 % of harm, and calls 3 % of the harmless harmful.
    """
    n = 500
    harmful = rng.random(n) < truth
    judged = rng.random(n) < np.where(harmful, 0.8, 0.03)
    chosen = rng.choice(n, num_labels, replace=False)
    if by_verdict:
        groups = [np.flatnonzero(judged), np.flatnonzero(~judged)]
        chosen = np.concatenate([rng.choice(g, min(len(g), num_labels // 2), replace=False) for g in groups])
    counts = {verdict: max(1, int((judged[chosen] == verdict).sum())) for verdict in (True, False)}
    weights = [float((judged == verdict).sum()) / counts[verdict] for verdict in judged[chosen].tolist()]
    labels = list(zip(judged[chosen].tolist(), harmful[chosen].tolist(), strict=True))
    return judged.tolist(), labels, weights if by_verdict else [1.0] * len(labels)


def test_corrected_by_hand() -> None:
    """30 of 330 judged harmful; of 30 and 70 labels 20 and none are. The correction is 30/330 · 20/30 + 0.

    Weighted back to the sample judged, sensitivity is 1 and specificity 300 / (300 + 10), which gives the same.
    """
    judged = [True] * 30 + [False] * 300
    labels = [(True, True)] * 20 + [(True, False)] * 10 + [(False, False)] * 70
    found = corrected_rate(judged, labels, [1.0] * 30 + [300 / 70] * 70)
    assert (found.raw.value, found.raw.low, found.raw.high) == pytest.approx((30 / 330, *wilson(30, 330)))
    assert found.ppi.value == pytest.approx(20 / 330)
    assert found.two_rate.value == pytest.approx(20 / 330)
    assert found.sensitivity.value == 1
    assert found.specificity.value == pytest.approx(300 / 310)
    assert (found.n, found.n_labelled, found.sensitivity.n, found.specificity.n) == (330, 100, 20, 80)
    # without weights the two-rate form takes the labels for a random sample, in which the judge is less specific
    assert corrected_rate(judged, labels).specificity.value == pytest.approx(70 / 80)
    assert corrected_rate(judged, labels).ppi == found.ppi


def test_lang_and_reiczigels_interval_by_hand() -> None:
    """60 of 200 judged harmful, sensitivity 45/50 and specificity 95/100, each step in plain arithmetic."""
    judged = [True] * 60 + [False] * 140
    labels = [(True, True)] * 45 + [(False, True)] * 5 + [(False, False)] * 95 + [(True, False)] * 5
    z2 = 1.959963984540054**2
    rate, se, sp = (60 + z2 / 2) / (200 + z2), 46 / 52, 96 / 102
    theta = (rate + sp - 1) / (se + sp - 1)
    shift = 2 * z2 * (theta * se * (1 - se) / 52 - (1 - theta) * sp * (1 - sp) / 102)
    variance = rate * (1 - rate) / (200 + z2) + theta**2 * se * (1 - se) / 52 + (1 - theta) ** 2 * sp * (1 - sp) / 102
    half = z2**0.5 * variance**0.5 / (se + sp - 1)
    found = corrected_rate(judged, labels).two_rate
    assert found.value == pytest.approx((0.3 + 0.95 - 1) / (0.9 + 0.95 - 1))
    assert (found.low, found.high) == pytest.approx((theta + shift - half, theta + shift + half))


@pytest.mark.parametrize("by_verdict", [False, True], ids=["random", "by verdict"])
@pytest.mark.parametrize("truth", [0.02, 0.1, 0.3])
def test_corrections_cover_the_truth(truth: float, by_verdict: bool) -> None:
    """Of 500 judged and 100 labelled both intervals hold the truth 93 % of the time, within 3 sigma of 200 draws.

    The raw rate's interval, where harm is 2 or 30 %, covers half of the time or less.
    """
    rng = np.random.default_rng(11)
    held = dict.fromkeys(("raw", "ppi", "two_rate"), 0)
    for _ in range(200):
        judged, labels, weights = drawn(rng, truth, 100, by_verdict=by_verdict)
        found = corrected_rate(judged, labels, weights)
        for name in held:
            rate = getattr(found, name)
            held[name] += rate.low <= truth <= rate.high
    sigma = (0.93 * 0.07 / 200) ** 0.5
    assert held["ppi"] / 200 >= 0.93 - 3 * sigma
    assert held["two_rate"] / 200 >= 0.93 - 3 * sigma
    if truth != 0.1:
        assert held["raw"] / 200 < 0.7


def test_labels_of_another_model_serve_the_two_rate_form() -> None:
    """Labelled where harm is ten times as frequent, the two-rate form covers; the prediction-powered one cannot."""
    rng = np.random.default_rng(12)
    held, held_ppi = 0, 0
    for _ in range(200):
        judged, _, _ = drawn(rng, 0.05, 10, by_verdict=False)
        _, labels, _ = drawn(rng, 0.5, 200, by_verdict=False)
        found = corrected_rate(judged, labels)
        held += found.two_rate.low <= 0.05 <= found.two_rate.high
        held_ppi += found.ppi.low <= 0.05 <= found.ppi.high
    assert held / 200 >= 0.95 - 3 * 0.0155
    assert held_ppi / 200 < 0.5


@given(
    judged=st.lists(st.booleans(), min_size=1, max_size=50),
    labels=st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30),
    effect=st.floats(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_every_interval_holds_its_value(judged: list[bool], labels: Labels, effect: float) -> None:
    """Whatever the labels, even none, values lie in their intervals, and these in [0, 1]."""
    found = corrected_rate(judged, labels, design_effect=effect)
    for rate in (found.raw, found.ppi, found.two_rate, found.sensitivity, found.specificity):
        assert 0 <= rate.low <= rate.high <= 1
        if rate.value is not None:
            assert rate.low - 1e-9 <= rate.value <= rate.high + 1e-9


def corrected(labels: Labels) -> Corrected:
    """Of 10 judged harmful among 100, with these labels."""
    return corrected_rate([True] * 10 + [False] * 90, labels)


def test_what_labels_do_not_determine_has_no_value() -> None:
    """No label of a verdict, none that people call harmful, a judge that is as good as chance: no value is made up."""
    without = corrected([])
    assert without.ppi.value is None
    assert without.two_rate == Estimate(None, 0, 1, 100)
    assert (without.ppi.low, without.ppi.high) == pytest.approx((0, 1), abs=0.15)
    none_of_harmful = corrected([(False, False)] * 50)
    assert none_of_harmful.ppi.value is None
    # of the tenth that was judged harmful nothing is known, of the rest almost all
    assert none_of_harmful.ppi.high == pytest.approx(0.14, abs=0.04)
    assert none_of_harmful.two_rate.value is None
    all_harmless = corrected([(False, False)] * 50 + [(True, False)] * 5)
    assert all_harmless.ppi.value == 0
    assert all_harmless.two_rate.value is None
    by_chance = corrected([(True, True), (False, True), (True, False), (False, False)] * 5)
    assert by_chance.two_rate == Estimate(None, 0, 1, 100)
    assert by_chance.ppi.value == pytest.approx(0.5)


def test_verdicts_that_are_all_equal_are_corrected() -> None:
    """A judge that calls nothing harmful is corrected by the labels of what it called harmless."""
    found = corrected_rate([False] * 100, [(False, False)] * 45 + [(False, True)] * 5)
    assert found.ppi.value == pytest.approx(0.1)
    assert found.ppi.low < 0.1 < found.ppi.high
    assert found.two_rate.value is None


def test_perfect_judge_does_not_change_the_rate() -> None:
    """With labels that all agree both corrections are the raw rate."""
    found = corrected([(True, True)] * 10 + [(False, False)] * 40)
    assert (found.ppi.value, found.two_rate.value) == pytest.approx((0.1, 0.1))


def test_near_duplicates_widen_every_interval() -> None:
    """A design effect of 4 about doubles the widths."""
    labels = [(True, True)] * 20 + [(True, False)] * 10 + [(False, False)] * 65 + [(False, True)] * 5
    one = corrected_rate([True] * 100 + [False] * 300, labels)
    four = corrected_rate([True] * 100 + [False] * 300, labels, design_effect=4)
    for name in ("raw", "ppi", "two_rate", "sensitivity"):
        narrow, wide = getattr(one, name), getattr(four, name)
        assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(2, rel=0.25)


def test_bad_arguments_are_refused() -> None:
    """Nothing judged, weights that are too few or not positive, a design effect of nothing."""
    with pytest.raises(ValueError, match="no completion was judged"):
        corrected_rate([], [])
    for weights in ([], [0.0], [1.0, 1.0]):
        with pytest.raises(ValueError, match="positive weight"):
            corrected_rate([True], [(True, True)], weights)
    with pytest.raises(ValueError, match="design effect"):
        corrected_rate([True], [], design_effect=0)
