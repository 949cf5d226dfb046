"""TIES: trim each delta to its largest elements, elect a sign for each, and average those that agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from backmerge.merging.consensus import elected, for_each, shifted
from backmerge.merging.magnitudes import check_share, count_lower, count_upper, delta_of, thresholds
from backmerge.merging.method import merge_method

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

DENSITY = (0.2,)  # the paper's: the largest fifth


def ranks(count: int, number: int, *, density: Sequence[float] = DENSITY, **_: Any) -> list[int]:
    """The rank of the smallest magnitude that is kept, ascending from 0, of `count` elements."""
    share = density[number] if len(density) > 1 else density[0]
    check_share("density", share)
    return [count - min(count, max(1, int(share * count)))]


@merge_method(
    has_exact_endpoints=False,
    is_idempotent=True,
    reductions=[count_upper, count_lower(ranks)],
    num_tuned=(1, None),
    max_lam=math.inf,
)
def ties(
    base: Tensor,
    tuned: Sequence[Tensor],
    statistics: Sequence[np.ndarray],
    /,
    *,
    lam: float = 1.0,
    weight: Sequence[float] = (1.0,),
    density: Sequence[float] = DENSITY,
    normalize: bool = True,
) -> Tensor:
    """Base + lam · disjoint mean of trimmed wᵢ·(tunedᵢ - base).

    Of each delta the `density` largest elements are kept, tensor by tensor (the paper trims the whole model's at once);
    then for each element the sign of the weighted sum is elected, and those that have it are averaged. Elements as
    large as the smallest that is kept are all kept, where mergekit picks some of them.

    Args:
        base: Any shape.
        tuned: One model or more, in the same shape.
        statistics: Counts of magnitudes over the whole tensor.
        lam: Scale of the merged delta, 0 or more.
        weight: Of each tuned model.
        density: Share of each delta that is kept, in [0, 1].
        normalize: Divide by the sum of the weights that agree.

    Raises:
        MergeError: `density` is outside [0, 1].

    Source: Yadav et al., TIES-Merging (arXiv 2306.01708), section 3; `weight` as in mergekit.
    """
    kept = for_each(density, len(tuned))
    deltas = []
    for number, model in enumerate(tuned):
        delta = delta_of(base, model)
        if kept[number] <= 0:
            delta.zero_()
        elif kept[number] < 1:
            count = int(statistics[0][number].sum())
            (least,) = thresholds(statistics, number, ranks(count, number, density=kept))
            delta.mul_(delta.abs() >= least)
        deltas.append(delta)
    return shifted(base, elected(deltas, for_each(weight, len(tuned)), lam=lam, normalize=normalize))
