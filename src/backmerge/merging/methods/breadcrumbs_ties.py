"""Model Breadcrumbs with TIES' election of signs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from backmerge.merging.consensus import elected, for_each, shifted
from backmerge.merging.magnitudes import count_lower, count_upper
from backmerge.merging.method import merge_method
from backmerge.merging.methods.breadcrumbs import DENSITY, GAMMA, between, ranks

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@merge_method(
    has_exact_endpoints=False,
    is_idempotent=True,
    reductions=[count_upper, count_lower(ranks)],
    num_tuned=(1, None),
    max_lam=math.inf,
)
def breadcrumbs_ties(
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
    """Base + lam · Σ of those wᵢ·masked(tunedᵢ - base) whose sign is elected.

    Args:
        base: Any shape.
        tuned: One model or more, in the same shape.
        statistics: Counts of magnitudes over the whole tensor.
        lam: Scale of the merged delta, 0 or more.
        weight: Of each tuned model.
        density: Share of each delta that is kept, in [0, 1].
        gamma: Share of each delta that is dropped as outliers, in [0, 1].
        normalize: Divide by the sum of the weights that agree.

    Raises:
        MergeError: `density` or `gamma` is outside [0, 1].

    Source: masks of Davari and Belilovsky (arXiv 2312.06795), election of Yadav et al. (arXiv 2306.01708); mergekit's
    `breadcrumbs_ties`.
    """
    deltas = between(base, tuned, statistics, density, gamma)
    return shifted(base, elected(deltas, for_each(weight, len(tuned)), lam=lam, normalize=normalize))
