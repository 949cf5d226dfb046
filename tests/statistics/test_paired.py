"""Paired tests: exact levels, enumeration over clusters, and the decision by a margin."""

import itertools
import math
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from backmerge.selection.candidates import confirm_kept
from backmerge.statistics import (
    PairedDifference,
    discordance,
    lower_bound_among,
    paired_difference,
    sign_flip_p,
    tango_bound,
    tango_score,
)


def test_flips_of_clusters_agree_with_all_of_them() -> None:
    """With clusters, p is the full enumeration's over the signs of their sums, within 4 sigma of 10,000 draws."""
    differences = [1.0, 1.0, 1.0, 0.5, -1.0, 1.0, 0.0, 1.0]
    clusters = [*"aaabbcde"]
    sums = [3.0, -0.5, 1.0, 1.0]
    totals = [
        math.fsum(sign * value for sign, value in zip(signs, sums, strict=True))
        for signs in itertools.product((-1, 1), repeat=len(sums))
    ]
    exact = fmean(total >= math.fsum(sums) for total in totals)
    sigma = math.sqrt(exact * (1 - exact) / 10_000)
    assert sign_flip_p(differences, clusters) == pytest.approx(exact, abs=4 * sigma + 1e-4)
    assert sign_flip_p(differences, list("abcdefgh")) == sign_flip_p(differences)
    with pytest.raises(ValueError, match="every value needs a cluster"):
        sign_flip_p(differences, ["a"])


def test_flips_by_prompt_are_what_they_were() -> None:
    """Without clusters the draws are those of the signs of differing prompts, in order, from seed 0."""
    values = np.array([1.0, -1.0, 0.5, 1.0])
    signs = np.random.default_rng(0).integers(0, 2, size=(10_000, 4), dtype=np.int8) * 2 - 1
    p = (1 + int(np.sum(signs @ values >= 1.5 - 1e-12))) / 10_001
    assert sign_flip_p([1.0, 0.0, -1.0, 0.5, 0.0, 1.0]) == p


def test_many_flips_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With little memory allowed p is the same."""
    differences = [1.0, -0.5, 0.25, 1.0, 1.0, -1.0]
    whole = sign_flip_p(differences)
    monkeypatch.setattr("backmerge.statistics.paired.CELLS_AT_ONCE", 100)
    assert sign_flip_p(differences) == whole


def test_clusters_that_agree_are_flipped_as_one() -> None:
    """On clusters of five that agree and no true difference, 5 % are found at 5 %, within 3 sigma of 400 draws.

    Flipped prompt by prompt, several times as many.
    """
    rng = np.random.default_rng(9)
    clusters = np.repeat(np.arange(40), 5).tolist()
    by_cluster = by_prompt = 0
    for _ in range(400):
        differences = np.repeat(rng.choice([-1.0, 0.0, 1.0], 40), 5).tolist()
        by_cluster += sign_flip_p(differences, clusters, draws=400) <= 0.05
        by_prompt += sign_flip_p(differences, draws=400) <= 0.05
    assert by_cluster / 400 <= 0.05 + 3 * 0.011
    assert by_prompt / 400 > 0.15


@given(n=st.integers(2, 200), data=st.data(), delta=st.floats(0.01, 0.5))
def test_the_score_agrees_with_the_bound(n: int, data: st.DataObject, delta: float) -> None:
    """The statistic at Δ is below −z exactly if Tango's upper bound is below Δ."""
    gains = data.draw(st.integers(0, n))
    losses = data.draw(st.integers(0, n - gains))
    score = float(tango_score(np.array(float(gains)), np.array(float(losses)), n, delta))
    bound = tango_bound(gains, losses, n, -1.645)
    if abs(bound - delta) > 1e-6:
        assert (score < -1.645) == (bound < delta)


def test_discordance_by_hand() -> None:
    """Gains and losses are sums of the differences' parts, scaled to the effective size."""
    assert discordance([1, 1, 0, 0.5], [0, 1, 1, 0.25]) == (1.25, 1, 4)
    assert discordance([1, 1, 0, 0], [0, 0, 0, 0], ["a", "a", "b", "b"]) == (1, 0, 2)


def test_a_lower_bound_among_several_is_that_of_a_stricter_test() -> None:
    """Of one it is its own, of two the two-sided interval's end, and of more it continues by the normal quantiles."""
    one = paired_difference([1.0] * 60 + [0.0] * 340, [0.0] * 20 + [1.0] * 10 + [0.0] * 370)
    assert lower_bound_among(one, 1) == one.lower_bound
    assert lower_bound_among(one, 2) == pytest.approx(one.low)
    steps = [lower_bound_among(one, number) for number in (2, 4, 8)]
    assert steps == sorted(steps, reverse=True)
    expected = one.difference - (one.difference - one.low) * stats.norm.ppf(1 - 0.05 / 4) / stats.norm.ppf(0.975)
    assert steps[1] == pytest.approx(expected)


def test_several_losses_are_kept_together_and_lost_with_one_correction() -> None:
    """All bounds below the margin show all; one far above it shows a loss, and one barely above, among four, not."""
    kept = paired_difference([1.0] * 400, [1.0] * 400)
    barely = PairedDifference(0.1, 0.048, 0.152, 0.0505, 0.1495, 400, 400.0)
    assert confirm_kept([kept, kept], 0.05) == "restored"
    assert confirm_kept([barely], 0.05) == "worse"
    assert confirm_kept([kept, barely, kept, kept], 0.05) == "not shown"
    assert confirm_kept([kept, barely._replace(low=0.08)], 0.05) == "worse"
