"""Peeking that is paid for: published boundaries, error under peeking, and bounds that hold at all times."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from backmerge.statistics import (
    betting_upper_bounds,
    critical_values,
    fixed_sequence,
    paired_difference,
    sequential_bounds,
    tango_score,
)

FIFTHS = (0.2, 0.4, 0.6, 0.8, 1.0)


def test_boundaries_are_those_published() -> None:
    """One look is 1.645. Five at one-sided 2.5 %: 4.877, 3.357, 2.680, 2.290, 2.031 (Proschan, Lan, Wittes: table).

    The published ones spend 4 − 4Φ(z_{α/4} / sqrt(t)) two-sided at 5 %, which is ours at one-sided 2.5 %.
    """
    assert critical_values([1.0]) == pytest.approx([stats.norm.ppf(0.95)], abs=1e-6)
    assert critical_values(FIFTHS, alpha=0.025) == pytest.approx([4.877, 3.357, 2.680, 2.290, 2.031], abs=2e-3)


@pytest.mark.parametrize("fractions", [FIFTHS, (0.1, 0.5, 0.55, 1.0), (0.5, 1.0)])
def test_a_brownian_path_crosses_as_often_as_allowed(fractions: tuple[float, ...]) -> None:
    """Of 200,000 paths 5 % cross any of the looks' values, within 4 sigma (0.2 points)."""
    rng = np.random.default_rng(5)
    steps = np.diff((0.0, *fractions)) ** 0.5
    scores = np.cumsum(rng.standard_normal((200_000, len(fractions))) * steps, axis=1) / np.sqrt(fractions)
    crossed = np.mean((scores >= critical_values(fractions)).any(axis=1))
    assert crossed == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / 200_000) ** 0.5)
    assert np.mean((scores >= stats.norm.ppf(0.95)).any(axis=1)) > 0.06


@pytest.mark.parametrize(("losses", "margin"), [(0.0, 0.03), (0.01, 0.03), (0.03, 0.1)])
def test_five_looks_keep_the_level(losses: float, margin: float) -> None:
    """A model worse by the margin itself is called safe at any of five looks 5.5 % of the time at most, plus 3 sigma.

    20,000 runs of 500 prompts. Peeking with 1.645 each time exceeds that where losses make the counts fine enough.
    """
    rng = np.random.default_rng(6)
    critical = np.array(critical_values(FIFTHS))
    cells = rng.multinomial(100, [losses + margin, losses, 1 - 2 * losses - margin], (20_000, 5))
    gains, lost = cells[..., 0].cumsum(axis=1), cells[..., 1].cumsum(axis=1)
    scores = np.stack(
        [tango_score(gains[:, i].astype(float), lost[:, i].astype(float), 100.0 * (i + 1), margin) for i in range(5)], 1
    )
    sigma = (0.055 * 0.945 / 20_000) ** 0.5
    assert np.mean((scores < -critical).any(axis=1)) <= 0.055 + 3 * sigma
    assert np.mean((scores < -stats.norm.ppf(0.95)).any(axis=1)) > 0.08


def test_bounds_of_a_look_are_tangos() -> None:
    """At 1.645 they are the one-sided bounds of the paired difference, by cluster too; at more, wider."""
    first, second = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    for clusters in (None, [*"aabbcd"]):
        plain = paired_difference(first, second, clusters)
        found = sequential_bounds(first, second, stats.norm.ppf(0.95), clusters)
        assert (found.lower, found.upper) == pytest.approx((plain.lower_bound, plain.upper_bound))
        early = sequential_bounds(first, second, 2.5, clusters)
        assert early.lower < found.lower < found.upper < early.upper


@pytest.mark.parametrize("fractions", [(), (0.0, 1.0), (0.5, 0.5), (0.6, 0.4), (0.5, 1.2)])
def test_looks_must_rise(fractions: tuple[float, ...]) -> None:
    """Fractions that don't rise from above 0 to 1 at most are refused."""
    with pytest.raises(ValueError, match="prompts"):
        critical_values(fractions)


@given(values=st.lists(st.sampled_from([-1.0, 0.0, 1.0]), max_size=60))
def test_betting_bounds_never_rise(values: list[float]) -> None:
    """One bound after each value, each at most the one before, within [−1, 1]."""
    bounds = betting_upper_bounds(values)
    assert bounds.shape == (len(values),)
    assert np.all(np.diff(bounds) <= 0)
    assert np.all((bounds >= -1) & (bounds <= 1))


def test_betting_is_that_of_a_loop() -> None:
    """Step by step: each bet comes from the values before it alone, and a mean is out once its capital reached 20."""
    values = np.random.default_rng(9).choice([0.0, 0.0, 0.0, 0.5, 1.0], 120).tolist()
    bounds = betting_upper_bounds(values, low=0.0, high=1.0)
    for mean in np.linspace(0.2, 0.95, 16):
        capital, most, total, spread, variance = 1.0, 1.0, 0.5, 0.25, 0.25
        for count, (value, bound) in enumerate(zip(values, bounds, strict=True), start=1):
            bet = math.sqrt(2 * math.log(20) / (variance * count * math.log(count + 1)))
            capital *= 1 - min(bet, 0.5 / (1 - mean)) * (value - mean)
            most = max(most, capital)
            total += value
            spread += (value - total / (count + 1)) ** 2
            variance = spread / (count + 1)
            # the bound is a step of the grid above the last mean that is held
            if most >= 20:
                assert bound <= mean + 0.0021
            else:
                assert bound >= mean - 1e-9
    assert bounds[-1] < 0.6


@pytest.mark.parametrize("losses", [0.0, 0.05])
def test_betting_holds_at_all_times(losses: float) -> None:
    """Looked at after each of 250 prompts, the bound is ever below the truth 5 % of the time, plus 3 sigma of 200."""
    rng = np.random.default_rng(7)
    gains, failed = losses + 0.05, 0
    for uniform in rng.random((200, 250)):
        values = (uniform < gains).astype(float) - (uniform > 1 - losses)
        failed += betting_upper_bounds(values.tolist()).min() < 0.05
    assert failed / 200 <= 0.05 + 3 * 0.0154


def test_betting_narrows() -> None:
    """Without any difference 3 points are shown, after more prompts than the 88 that a single look takes."""
    bounds = betting_upper_bounds([0.0] * 600)
    assert bounds[-1] < 0.03
    assert 88 < int(np.argmax(bounds < 0.03)) < 600
    lower = -betting_upper_bounds([-1.0, -0.0] * 300)[-1]
    assert 0.4 < lower < 0.5
    with pytest.raises(ValueError, match="lie in"):
        betting_upper_bounds([1.5])


def test_a_fixed_sequence_stops_at_the_first_failure() -> None:
    """What comes after a failure is not counted, nor read."""

    def unread() -> bool:
        raise AssertionError("read beyond the first failure")

    assert fixed_sequence([True, True, False, True]) == 2
    assert fixed_sequence(test() for test in (lambda: True, lambda: False, unread)) == 1
    assert fixed_sequence([]) == 0


def test_a_fixed_sequence_keeps_the_level_of_one_test() -> None:
    """Of nine λs at their true boundary a false one is called safe 5 % of the time, and 37 % where all are tried.

    Within 4 sigma of 20,000 draws of nine independent tests.
    """
    passes = np.random.default_rng(8).random((20_000, 9)) < 0.05
    in_order = np.mean([fixed_sequence(row) > 0 for row in passes.tolist()])
    assert in_order == pytest.approx(0.05, abs=4 * 0.00154)
    assert passes.any(axis=1).mean() == pytest.approx(1 - 0.95**9, abs=4 * 0.0034)
