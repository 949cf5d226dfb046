"""Intervals for rates and over seeds: exact coverage, scipy's values, and what a few seeds can say."""

import itertools
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from backmerge.statistics import clopper_pearson, over_seeds, rate_of, t_interval, value_range, wilson


def exact_coverage(ends: np.ndarray, n: int, rates: np.ndarray) -> np.ndarray:
    """The chance that an interval, given by its ends for each count, holds each true rate."""
    masses = stats.binom.pmf(np.arange(n + 1)[None, :], n, rates[:, None])
    covered = (ends[None, :, 0] <= rates[:, None]) & (rates[:, None] <= ends[None, :, 1])
    return (masses * covered).sum(axis=1)


@pytest.mark.parametrize("n", [1, 20, 100, 330, 520])
def test_clopper_pearson_covers_everywhere(n: int) -> None:
    """Exact coverage is never below 95 %, for rates from 0.01 to 99.99 % and just beside each end, where it is least.

    The tolerance is that of the sum of n + 1 float64 masses.
    """
    ends = np.array([clopper_pearson(x, n) for x in range(n + 1)])
    beside = np.clip(np.concatenate([ends.ravel() - 1e-9, ends.ravel() + 1e-9]), 1e-6, 1 - 1e-6)
    rates = np.concatenate([np.linspace(1e-4, 1 - 1e-4, 1999), beside])
    assert exact_coverage(ends, n, rates).min() >= 0.95 - 1e-9
    # the guard sees an interval that covers 95 % only on average
    wilsons = np.array([wilson(x, n) for x in range(n + 1)])
    assert exact_coverage(wilsons, n, rates).min() < 0.95


@given(n=st.integers(1, 1000), share=st.floats(0, 1), confidence=st.sampled_from([0.9, 0.95, 0.99]))
def test_clopper_pearson_is_scipys(n: int, share: float, confidence: float) -> None:
    """For whole numbers it equals `binomtest(...).proportion_ci(method="exact")`."""
    successes = round(share * n)
    theirs = stats.binomtest(successes, n).proportion_ci(confidence, method="exact")
    assert clopper_pearson(successes, n, confidence=confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_clopper_pearson_by_hand() -> None:
    """None of n: 1 − (α/2)^(1/n); all of n: the reverse; of nothing, everything is possible."""
    assert clopper_pearson(0, 50) == pytest.approx((0, 1 - 0.025 ** (1 / 50)))
    assert clopper_pearson(50, 50) == pytest.approx((0.025 ** (1 / 50), 1))
    assert clopper_pearson(0, 0) == (0, 1)


@given(n=st.floats(0.01, 500), share=st.floats(0, 1))
def test_clopper_pearson_holds_its_rate_at_effective_sizes(n: float, share: float) -> None:
    """For any effective size the interval holds the rate."""
    low, high = clopper_pearson(share * n, n)
    assert 0 <= low <= share + 1e-9
    assert share - 1e-9 <= high <= 1


def test_a_rate_counts_near_duplicates_once() -> None:
    """The mean is over prompts, the interval over clusters; of no prompts nothing is known."""
    found = rate_of([1, 1, 0, 0], ["a", "a", "b", "b"])
    assert (found.value, found.n) == (0.5, 4)
    assert (found.low, found.high) == pytest.approx(wilson(1, 2))
    assert rate_of([1, 0, 0, 0])[1:3] == pytest.approx(wilson(1, 4))
    assert rate_of([]) == (None, 0, 1, 0)


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_over_seeds_says_what_its_interval_is(values: list[float]) -> None:
    """One seed has no interval, two have a range, more have Student's, and each holds the mean."""
    found = over_seeds(values)
    assert found.mean == pytest.approx(fmean(values), abs=1e-12)
    assert found.kind == {1: "single", 2: "range"}.get(len(values), "t")
    if found.interval is None:
        assert len(values) == 1
        return
    assert found.interval.low - 1e-9 <= found.mean <= found.interval.high + 1e-9
    assert found.interval == (value_range(values) if len(values) == 2 else t_interval(values))


def test_limits_are_those_of_a_difference() -> None:
    """Rates are cut to [0, 1], and differences of rates to [−1, 1]."""
    assert over_seeds([0.0, 0.1, 0.0]).interval == pytest.approx((0, 0.1768), abs=1e-4)
    low = over_seeds([0.0, 0.1, 0.0], limits=(-1, 1)).interval
    assert low == pytest.approx((-0.1101, 0.1768), abs=1e-4)


def test_no_seed_is_refused() -> None:
    """Of no values there is neither a range nor a mean."""
    with pytest.raises(ValueError, match="one value"):
        over_seeds([])


def test_three_seeds_are_covered() -> None:
    """Student's interval of three seeds covers 95 %, where a percentile bootstrap covers 67 or 75 %, within 4 sigma.

    Of 20,000 draws, sigma is 0.33 points; of the 4,000 that the first is tried on, 0.34. Of three values there are 27
    resamples; with their quantiles interpolated 67.4 % were covered in an independent run of a million. Drawn at random
    and many, the least and the greatest value have 1/27 > 2.5 % each, so that the interval is the range, which misses
    if all three lie on one side: 2/2³ of the time.
    """
    rng = np.random.default_rng(1)
    seeds = rng.normal(0.5, 0.02, (20_000, 3))
    intervals = np.array([over_seeds(row).interval for row in seeds[:4000].tolist()])
    covered = np.mean((intervals[:, 0] <= 0.5) & (intervals[:, 1] >= 0.5))
    assert covered == pytest.approx(0.95, abs=4 * 0.0034)
    resamples = np.array(list(itertools.product(range(3), repeat=3)))
    means = seeds[:, resamples].mean(axis=2)
    for method, expected in (("linear", 0.674), ("inverted_cdf", 0.75)):
        low, high = np.quantile(means, [0.025, 0.975], axis=1, method=method)
        assert np.mean((low <= 0.5) & (high >= 0.5)) == pytest.approx(expected, abs=4 * 0.0033)
