"""Several estimates taken together: the mean of independent ones with its interval, and p-values of many tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from backmerge.statistics.intervals import Interval
from backmerge.statistics.paired import PairedDifference


def mean_interval(values: Sequence[float], intervals: Sequence[Interval], *, are_independent: bool = True) -> Interval:
    """The interval of the mean of estimates, from theirs: each side by the root of the sum of squares.

    Args:
        values: The estimates.
        intervals: Of each, all at one confidence; they may be lopsided.
        are_independent: If not, the mean of the ends is taken, which holds however they hang together.

    Raises:
        ValueError: there are none, or not as many intervals as values.

    Source: MOVER, method of variance estimates recovery; Zou and Donner (2008), Statistics in Medicine 27.
    """
    if not values or len(values) != len(intervals):
        raise ValueError(f"{len(values)} values with {len(intervals)} intervals have no mean")
    if not are_independent:
        return Interval(fmean(i.low for i in intervals), fmean(i.high for i in intervals))
    below = math.sqrt(math.fsum((v - i.low) ** 2 for v, i in zip(values, intervals, strict=True)))
    above = math.sqrt(math.fsum((i.high - v) ** 2 for v, i in zip(values, intervals, strict=True)))
    mean = fmean(values)
    return Interval(mean - below / len(values), mean + above / len(values))


def mean_difference(differences: Sequence[PairedDifference], *, are_independent: bool = True) -> PairedDifference:
    """The mean of differences on several benchmarks, each weighing the same; bounds as `mean_interval`.

    Raises:
        ValueError: there are none.
    """
    values = [one.difference for one in differences]
    ends = [Interval(one.low, one.high) for one in differences]
    bounds = [Interval(one.lower_bound, one.upper_bound) for one in differences]
    two_sided = mean_interval(values, ends, are_independent=are_independent)
    one_sided = mean_interval(values, bounds, are_independent=are_independent)
    return PairedDifference(
        fmean(values),
        *two_sided,
        *one_sided,
        sum(one.n for one in differences),
        math.fsum(one.n_effective for one in differences),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number: with those below 0.05 rejected, any false rejection is below 5 % likely.

    Args:
        p_values: One per test, in [0, 1]; dependent ones too.

    Source: Holm (1979), Scandinavian Journal of Statistics 6.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
