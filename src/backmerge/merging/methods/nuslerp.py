"""NuSLERP: spherical interpolation between two tuned models' deltas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from backmerge.merging.consensus import for_each, shifted, summed
from backmerge.merging.method import merge_method
from backmerge.merging.reductions import gram_of_deltas

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

COLINEAR = 1e-16  # value of 1 - cos² below which two deltas count as parallel
LEAST_LENGTH = 1e-7


def coefficients(gram: np.ndarray, /, *, lam: float = 1.0, weight: Sequence[float] = (1.0,)) -> list[float]:
    """Return λ times SLERP's weights of the two deltas.

    Args:
        gram: Inner products of the deltas, shape (2, 2).
        lam: Factor of both deltas.
        weight: Weight of each tuned model; the second's share of their sum is SLERP's parameter.
    """
    first, second = for_each(weight, 2)
    share = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    lengths = [max(math.sqrt(gram[i, i]), LEAST_LENGTH) for i in (0, 1)]
    cosine = max(-1.0, min(1.0, gram[0, 1] / (lengths[0] * lengths[1])))
    if 1 - cosine * cosine <= COLINEAR:
        return [lam * (1 - share), lam * share]
    angle = math.acos(cosine)
    return [lam * math.sin((1 - share) * angle) / math.sin(angle), lam * math.sin(share * angle) / math.sin(angle)]


@merge_method(
    has_exact_endpoints=False,
    is_idempotent=True,
    reductions=[gram_of_deltas],
    num_tuned=(2, 2),
    coefficients=coefficients,
    max_lam=math.inf,
)
def nuslerp(
    base: Tensor,
    tuned: Sequence[Tensor],
    statistics: Sequence[np.ndarray],
    /,
    *,
    lam: float = 1.0,
    weight: Sequence[float] = (1.0,),
) -> Tensor:
    """Base + lam · SLERP(tuned₁ - base, tuned₂ - base), at the second model's share of the weights.

    Each tensor is taken as one vector.

    Args:
        base: Any shape.
        tuned: Two models of the same shape.
        statistics: Inner products of the whole deltas.
        lam: Scale of the merged delta, 0 or more.
        weight: Weight of each tuned model.

    Source: mergekit's `nuslerp` with a base model and `nuslerp_flatten`, its defaults.
    """
    shares = coefficients(statistics[0], lam=lam, weight=weight)
    return shifted(base, summed((model - base for model in tuned), shares, lam=1.0, normalize=False))
