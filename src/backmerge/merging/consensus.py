"""Several deltas as one: weighted sums, with or without an election of signs; shared by the task-vector methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from backmerge.errors import MergeError

if TYPE_CHECKING:
    from torch import Tensor

NO_WEIGHT = 1e-8  # a sum of weights below this divides nothing, as in mergekit


def for_each(values: Sequence[float], num_tuned: int) -> tuple[float, ...]:
    """A value for each tuned model: one that is given alone is every model's.

    Raises:
        MergeError: there are as many as neither one nor the models.
    """
    if len(values) == 1:
        return tuple(values) * num_tuned
    if len(values) != num_tuned:
        raise MergeError(
            f"{len(values)} values for {num_tuned} tuned models", remedy="give one for all, or one for each."
        )
    return tuple(values)


def shifted(base: Tensor, delta: Tensor) -> Tensor:
    """Base + delta, and the base's own bits where the delta is zero; the delta is used up.

    −0.0 + 0.0 would be 0.0, but −0.0 - 0.0 is −0.0; so the negative is subtracted, and its zeros are made positive.
    """
    return base - delta.neg_().add_(0.0)


def summed(deltas: Iterable[Tensor], weights: Sequence[float], *, lam: float, normalize: bool) -> Tensor:
    """The sum lam · Σ wᵢ·δᵢ, divided by Σ wᵢ if asked for.

    Args:
        deltas: Of any shape, all alike; taken one after the other.
        weights: One for each.
        lam: What the sum is multiplied by.
        normalize: Whether it is a mean rather than a sum.
    """
    factor = lam / sum(weights) if normalize and abs(sum(weights)) >= NO_WEIGHT else lam
    pairs = zip(deltas, weights, strict=True)
    delta, weight = next(pairs)
    total = delta * weight
    for delta, weight in pairs:
        total.add_(delta, alpha=weight)
    return total if factor == 1 else total.mul_(factor)


def elected(deltas: Iterable[Tensor], weights: Sequence[float], *, lam: float, normalize: bool) -> Tensor:
    """The sum lam · Σ of those wᵢ·δᵢ whose sign is that of the sum of all, divided by their Σ wᵢ if asked for.

    A sum of zero counts as positive, and a delta of zero agrees with nobody.

    Args:
        deltas: Of any shape, all alike.
        weights: One for each.
        lam: What the sum is multiplied by.
        normalize: Whether it is the mean of those that agree rather than their sum.

    Source: Yadav et al., TIES-Merging (arXiv 2306.01708), section 3, "elect sign" and "disjoint merge".
    """
    weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    total = weighted[0].clone()
    for delta in weighted[1:]:
        total.add_(delta)
    is_positive = total >= 0
    agreeing, divisor = total.zero_(), weighted[0].new_zeros(total.shape)
    for delta, weight in zip(weighted, weights, strict=True):
        agrees = ((delta > 0) & is_positive) | ((delta < 0) & ~is_positive)
        agreeing.addcmul_(delta, agrees.to(delta.dtype))
        divisor.add_(agrees, alpha=weight)
    if normalize:
        agreeing.div_(divisor.masked_fill_(divisor == 0, 1.0))
    return agreeing.mul_(lam)
