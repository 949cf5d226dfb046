"""Thresholds of magnitude, exact over tensors of any size: a radix select whose counts are sums over blocks.

The bits of |x|, of a float32 x, rise with |x|. So the element of a given rank is found by counting twice: first how
many elements have each value of their upper 16 bits, then, within the one that holds the rank, of the lower 15. Counts
are sums, exact in any order, and no tensor is ever sorted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from backmerge.errors import MergeError
from backmerge.merging.consensus import for_each

if TYPE_CHECKING:
    from torch import Tensor

LOWER_BITS = 15
NUM_UPPER, NUM_LOWER = 1 << 16, 1 << LOWER_BITS

# from the number of elements and a method's parameters for one tuned model to the ranks that bound what is kept
Ranks = Callable[..., Sequence[int]]


def check_share(name: str, share: float) -> None:
    """Refuse what is no share of a delta's elements, such as a percentage.

    Raises:
        MergeError: it is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise MergeError(
            f"{name} is {share}, and must be in [0, 1]: a share of each delta", remedy=f"such as {name}=0.5."
        )


def delta_of(base: Tensor, tuned: Tensor) -> Tensor:
    """Tuned - base in float32, in which it is counted and compared."""
    return tuned.float() - base.float()


def count_upper(base: Tensor, tuned: Sequence[Tensor], /) -> np.ndarray:
    """How many elements of each delta have each value of their upper bits, shape (tuned, 65536)."""
    return np.stack([_counts(_bits(delta_of(base, model)) >> LOWER_BITS, NUM_UPPER) for model in tuned])


def count_lower(ranks: Ranks) -> Callable[..., np.ndarray]:
    """The second reduction: for each delta and each of its ranks, the counts of the lower bits, (tuned, ranks, 32768).

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
    """The magnitudes at those ranks of one tuned model's delta.

    Args:
        statistics: Of `count_upper` and `count_lower`, over the whole tensor.
        number: Of the tuned model.
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
    """The bin that holds a rank, and the rank within it."""
    ends = np.cumsum(counts)
    which = int(np.searchsorted(ends, rank, side="right"))
    return which, rank - int(ends[which - 1] if which else 0)
