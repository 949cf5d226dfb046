"""Estimates taken together: laws, values by hand, and how often the adjusted tests are wrong."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge.statistics import Interval, PairedDifference, holm, mean_difference, mean_interval


def test_one_estimate_keeps_its_interval() -> None:
    """The mean of one estimate is that estimate."""
    assert mean_interval([0.3], [Interval(0.1, 0.7)]) == pytest.approx((0.1, 0.7))


def test_two_estimates_by_hand() -> None:
    """Half-widths of 0.3 and 0.4 give half of their root of squares, 0.25, on each side of the mean."""
    assert mean_interval([0.5, 0.7], [Interval(0.2, 0.8), Interval(0.3, 1.1)]) == pytest.approx((0.35, 0.85))


def test_nothing_has_no_mean() -> None:
    """No estimates, or intervals of other ones, are a fault of the caller."""
    with pytest.raises(ValueError, match="no mean"):
        mean_interval([], [])
    with pytest.raises(ValueError, match="no mean"):
        mean_interval([0.1, 0.2], [Interval(0.0, 1.0)])


def test_estimates_that_hang_together_gain_nothing() -> None:
    """The same estimate twice is no more than once, unless it is said to be two."""
    twice = [0.5, 0.5], [Interval(0.2, 0.8), Interval(0.2, 0.8)]
    assert mean_interval(*twice, are_independent=False) == pytest.approx((0.2, 0.8))
    assert mean_interval(*twice) == pytest.approx((0.5 - 0.3 / 2**0.5, 0.5 + 0.3 / 2**0.5))


def test_the_mean_of_differences_counts_all_prompts() -> None:
    """Bounds of both kinds are combined, and prompts are added up."""
    one = PairedDifference(0.1, 0.0, 0.2, 0.02, 0.18, 50, 40.0)
    two = PairedDifference(0.3, 0.2, 0.4, 0.22, 0.38, 150, 100.0)
    found = mean_difference([one, two])
    assert found.difference == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.2 - 0.1 / 2**0.5, 0.2 + 0.1 / 2**0.5))
    assert (found.lower_bound, found.upper_bound) == pytest.approx((0.2 - 0.08 / 2**0.5, 0.2 + 0.08 / 2**0.5))
    assert (found.n, found.n_effective) == (200, 140.0)


def test_holm_by_hand() -> None:
    """The smallest is multiplied by three, the next by two, and none falls below a smaller one's."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_makes_smaller_and_keeps_the_order(values: list[float]) -> None:
    """Adjusted p-values are no smaller, no larger than 1 or Bonferroni's, and in the order of the given ones."""
    adjusted = holm(values)
    for value, one in zip(values, adjusted, strict=True):
        assert value <= one <= min(1.0, len(values) * max(value, 1e-300)) or one == pytest.approx(max(adjusted))
    order = np.argsort(values, kind="stable")
    assert list(np.diff(np.asarray(adjusted)[order]) >= 0) == [True] * (len(values) - 1)


def test_false_rejections_of_five_tests_stay_at_five_percent() -> None:
    """Of 4,000 families of five true hypotheses, 5 % have a rejection, within four sigmas."""
    generator = np.random.default_rng(0)
    families = generator.uniform(size=(4000, 5))
    wrong = sum(min(holm(list(family))) < 0.05 for family in families)
    assert abs(wrong / 4000 - 0.05) < 4 * (0.05 * 0.95 / 4000) ** 0.5
