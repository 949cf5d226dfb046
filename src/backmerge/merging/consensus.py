"""Combine several deltas: weighted sums, with or without an election of signs; shared by the task-vector methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from backmerge.errors import MergeError

if TYPE_CHECKING:
    from torch import Tensor

NO_WEIGHT = 1e-8  # below this a sum of weights is not used as a divisor, as in mergekit


def for_each(values: Sequence[float], num_tuned: int) -> tuple[float, ...]:
    """Return a value for each tuned model; a single value counts for every model.

    Raises:
        MergeError: there is neither one value nor one for each model.
    """
    if len(values) == 1:
        return tuple(values) * num_tuned
    if len(values) != num_tuned:
        raise MergeError(
            f"{len(values)} values for {num_tuned} tuned models", remedy="give one for all, or one for each model."
        )
    return tuple(values)


def shifted(base: Tensor, delta: Tensor) -> Tensor:
    """Return base + delta, with the base's own bits where the delta is zero; overwrites the delta.

    −0.0 + 0.0 would be 0.0, but −0.0 - 0.0 is −0.0; so the negative is subtracted, and its zeros are made positive.
    """
    return base - delta.neg_().add_(0.0)


def summed(deltas: Iterable[Tensor], weights: Sequence[float], *, lam: float, normalize: bool) -> Tensor:
    """Return lam · Σ wᵢ·δᵢ, divided by Σ wᵢ if `normalize` is set.

    Args:
        deltas: Any shape, the same for all; consumed one by one.
        weights: One for each delta.
        lam: Factor of the sum.
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
    """Return lam · Σ of those wᵢ·δᵢ whose sign is that of the sum of all, divided by their Σ wᵢ if `normalize` is set.

    A sum of zero counts as positive, and a delta of zero agrees with no sign.

    Args:
        deltas: Any shape, the same for all.
        weights: One for each delta.
        lam: Factor of the sum.
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


def where(mask: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return `first` where the mask is true and `second` elsewhere, bit for bit.

    On random masks torch.where mispredicts a branch at every other element; selecting by bits takes a fifteenth of the
    time.

    Args:
        mask: Boolean, any shape.
        first: Same shape, of any dtype of 16, 32 or 64 bits.
        second: Same shape and dtype.
    """
    import torch

    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    ours, theirs = first.contiguous().view(whole), second.contiguous().view(whole)
    chosen = (ours ^ theirs).bitwise_and_(mask.to(whole).neg_()).bitwise_xor_(theirs)
    return chosen.view(first.dtype)


LOWER_BITS = 15
NUM_UPPER, NUM_LOWER = 1 << 16, 1 << LOWER_BITS

# from the number of elements and a method's parameters for one tuned model to the ranks that limit what is kept
Ranks = Callable[..., Sequence[int]]


def check_share(name: str, share: float) -> None:
    """Refuse a value that is not a share of a delta's elements, such as a percentage.

    Raises:
        MergeError: it is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise MergeError(
            f"{name} is {share}, and must be in [0, 1]: it is a share of each delta's elements",
            remedy=f"for example {name}=0.5.",
        )


def delta_of(base: Tensor, tuned: Tensor) -> Tensor:
    """Return tuned - base in float32, the dtype in which it is counted and compared."""
    return tuned.float() - base.float()


def count_upper(base: Tensor, tuned: Sequence[Tensor], /) -> np.ndarray:
    """Count how many elements of each delta have each value of their upper bits; shape (tuned, 65536)."""
    return np.stack([_counts(_bits(delta_of(base, model)) >> LOWER_BITS, NUM_UPPER) for model in tuned])


def count_lower(ranks: Ranks) -> Callable[..., np.ndarray]:
    """Make the second reduction: the counts of the lower bits for each delta and each rank, (tuned, ranks, 32768).

    Args:
        ranks: `f(number of elements, *, parameters of the method)`: ascending ranks from 0.
    """
    taken = inspect.signature(ranks).parameters

    def count(base: Tensor, tuned: Sequence[Tensor], statistics: Sequence[np.ndarray], /, **given: Any) -> np.ndarray:
        found = []
        own = {name: for_each(each, len(tuned)) for name, each in given.items() if name in taken}
        for number, model in enumerate(tuned):
            bits = _bits(delta_of(base, model))
            upper = bits >> LOWER_BITS
            counts = statistics[0][number]
            wanted = ranks(int(counts.sum()), **{name: each[number] for name, each in own.items()})
            bins = [_located(counts, rank)[0] for rank in wanted]
            found.append([_counts(bits[upper == which] & (NUM_LOWER - 1), NUM_LOWER) for which in bins])
        return np.array(found)

    return count


def thresholds(statistics: Sequence[np.ndarray], number: int, ranks: Sequence[int]) -> list[float]:
    """Return the magnitudes at those ranks in one tuned model's delta.

    Args:
        statistics: Results of `count_upper` and `count_lower`, over the whole tensor.
        number: The tuned model's number.
        ranks: The same as in `count_lower`.
    """
    found = []
    for place, rank in enumerate(ranks):
        upper, left = _located(statistics[0][number], rank)
        lower, _ = _located(statistics[1][number][place], left)
        found.append(float(np.uint32(upper << LOWER_BITS | lower).view(np.float32)))
    return found


def _bits(delta: Tensor) -> Tensor:
    import torch

    return delta.abs().reshape(-1).view(torch.int32)


def _counts(bits: Tensor, length: int) -> np.ndarray:
    return np.asarray(bits.bincount(minlength=length).cpu().numpy())


def _located(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """Return the bin that contains a rank, and the rank within it."""
    ends = np.cumsum(counts)
    which = int(np.searchsorted(ends, rank, side="right"))
    return which, rank - int(ends[which - 1] if which else 0)
