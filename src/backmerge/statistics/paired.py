"""Two models on the same prompts: the difference, its bounds, and tests."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist, fmean
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from backmerge.records import Estimate
from backmerge.statistics.clusters import cluster_sums, effective_size
from backmerge.statistics.intervals import Interval

Number = TypeVar("Number", float, NDArray[np.float64])
CELLS_AT_ONCE = 1 << 22  # signs as float64: 32 MB


class PairedDifference(NamedTuple):
    """How two models differ on the same prompts.

    Attributes:
        difference: Mean of first minus second, in [-1, 1].
        low, high: Two-sided 95 % interval.
        lower_bound, upper_bound: One-sided 95 % bounds, which are compared with a margin.
        n: Prompts.
        n_effective: The number of independent prompts that the evidence is worth.
    """

    difference: float
    low: float
    high: float
    lower_bound: float
    upper_bound: float
    n: int
    n_effective: float

    @property
    def estimate(self) -> Estimate:
        """The difference with its two-sided interval."""
        return Estimate(self.difference, self.low, self.high, self.n, self.n_effective)


class Discordance(NamedTuple):
    """Prompts on which two models differ.

    Attributes:
        gains: Prompts with 1 for the first and 0 for the second; for fractional values, the sum of positive
            differences.
        losses: The reverse.
        n: All prompts; the effective number if clusters were given.
    """

    gains: float
    losses: float
    n: float


def discordance(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> Discordance:
    """Count the prompts on which two models differ, scaled to the clusters' effective size.

    Args:
        first: Values in [0, 1], one per prompt.
        second: The other model's values, in the same order.
        clusters: Each prompt's cluster of near-duplicates; by default each prompt is a cluster, and nothing is scaled.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    differences = _differences(first, second)
    n = len(differences)
    size = effective_size(differences, clusters) if clusters is not None else float(n)
    gains = math.fsum(d for d in differences if d > 0) * size / n
    losses = math.fsum(-d for d in differences if d < 0) * size / n
    return Discordance(gains, losses, size)


def _score_parts(gains: Number, losses: Number, n: float, delta: float) -> tuple[Number, Number]:
    """Return numerator and denominator of Tango's statistic."""
    b = -gains - losses + (2 * n - gains + losses) * delta
    c = -losses * delta * (1 - delta)
    # the arguments of both roots are negative only because of rounding
    q = (abs(b * b - 8 * n * c) ** 0.5 - b) / (4 * n)
    return gains - losses - n * delta, abs(n * (2 * q + delta * (1 - delta))) ** 0.5


def tango_score(gains: NDArray[np.float64], losses: NDArray[np.float64], n: float, delta: float) -> NDArray[np.float64]:
    """Return Tango's score statistic for matched pairs at a difference of `delta`, for many counts at once.

    (b − c − nΔ) / sqrt(n (2q + Δ(1 − Δ))), with b gains and c losses of n pairs, and q the maximum-likelihood rate
    of losses given Δ. Below −1.645, the difference is shown (one-sided, 5 %) to be less than `delta`.

    Args:
        gains: Counts b, of any shape.
        losses: Counts c, of a shape that fits.
        n: Pairs, possibly an effective number.
        delta: Δ in (−1, 1), not 0 if there are counts without a discordant pair.

    Source: Tango (1998), Statistics in Medicine 17, equations 6 to 9.
    """
    numerator, denominator = _score_parts(gains, losses, n, delta)
    return numerator / denominator


def tango_bound(gains: float, losses: float, n: float, z: float) -> float:
    """Return the difference Δ at which Tango's score statistic for matched pairs equals `z`.

    With b gains (first 1, second 0) and c losses of n pairs, the statistic is
    (b − c − nΔ) / sqrt(n (2q + Δ(1 − Δ))), q the maximum-likelihood rate of losses given Δ. It falls in Δ, so that
    z > 0 gives a lower bound and z < 0 an upper one. Unlike Wald's, it keeps its level if discordant pairs are few, or
    none.

    Source: Tango (1998), Statistics in Medicine 17, equations 6 to 9.
    """

    def excess(delta: float) -> float:
        numerator, denominator = _score_parts(gains, losses, n, delta)
        return numerator - z * denominator

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
        second: The other model's values, in the same order.
        clusters: Each prompt's cluster of near-duplicates; by default each prompt is a cluster.

    Returns:
        Mean difference with Tango's intervals. If values are averages over seeds, the positive and the negative parts
        of the differences replace the discordant counts, which overstates their variance and so widens the interval.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    gains, losses, size = discordance(first, second, clusters)
    one_sided, two_sided = NormalDist().inv_cdf(0.95), NormalDist().inv_cdf(0.975)
    return PairedDifference(
        difference=math.fsum(_differences(first, second)) / len(first),
        low=tango_bound(gains, losses, size, two_sided),
        high=tango_bound(gains, losses, size, -two_sided),
        lower_bound=tango_bound(gains, losses, size, one_sided),
        upper_bound=tango_bound(gains, losses, size, -one_sided),
        n=len(first),
        n_effective=size,
    )


def lower_bound_among(difference: PairedDifference, number: int) -> float:
    """Return a one-sided lower bound of one of several differences: any of them is missed in at most 5 % of cases.

    Bonferroni's: each at 1 − 0.05 / number. Beyond the two-sided interval's 97.5 % it continues at the same rate per
    standard deviation.

    Args:
        difference: One of them.
        number: How many there are, at least 1.
    """
    if number == 1:
        return difference.lower_bound
    normal = NormalDist()
    reach = normal.inv_cdf(1 - 0.05 / number) / normal.inv_cdf(0.975)
    return difference.difference - reach * (difference.difference - difference.low)


def sign_flip_p(
    differences: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    draws: int = 10_000,
) -> float:
    """Return the one-sided p of a positive mean, by flipping signs of the prompts' differences at random.

    Several seeds of one model are averaged per prompt first, since they share the base's answers.

    Args:
        differences: One per prompt.
        clusters: Each prompt's cluster of near-duplicates: a cluster is flipped as a whole, since its members may
            agree. By default every prompt is flipped alone.
        seed: Seed of the random flips.
        draws: Number of flips; p is never below 1 / (draws + 1).

    Raises:
        ValueError: there are not as many clusters as differences.

    Source: Fisher's randomisation test; the +1 of Phipson and Smyth (2010) keeps it exact for random flips.
    """
    sums = cluster_sums(differences, clusters).sums
    values = sums[sums != 0.0]
    if values.size == 0:
        return 1.0
    generator = np.random.default_rng(seed)
    signs = generator.integers(0, 2, size=(draws, values.size), dtype=np.int8) * 2 - 1
    step = max(1, CELLS_AT_ONCE // values.size)
    observed = values.sum() - 1e-12
    as_large = sum(int(np.sum(signs[at : at + step] @ values >= observed)) for at in range(0, draws, step))
    return (1 + as_large) / (1 + draws)


def two_sided_flip_p(differences: Sequence[float], clusters: Sequence[Hashable] | None = None) -> float:
    """Two-sided p of no difference: twice the smaller of `sign_flip_p` in either direction."""
    up, down = sign_flip_p(differences, clusters), sign_flip_p([-value for value in differences], clusters)
    return min(1.0, 2 * min(up, down))


def check_margin(margin: float) -> None:
    """Check that a margin is a share.

    Raises:
        ValueError: it is not in (0, 1).
    """
    if not 0 < margin < 1:
        raise ValueError(f"a margin must be a share in (0, 1), such as 0.03 for 3 points: {margin}")


def _differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    if len(first) != len(second) or not len(first):
        raise ValueError(f"both sides need a value for every pair: {len(first)} and {len(second)}")
    return [a - b for a, b in zip(first, second, strict=True)]


def mean_interval(values: Sequence[float], intervals: Sequence[Interval], *, are_independent: bool = True) -> Interval:
    """Return the interval of the mean of estimates, from theirs: each side by the root of the sum of squares.

    Args:
        values: The estimates.
        intervals: Interval of each, all with one confidence; they may be asymmetric.
        are_independent: If not, the mean of the ends is used, which is valid for any dependence.

    Raises:
        ValueError: there are none, or not one interval for each value.

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
    """Return the mean of differences on several benchmarks with equal weights; bounds as in `mean_interval`.

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
    """Return p-values adjusted for their number: rejecting those below 0.05 gives any false rejection below 5 %.

    Args:
        p_values: One per test, in [0, 1]; they may be dependent.

    Source: Holm (1979), Scandinavian Journal of Statistics 6.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
