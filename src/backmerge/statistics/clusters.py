"""Count near-duplicate prompts for what they are worth."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class ClusterSums(NamedTuple):
    """Values added up within clusters, in the order in which the clusters first occur.

    Attributes:
        sums: Sum of values, `(clusters,)`.
        squares: Sum of squared values, `(clusters,)`.
        sizes: Number of values, `(clusters,)`.
    """

    sums: NDArray[np.float64]
    squares: NDArray[np.float64]
    sizes: NDArray[np.float64]


def cluster_sums(values: Sequence[float] | NDArray[np.float64], clusters: Sequence[Hashable] | None) -> ClusterSums:
    """Add values up within clusters.

    Args:
        values: One per prompt.
        clusters: Each prompt's cluster; by default each prompt is a cluster.

    Raises:
        ValueError: there are not as many clusters as values.
    """
    data = np.asarray(values, dtype=np.float64)
    if clusters is None:
        return ClusterSums(data, data * data, np.ones_like(data))
    if len(clusters) != len(data):
        raise ValueError(f"every value needs a cluster: {len(data)} values, {len(clusters)} clusters")
    numbers: dict[Hashable, int] = {}
    places = np.fromiter((numbers.setdefault(cluster, len(numbers)) for cluster in clusters), np.intp, len(data))
    count = len(numbers)
    return ClusterSums(
        np.bincount(places, data, count).astype(np.float64),
        np.bincount(places, data * data, count).astype(np.float64),
        np.bincount(places, minlength=count).astype(np.float64),
    )


def cluster_means(values: Sequence[float], clusters: Sequence[Hashable]) -> list[float]:
    """Each cluster's mean, in the order in which the clusters first occur.

    Raises:
        ValueError: there are not as many clusters as values.
    """
    sums, _, sizes = cluster_sums(values, clusters)
    means: list[float] = (sums / sizes).tolist()
    return means


def effective_size(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Return how many independent prompts the mean of clustered values is worth: n over a design effect.

    The design effect is the mean of two estimates. The one *shown* is the variance of the mean with whole clusters as
    units over that with prompts as units; it is unbiased, but too small in exactly those samples whose large clusters
    happen to contain no harm, where the rate is too low as well. The one *implied* is 1 + ρ (Σm²/Σm − 1) over cluster
    sizes m, where ρ is 1 minus the variance between members of a cluster over that of all; it is too large if few
    prompts differ, but cannot be small if members agree. Both are limited to the range from n over the number of
    clusters to Kish's Σm²/Σm, so that the size is never above the number of clusters or below (Σm)²/Σm². Values that
    are all equal show no design effect, and count as many as there are clusters.

    With the shown one alone, a merge that is worse by exactly the margin passed at 3 points, on either half of AdvBench
    with members that always agree, 6 to 9 % of the time instead of 5 %, and at 10 points up to 16 %; with the implied
    one alone under 5 %, but with as little as a third of the power. Their mean keeps 5.5 % (`python -m
    benchmarks.error_rates`), with two thirds of it. A t quantile or a factor G/(G − 1) changes these figures by less
    than a point where it matters: the cause is the sample's own design effect, not the number of clusters.

    Args:
        values: One per prompt.
        clusters: Each prompt's cluster.

    Raises:
        ValueError: there are not as many clusters as values.

    Source: Korn and Graubard (1998), Survey Methodology 24, section 2, and Kish, Survey Sampling (1965), sections 5.4
    and 8.2, for the two estimates; their mean is ours.
    """
    if not len(values):
        return 0.0
    data = np.asarray(values, dtype=np.float64)
    sums, squares, sizes = cluster_sums(data - data.mean(), clusters)
    n, num_clusters = len(data), len(sizes)
    by_prompt = float(squares.sum())
    if by_prompt == 0.0:
        return float(num_clusters)
    least, most = n / num_clusters, float((sizes**2).sum()) / n
    shown = float((sums**2).sum()) / by_prompt
    num_pairs = float((sizes * (sizes - 1)).sum())
    # Σ over pairs of a cluster of (x − y)² is m Σx² − (Σx)²; half its mean estimates the variance between members
    within = float((sizes * squares - sums**2).sum()) / num_pairs if num_pairs else 0.0
    agreement = 1 - within * n / by_prompt
    implied = 1 + agreement * (most - 1)
    effect = sum(min(max(estimate, least), most) for estimate in (shown, implied)) / 2
    return min(float(num_clusters), n / effect)
