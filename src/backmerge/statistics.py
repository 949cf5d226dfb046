"""Intervals and tests for rates; pure functions of numbers.

Every rate here is a mean of values in [0, 1]. Values that are not 0 or 1 (a seed average, a partial score) have a
smaller variance than a coin of the same mean, so intervals for coins are kept: they can only be too wide.

Prompts that are near-duplicates carry less evidence than their number says. They are grouped in clusters, and n is
replaced by an effective size: n over the design effect that the values show, as Korn and Graubard do for surveys, but
never more than the number of clusters, so that near-duplicates count at most once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


class PairedDifference(NamedTuple):
    """How two models differ on the same prompts.

    Attributes:
        difference: Mean of first minus second, in [-1, 1].
        low, high: Two-sided 95 % interval.
        lower_bound, upper_bound: One-sided 95 % bounds, what a margin is held against.
        n: Prompts.
        n_effective: Prompts' worth of evidence, after clusters.
    """

    difference: float
    low: float
    high: float
    lower_bound: float
    upper_bound: float
    n: int
    n_effective: float


def effective_size(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """How many independent prompts the mean of clustered values is worth.

    The design effect is the variance of the mean with whole clusters as units over that with prompts as units. The
    size is n over it, held between Kish's (Σm)² / Σm² over cluster sizes m, which is right if the members of a
    cluster always agree, and the number of clusters. Values that are all equal show no design effect, and count as
    many as there are clusters.

    Args:
        values: One per prompt.
        clusters: Each prompt's cluster.

    Source: Korn and Graubard (1998), Survey Methodology 24, section 2; Kish, Survey Sampling (1965), section 8.2.
    """
    if not values:
        return 0.0
    sizes = Counter(clusters)
    centre = fmean(values)
    sums: dict[Hashable, float] = dict.fromkeys(sizes, 0.0)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - centre
    by_prompt = math.fsum((value - centre) ** 2 for value in values)
    by_cluster = math.fsum(total * total for total in sums.values())
    kish = len(values) ** 2 / sum(size * size for size in sizes.values())
    if by_prompt == 0 or by_cluster == 0:
        return float(len(sizes))
    return min(float(len(sizes)), max(kish, len(values) * by_prompt / by_cluster))


def wilson(numerator: float, n: float, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a rate numerator / n.

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
    # at the ends the algebra gives 0 and 1; rounding must not
    return Interval(0.0 if p == 0 else max(0.0, centre - half), 1.0 if p == 1 else min(1.0, centre + half))


def t_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Student's interval for the mean of a few seeds' rates, cut to [0, 1].

    Never a percentile bootstrap: with three seeds that covers 67 % where it says 95 %.

    Raises:
        ValueError: fewer than two values, which have no spread.
    """
    if len(values) < 2:
        raise ValueError("a spread needs two values at least")
    quantile = float(stats.t.ppf(0.5 + confidence / 2, len(values) - 1))
    half = quantile * stdev(values) / math.sqrt(len(values))
    return Interval(max(0.0, fmean(values) - half), min(1.0, fmean(values) + half))


def tango_bound(gains: float, losses: float, n: float, z: float) -> float:
    """The difference Δ at which Tango's score statistic for matched pairs equals `z`.

    With b gains (first 1, second 0) and c losses of n pairs, the statistic is
    (b − c − nΔ) / sqrt(n (2q + Δ(1 − Δ))), q the maximum-likelihood rate of losses given Δ. It falls in Δ, so that
    z > 0 gives a lower bound and z < 0 an upper one. Unlike Wald's, it keeps its level where discordant pairs are
    few, also at none.

    Source: Tango (1998), Statistics in Medicine 17, equations 6 to 9.
    """

    def excess(delta: float) -> float:
        b = -gains - losses + (2 * n - gains + losses) * delta
        c = -losses * delta * (1 - delta)
        q = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * max(q, 0.0) + delta * (1 - delta))
        return (gains - losses - n * delta) - z * math.sqrt(max(variance, 0.0))

    edge = 1 - 1e-12
    if excess(-edge) <= 0:
        return -1.0
    if excess(edge) >= 0:
        return 1.0
    return float(optimize.brentq(excess, -edge, edge, xtol=1e-12))


def paired_difference(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> PairedDifference:
    """Compare two models, or two averages of models, prompt by prompt.

    Args:
        first: Values in [0, 1], one per prompt.
        second: The same, of the other model, in the same order.
        clusters: Each prompt's cluster of near-duplicates; all apart if not given.

    Returns:
        Mean difference with Tango's intervals. Where values are averages over seeds, the positive and the negative
        parts of the differences take the place of the discordant counts, which overstates their variance and so
        widens the interval.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"paired values must be as many on both sides, and some: {len(first)} and {len(second)}")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    n = len(differences)
    size = effective_size(differences, clusters) if clusters is not None else float(n)
    gains = math.fsum(d for d in differences if d > 0) * size / n
    losses = math.fsum(-d for d in differences if d < 0) * size / n
    one_sided, two_sided = NormalDist().inv_cdf(0.95), NormalDist().inv_cdf(0.975)
    return PairedDifference(
        difference=math.fsum(differences) / n,
        low=tango_bound(gains, losses, size, two_sided),
        high=tango_bound(gains, losses, size, -two_sided),
        lower_bound=tango_bound(gains, losses, size, one_sided),
        upper_bound=tango_bound(gains, losses, size, -one_sided),
        n=n,
        n_effective=size,
    )


def sign_flip_p(differences: Sequence[float], *, seed: int = 0, draws: int = 10_000) -> float:
    """One-sided p of a positive mean, by flipping the signs of the prompts' differences at random.

    Several seeds of one model are averaged per prompt first, since they share the base's answers.

    Source: Fisher's randomisation test; the +1 of Phipson and Smyth (2010) keeps it exact for random flips.
    """
    values = np.asarray([d for d in differences if d != 0.0])
    if values.size == 0:
        return 1.0
    generator = np.random.default_rng(seed)
    signs = generator.integers(0, 2, size=(draws, values.size), dtype=np.int8) * 2 - 1
    as_large = int(np.sum(signs @ values >= values.sum() - 1e-12))
    return (1 + as_large) / (1 + draws)
