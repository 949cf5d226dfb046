"""Intervals for one rate over prompts, and for one mean over seeds."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any, NamedTuple

from scipy import stats

from backmerge.records import Estimate
from backmerge.statistics.clusters import effective_size

UNIT = (0.0, 1.0)


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


def as_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a statistic with its rates as mappings."""

    def plain(value: Any) -> Any:
        if not isinstance(value, Estimate):
            return value
        return {"value": value.value, "low": value.low, "high": value.high, "n": value.n}

    return {name: plain(value) for name, value in values.items()}


def wilson(numerator: float, n: float, *, confidence: float = 0.95) -> Interval:
    """Return Wilson's score interval for a rate numerator / n.

    Args:
        numerator: Sum of values in [0, 1].
        n: Sample size, possibly an effective one; with 0 the interval is [0, 1].
        confidence: Two-sided coverage.

    Source: Wilson (1927), JASA 22.
    """
    if n <= 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = numerator / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # at the ends the exact result is 0 and 1; rounding must not change that
    return Interval(0.0 if p == 0 else max(0.0, centre - half), 1.0 if p == 1 else min(1.0, centre + half))


def rate_of(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, *, confidence: float = 0.95
) -> Estimate:
    """Return the mean of values in [0, 1] with Wilson's interval at the clusters' effective size.

    Args:
        values: One per prompt; if empty, the value is `None` and the interval [0, 1].
        clusters: Each prompt's cluster of near-duplicates; by default each prompt is a cluster.
        confidence: Two-sided coverage.
    """
    if not values:
        return Estimate(None, 0.0, 1.0)
    mean = math.fsum(values) / len(values)
    size = float(len(values)) if clusters is None else effective_size(values, clusters)
    return Estimate(mean, *wilson(mean * size, size, confidence=confidence), len(values))


def t_interval(values: Sequence[float], *, confidence: float = 0.95, limits: tuple[float, float] = UNIT) -> Interval:
    """Return Student's interval for the mean of a few seeds' rates, cut to the possible range.

    Never a percentile bootstrap: with three seeds that covers 67 to 75 % instead of 95 %. If all seeds agree, the
    interval has no width, which says nothing about the prompts: use the hull with Wilson's.

    Args:
        values: One per seed.
        confidence: Two-sided coverage.
        limits: [0, 1] for rates; −1 and 1 for their differences.

    Raises:
        ValueError: there are fewer than two values, so there is no spread.
    """
    if len(values) < 2:
        raise ValueError("a spread needs at least two values")
    quantile = float(stats.t.ppf(0.5 + confidence / 2, len(values) - 1))
    half = quantile * stdev(values) / math.sqrt(len(values))
    return Interval(max(limits[0], fmean(values) - half), min(limits[1], fmean(values) + half))
