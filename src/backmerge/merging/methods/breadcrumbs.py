"""Model Breadcrumbs: each delta without its largest elements and without its smallest, then summed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from backmerge.merging.consensus import for_each, shifted, summed
from backmerge.merging.magnitudes import check_share, count_lower, count_upper, delta_of, thresholds
from backmerge.merging.method import merge_method

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

DENSITY, GAMMA = (0.9,), (0.01,)


def ranks(
    count: int, number: int, *, density: Sequence[float] = DENSITY, gamma: Sequence[float] = GAMMA, **_: Any
) -> list[int]:
    """The ranks of the smallest and of the largest magnitude that are kept, ascending from 0, of `count` elements."""
    share = density[number] if len(density) > 1 else density[0]
    outliers = gamma[number] if len(gamma) > 1 else gamma[0]
    check_share("density", share)
    check_share("gamma", outliers)
    num_kept, num_top = int(share * count), int(outliers * count)
    # fewer outliers go where otherwise too little would stay
    num_bottom = max(0, count - num_kept - num_top)
    return [min(num_bottom, count - 1), max(0, min(num_bottom + num_kept, count) - 1)]


def between(
    base: Tensor,
    tuned: Sequence[Tensor],
    statistics: Sequence[np.ndarray],
    density: Sequence[float],
    gamma: Sequence[float],
) -> list[Tensor]:
    """The deltas with zeros for what is too small or too large."""
    shares, outliers = for_each(density, len(tuned)), for_each(gamma, len(tuned))
    deltas = []
    for number, model in enumerate(tuned):
        delta = delta_of(base, model)
        count = int(statistics[0][number].sum())
        if int(shares[number] * count) == 0:
            delta.zero_()
        elif shares[number] < 1:
            least, most = thresholds(statistics, number, ranks(count, number, density=shares, gamma=outliers))
            size = delta.abs()
            delta.mul_((size >= least) & (size <= most))
        deltas.append(delta)
    return deltas


@merge_method(
    has_exact_endpoints=False,
    is_idempotent=True,
    reductions=[count_upper, count_lower(ranks)],
    num_tuned=(1, None),
    max_lam=math.inf,
)
def breadcrumbs(
    base: Tensor,
    tuned: Sequence[Tensor],
    statistics: Sequence[np.ndarray],
    /,
    *,
    lam: float = 1.0,
    weight: Sequence[float] = (1.0,),
    density: Sequence[float] = DENSITY,
    gamma: Sequence[float] = GAMMA,
    normalize: bool = False,
) -> Tensor:
    """Base + lam · Σ wᵢ·masked(tunedᵢ - base).

    Of each delta the `gamma` largest elements go, and then as many of the smallest as leave `density` of it, tensor by
    tensor. Elements as large as the last that is kept, at either end, are all kept, where mergekit picks some of them.

    Args:
        base: Any shape.
        tuned: One model or more, in the same shape.
        statistics: Counts of magnitudes over the whole tensor.
        lam: Scale of the merged delta, 0 or more.
        weight: Of each tuned model.
        density: Share of each delta that is kept, in [0, 1].
        gamma: Share of each delta that is dropped as outliers, in [0, 1].
        normalize: Divide by the sum of the weights.

    Raises:
        MergeError: `density` or `gamma` is outside [0, 1].

    Source: Davari and Belilovsky, Model Breadcrumbs (arXiv 2312.06795), section 3; defaults as mergekit recommends.
    """
    deltas = between(base, tuned, statistics, density, gamma)
    return shifted(base, summed(deltas, for_each(weight, len(tuned)), lam=lam, normalize=normalize))
