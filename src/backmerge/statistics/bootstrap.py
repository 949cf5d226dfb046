"""Bootstrap by prompt cluster, for means of values that are not only 0 and 1: BERTScore F1, pass@k, several answers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from backmerge.statistics.clusters import ClusterSums, cluster_means, cluster_sums, effective_size
from backmerge.statistics.intervals import Interval, wilson
from backmerge.statistics.paired import PairedDifference, paired_difference, tango_bound

CELLS_AT_ONCE = 1 << 22  # resampled clusters: 32 MB of indices
FEWEST_CONTRIBUTING = 4.0  # if the variance comes from fewer clusters, resampling says little about the rest


def bootstrap_interval(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    draws: int = 10_000,
) -> Interval:
    """Return the bootstrap interval of the mean over prompts; whole clusters are resampled.

    A resample of clusters has the mean Σ sums / Σ sizes. The interval runs between the quantiles Φ(∓ sqrt(G/(G − 1))
    t) of these means for G clusters, t being Student's quantile with G − 1 degrees of freedom: the plain percentile
    interval is too narrow by that factor (with 20 prompts it covers 92 %, and this one 95 %). BCa is no better on any
    distribution tried, and covers 89 % if a few clusters are large (`python -m benchmarks.error_rates`).

    If nearly all values are equal, a resample shows no spread: for 164 problems of which all but a few are always
    solved, coverage was 55 %. If the variance comes from fewer than four clusters, by (Σr²)² / Σr⁴ over clusters'
    residuals r, the interval is the hull with Wilson's, which is valid for any values in [0, 1].

    Args:
        values: In [0, 1], one per prompt.
        clusters: Each prompt's cluster of near-duplicates; by default each prompt is a cluster.
        confidence: Two-sided coverage.
        seed: Seed of the resampling.
        draws: Number of resamples.

    Raises:
        ValueError: there are no values, or not as many clusters as values.

    Source: Hesterberg (2015), The American Statistician 69 (expanded percentiles); Davison and Hinkley,
    Bootstrap Methods (1997), section 3.8 (clusters).
    """
    if not len(values):
        raise ValueError("a mean needs at least one value")
    grouped = cluster_sums(values, clusters)
    n, num_clusters = len(values), len(grouped.sizes)
    mean = float(grouped.sums.sum()) / n
    low = high = mean
    if num_clusters > 1:
        means = resampled_means(grouped, seed=seed, draws=draws)
        low, high = (float(end) for end in np.quantile(means, _expanded(num_clusters, confidence)))
    if _contributing(grouped) < FEWEST_CONTRIBUTING:
        size = effective_size(values, clusters) if clusters is not None else float(n)
        widest = wilson(mean * size, size, confidence=confidence)
        low, high = min(low, widest.low), max(high, widest.high)
    return Interval(low, high)


def bootstrap_difference(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    draws: int = 10_000,
) -> PairedDifference:
    """Compare two models prompt by prompt; whole clusters of prompts are resampled.

    For values that are not only 0 and 1, such as BERTScore's or means over several answers to a prompt: Tango's
    intervals of `paired_difference` are valid for them too, but are several times wider if the differences are small.

    Resampling alone is not enough. If few prompts differ, as with five answers to each of 260 prompts of which 6 % are
    ever harmful, samples with too low a mean also show too little spread, and 6 to 8 % of the one-sided 95 % bounds
    were too low. Each bound is therefore the wider of the bootstrap's and a score bound on the same variance:
    differences are counted in units of v = (Σd² + w²) / (Σ|d| + w), where w is the largest |d|, and Tango's bound for
    these counts is converted back from units of v. Counts of size v have the mean and the variance of the differences;
    the additional w makes up for the one that a low sample lacks. The error rate is at most 5.5 % (`python -m
    benchmarks.error_rates --only samples`).

    Args:
        first: Values in [0, 1], one per prompt.
        second: The other model's values, in the same order.
        clusters: Each prompt's cluster of near-duplicates; by default each prompt is a cluster.
        seed: Seed of the resampling.
        draws: Number of resamples.

    Returns:
        The mean difference with 95 % two-sided intervals and one-sided bounds: the wider of expanded percentiles, as in
        `bootstrap_interval`, and the score bounds. If the variance comes from fewer than four clusters, the hull with
        Tango's too.

    Raises:
        ValueError: the two differ in length, or are empty.

    Source: the scaled counts are those of Fay and Feuer (1997), Statistics in Medicine 16, 791-801, for sums of
    weighted counts, of which the largest weight is added likewise.
    """
    widest = paired_difference(first, second, clusters)
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    grouped = cluster_sums(differences, clusters)
    num_clusters = len(grouped.sizes)
    if num_clusters == 1:
        return widest
    found = _score_bounds(differences, widest)
    if _contributing(grouped) < FEWEST_CONTRIBUTING:
        found = _hull(found, widest)
    means = resampled_means(grouped, seed=seed, draws=draws)
    low, high = (float(end) for end in np.quantile(means, _expanded(num_clusters, 0.95)))
    lower, upper = (float(end) for end in np.quantile(means, _expanded(num_clusters, 0.90)))
    return _hull(found, found._replace(low=low, high=high, lower_bound=lower, upper_bound=upper))


def _hull(first: PairedDifference, second: PairedDifference) -> PairedDifference:
    """Return the wider of the bounds of two intervals for the same difference."""
    return first._replace(
        low=min(first.low, second.low),
        high=max(first.high, second.high),
        lower_bound=min(first.lower_bound, second.lower_bound),
        upper_bound=max(first.upper_bound, second.upper_bound),
    )


def _score_bounds(differences: NDArray[np.float64], found: PairedDifference) -> PairedDifference:
    """Return Tango's bounds of the differences in units of their own size."""
    sizes = np.abs(differences)
    total, largest = float(sizes.sum()), float(sizes.max())
    if largest == 0.0:
        return found
    unit = (float((sizes**2).sum()) + largest**2) / (total + largest)
    share = found.n_effective / len(differences) / unit
    gains, losses = (float(np.maximum(part, 0).sum()) * share for part in (differences, -differences))

    def bound(z: float) -> float:
        return unit * tango_bound(gains, losses, found.n_effective, z)

    one_sided, two_sided = NormalDist().inv_cdf(0.95), NormalDist().inv_cdf(0.975)
    return found._replace(
        low=bound(two_sided), high=bound(-two_sided), lower_bound=bound(one_sided), upper_bound=bound(-one_sided)
    )


def clustered_difference(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    is_rate: bool = True,
    seed: int = 0,
    draws: int = 10_000,
) -> PairedDifference:
    """Compare two models with near-duplicate prompts counted as one: the mean over clusters of the clusters' means.

    Decisions on safety use it. A mean over prompts gives a request as many votes as a benchmark has phrasings of it.
    AdvBench's largest cluster has 31 of 260 prompts; with it, 260 prompts are worth 60 to 140 (see `effective_size`),
    and by cluster 177. With 1 % of harm in either direction, that shows a margin of 3 points in 80 to 90 % of runs
    instead of 40 to 60 %. If members of a cluster always agree, clusters are independent and equal, so the level is
    Tango's own; if they agree less, their means vary less than the bounds allow for.

    Args:
        first: Values in [0, 1], one per prompt.
        second: The other model's values, in the same order.
        clusters: Each prompt's cluster of near-duplicates.
        is_rate: Whether the values are 0 and 1, or means of those over models: if so, the bounds are Tango's, else
            those of `bootstrap_difference`.
        seed: Seed of the resampling.
        draws: Number of resamples.

    Returns:
        `n` counts the prompts and `n_effective` the clusters.

    Raises:
        ValueError: the two differ in length, or are empty, or there are not as many clusters.

    Source: cluster-level analysis, Donner and Klar, Cluster Randomization Trials (2000), chapter 6; on the two means,
    Kahan et al. (2023), International Journal of Epidemiology 52, 107-118.
    """
    if len(first) != len(second):
        raise ValueError(f"both sides need a value for every pair: {len(first)} and {len(second)}")
    each, other = cluster_means(first, clusters), cluster_means(second, clusters)
    found = paired_difference(each, other) if is_rate else bootstrap_difference(each, other, seed=seed, draws=draws)
    return found._replace(n=len(first))


def resampled_means(grouped: ClusterSums, *, seed: int, draws: int) -> NDArray[np.float64]:
    """Return Σ sums / Σ sizes of as many clusters drawn with replacement, `(draws,)`."""
    generator = np.random.default_rng(seed)
    num_clusters = len(grouped.sizes)
    step = max(1, CELLS_AT_ONCE // num_clusters)
    parts = []
    for at in range(0, draws, step):
        drawn = generator.integers(0, num_clusters, size=(min(step, draws - at), num_clusters))
        parts.append(grouped.sums[drawn].sum(axis=1) / grouped.sizes[drawn].sum(axis=1))
    return np.concatenate(parts)


def _expanded(num_clusters: int, confidence: float) -> tuple[float, float]:
    """Return the shares of resampled means below the two ends."""
    t = float(stats.t.ppf(0.5 + confidence / 2, num_clusters - 1))
    tail = NormalDist().cdf(-((num_clusters / (num_clusters - 1)) ** 0.5) * t)
    return tail, 1 - tail


def _contributing(grouped: ClusterSums) -> float:
    """Return how many clusters of equal weight would give this variance: (Σr²)² / Σr⁴ over residuals r."""
    squares = (grouped.sums - grouped.sizes * (grouped.sums.sum() / grouped.sizes.sum())) ** 2
    fourth = float((squares**2).sum())
    # residuals that are only rounding
    if float(squares.sum()) < 1e-20:
        return 0.0
    return float(squares.sum()) ** 2 / fourth
