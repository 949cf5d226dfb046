"""Multi-SLERP: the mean direction of several deltas, at their mean length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from backmerge.errors import MergeError
from backmerge.merging.consensus import NO_WEIGHT, for_each, shifted, summed
from backmerge.merging.method import merge_method
from backmerge.merging.reductions import gram_of_deltas

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-8


def coefficients(gram: np.ndarray, /, *, lam: float = 1.0, weight: Sequence[float] = (1.0,)) -> list[float]:
    """Return λ times each delta's share of the mean direction, scaled to the mean length.

    Args:
        gram: Inner products of the deltas, shape (tuned, tuned).
        lam: Factor of all deltas.
        weight: Weight of each tuned model; they are divided by their sum.

    Raises:
        MergeError: the weights, or the directions, add up to zero.
    """
    weights = np.array(for_each(weight, len(gram)))
    if abs(weights.sum()) < NO_WEIGHT:
        raise MergeError("the weights of multislerp add up to zero", remedy="give other weights.")
    weights = weights / weights.sum()
    lengths = np.sqrt(np.diag(gram))
    shares = weights / (lengths + TINY)  # the mean of the unit vectors, in terms of the deltas
    length = math.sqrt(max(float(shares @ gram @ shares), 0.0))
    if length < TINY:
        if len(gram) > 2 and lengths.any():
            raise MergeError(
                "the directions of the deltas add up to zero, so they have no mean direction",
                remedy="give other weights.",
            )
        return [float(lam * one) for one in weights]
    return [float(one) for one in lam * float(weights @ lengths) / length * shares]


@merge_method(
    has_exact_endpoints=False,
    is_idempotent=True,
    reductions=[gram_of_deltas],
    num_tuned=(2, None),
    coefficients=coefficients,
    max_lam=math.inf,
)
def multislerp(
    base: Tensor,
    tuned: Sequence[Tensor],
    statistics: Sequence[np.ndarray],
    /,
    *,
    lam: float = 1.0,
    weight: Sequence[float] = (1.0,),
) -> Tensor:
    """Base + lam · (Σ wᵢ·‖δᵢ‖) · m / ‖m‖, m = Σ wᵢ·δᵢ/‖δᵢ‖, δᵢ = tunedᵢ - base.

    mergekit's formula then moves along the weighted mean of the tangents at m, which is zero; ours omits that step.
    Each tensor is taken as one vector; two opposite deltas are interpolated linearly.

    Args:
        base: Any shape.
        tuned: Two models or more, of the same shape.
        statistics: Inner products of the whole deltas.
        lam: Scale of the merged delta, 0 or more.
        weight: Weight of each tuned model; they are divided by their sum.

    Raises:
        MergeError: the directions, or the weights, add up to zero.

    Source: mergekit's `multislerp` with a base model.
    """
    shares = coefficients(statistics[0], lam=lam, weight=weight)
    return shifted(base, summed((model - base for model in tuned), shares, lam=1.0, normalize=False))
