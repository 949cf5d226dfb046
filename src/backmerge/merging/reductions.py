"""Sums over a tensor that do not depend on the number of threads: in float64, over fixed blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 1 << 20  # elements summed at once, and the unit in which tensors are read
PART = 1 << 17  # elements that are widened at once
GRAM_PART = 1 << 18  # elements of each tensor in one step of inner products: fewer calls, still in the cache
ROW = 1 << 12  # elements whose float32 products are summed before the sum continues in float64
GRAM_ROW = 1 << 9  # the same for all inner products of several tensors at once


def inner(first: Tensor, second: Tensor, scratch: Tensor | None = None) -> float:
    """Return the inner product of two vectors, independent of the number of threads.

    Float64 products are summed by numpy's `einsum`, in one order; float32 products in rows of 2^12, each summed by one
    thread, and the sums are added in float64. On devices other than the CPU float64 sums are left to torch, and may
    differ in their last bits.

    Args:
        first: Any shape.
        second: The same shape.
        scratch: A buffer for products, with the same shape and dtype.
    """
    import torch

    if first.element_size() == 8:
        if first.device.type != "cpu":
            return float(first @ second)
        return float(np.einsum("i,i->", first.numpy(), second.numpy()))
    whole = first.numel() // ROW * ROW
    products = torch.mul(first, second, out=scratch)
    sums = products[:whole].view(-1, ROW).sum(1).double().cpu().numpy()
    found = float(sums.sum()) + float(products[whole:].sum())
    return found if math.isfinite(found) else inner(first.double(), second.double())


def gram(vectors: Sequence[Tensor]) -> np.ndarray:
    """Return the inner products of some vectors with each other, shape (vectors, vectors), in float64.

    Args:
        vectors: All of one shape, (elements,), and one dtype, float32 or float64.
    """
    return _gram(vectors, vectors[0].dtype, of_deltas=False)


def gram_of_models(base: Tensor, tuned: Tensor | Sequence[Tensor], /) -> np.ndarray:
    """Return the inner products of base and tuned models, the base first, shape (1 + tuned, 1 + tuned)."""
    return _gram_of(base, tuned, of_deltas=False)


def gram_of_deltas(base: Tensor, tuned: Tensor | Sequence[Tensor], /) -> np.ndarray:
    """Return the inner products of the tuned models' deltas, shape (tuned, tuned).

    The deltas are computed first: as differences of inner products they would be lost to cancellation.
    """
    return _gram_of(base, tuned, of_deltas=True)


def _gram_of(base: Tensor, tuned: Tensor | Sequence[Tensor], *, of_deltas: bool) -> np.ndarray:
    """Return inner products: of 16-bit models in float32, in which their products are exact; of others in float64."""
    import torch

    models = [model.reshape(-1) for model in (base, *(tuned if isinstance(tuned, Sequence) else [tuned]))]
    is_short = all(model.element_size() == 2 for model in models)
    found = _gram(models, torch.float32 if is_short else torch.float64, of_deltas=of_deltas)
    # squares beyond float32's range
    return found if np.isfinite(found).all() else _gram(models, torch.float64, of_deltas=of_deltas)


def _gram(vectors: Sequence[Tensor], dtype: torch.dtype, *, of_deltas: bool) -> np.ndarray:
    """Return all inner products from one pass: small matrix products over rows of 2^9 elements, added in float64.

    Each row's product is computed by one thread, so that the result does not depend on their number.

    Args:
        vectors: All of one shape, (elements,).
        dtype: The dtype that they are widened to and multiplied in.
        of_deltas: Whether the first is subtracted from the others, and only these are multiplied.
    """
    import torch

    total, skipped = vectors[0].numel(), int(of_deltas)
    length = min(GRAM_PART, -(-total // GRAM_ROW) * GRAM_ROW)
    wide = vectors[0].new_empty((len(vectors), length), dtype=dtype)
    found = np.zeros((len(vectors) - skipped,) * 2)
    for start in range(0, total, GRAM_PART):
        count = min(GRAM_PART, total - start)
        wide[:, count:] = 0  # the last part's end adds nothing
        for row, vector in zip(wide, vectors, strict=True):
            row[:count] = vector[start : start + count]
        if of_deltas:
            wide[1:] -= wide[0]
        rows = wide[skipped:].view(len(found), -1, GRAM_ROW).transpose(0, 1)
        found += torch.bmm(rows, rows.transpose(1, 2)).cpu().double().sum(0).numpy()
    return np.tril(found) + np.tril(found, -1).T  # the two halves may be summed in different orders


def in_blocks(given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the same data block by block: tensors are flattened and cut, everything else is passed on."""
    total = given["base"].numel()
    for start in range(0, total, BLOCK) if total else [0]:
        yield {name: _cut(value, start) for name, value in given.items()}


def _cut(value: Any, start: int) -> Any:
    if isinstance(value, (list, tuple)) and value and hasattr(value[0], "numel"):
        return [_cut(tensor, start) for tensor in value]
    return value.reshape(-1)[start : start + BLOCK] if hasattr(value, "numel") else value
