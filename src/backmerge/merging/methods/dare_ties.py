"""DARE with TIES' election of signs: each delta loses a random part, and those of the elected sign are summed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from backmerge.merging.consensus import elected, for_each, shifted
from backmerge.merging.method import merge_method
from backmerge.merging.methods.dare_linear import check_drop

if TYPE_CHECKING:
    from torch import Tensor

    from backmerge.merging.randomness import TensorRandom


@merge_method(has_exact_endpoints=False, is_idempotent=True, num_tuned=(1, None), max_lam=math.inf)
def dare_ties(
    base: Tensor,
    tuned: Sequence[Tensor],
    rng: TensorRandom,
    /,
    *,
    lam: float = 1.0,
    weight: Sequence[float] = (1.0,),
    drop: Sequence[float] = (0.5,),
    normalize: bool = False,
) -> Tensor:
    """Base + lam · Σ of those wᵢ·mᵢ∘(tunedᵢ - base)/(1 - dropᵢ) whose sign is elected.

    mᵢ keeps each element with probability 1 - dropᵢ, and the rest is rescaled by 1/(1 - dropᵢ) as in the paper;
    mergekit rescales to the delta's L1 norm instead.

    Args:
        base: Any shape.
        tuned: One model or more, in the same shape.
        rng: Draws the masks, a stream for each tuned model.
        lam: Scale of the merged delta, 0 or more.
        weight: Of each tuned model.
        drop: Probability of dropping an element of each delta, in [0, 1).
        normalize: Divide by the sum of the weights that agree.

    Raises:
        MergeError: `drop` is outside [0, 1).

    Source: Yu et al. (arXiv 2311.03099), equation 2; election of Yadav et al. (arXiv 2306.01708), section 3.
    """
    drops = for_each(drop, len(tuned))
    deltas = []
    for stream, model in enumerate(tuned):
        check_drop(drops[stream])
        kept = rng.keeps(base, 1 - drops[stream], stream=stream)
        deltas.append((model - base).mul_(kept).div_(1 - drops[stream]))
    return shifted(base, elected(deltas, for_each(weight, len(tuned)), lam=lam, normalize=normalize))
