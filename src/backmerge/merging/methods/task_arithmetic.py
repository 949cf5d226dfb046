"""Task arithmetic: the sum of several models' deltas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from backmerge.merging.consensus import NO_WEIGHT, for_each, shifted, summed
from backmerge.merging.method import merge_method

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def coefficients(
    gram: np.ndarray, /, *, lam: float = 1.0, weight: Sequence[float] = (1.0,), normalize: bool = False
) -> list[float]:
    """lam·wᵢ for each delta, divided by Σ wᵢ if asked for."""
    weights = for_each(weight, len(gram))
    divisor = sum(weights) if normalize and abs(sum(weights)) >= NO_WEIGHT else 1.0
    return [lam * one / divisor for one in weights]


@merge_method(
    has_exact_endpoints=False,
    is_idempotent=True,
    num_tuned=(1, None),
    coefficients=coefficients,
    max_lam=math.inf,
)
def task_arithmetic(
    base: Tensor,
    tuned: Sequence[Tensor],
    /,
    *,
    lam: float = 1.0,
    weight: Sequence[float] = (1.0,),
    normalize: bool = False,
) -> Tensor:
    """Base + lam · Σ wᵢ·(tunedᵢ - base).

    Args:
        base: Any shape.
        tuned: One model or more, in the same shape.
        lam: Scale of the sum, 0 or more; with one tuned model of weight 1, the share of the tuned side.
        weight: Of each tuned model.
        normalize: Divide by the sum of the weights.

    Source: Ilharco et al., Editing models with task arithmetic (arXiv 2212.04089), section 2.
    """
    weights = for_each(weight, len(tuned))
    return shifted(base, summed((model - base for model in tuned), weights, lam=lam, normalize=normalize))
