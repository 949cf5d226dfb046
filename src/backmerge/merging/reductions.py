"""Sums over a tensor that no thread count changes: in float64, over fixed blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 20  # elements summed at once, and the unit in which tensors are read
PART = 1 << 17  # elements that are widened at once
ROW = 1 << 12  # elements whose float32 products are summed before float64 takes over


def inner(first: Tensor, second: Tensor, scratch: Tensor | None = None) -> float:
    """Inner product of two vectors, whatever the number of threads.

    Float64 products are summed by numpy's `einsum`, in one order; float32 products in rows of 2^12, each summed by one
    thread, whose sums are added in float64. On another device than the CPU float64 is left to torch, and may differ in
    its last bits.

    Args:
        first: Any shape.
        second: The same.
        scratch: Where products may be put, in the same shape and dtype.
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
    """Inner products of some vectors with each other, shape (vectors, vectors), in float64."""
    found = np.zeros((len(vectors), len(vectors)))
    scratch = vectors[0].new_empty(vectors[0].shape)
    for i, first in enumerate(vectors):
        for j, second in enumerate(vectors[: i + 1]):
            found[i, j] = found[j, i] = inner(first, second, scratch)
    return found


def gram_of_models(base: Tensor, tuned: Tensor | Sequence[Tensor], /) -> np.ndarray:
    """Inner products of base and tuned models, the base first, shape (1 + tuned, 1 + tuned)."""
    return _sum([gram(models) for models in _widened(base, tuned)])


def gram_of_deltas(base: Tensor, tuned: Tensor | Sequence[Tensor], /) -> np.ndarray:
    """Inner products of the tuned models' deltas, shape (tuned, tuned).

    The deltas are taken first: as differences of inner products they would be lost to cancellation.
    """
    return _sum([gram([model.sub_(origin) for model in models]) for origin, *models in _widened(base, tuned)])


def _sum(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.asarray(functools.reduce(np.add, parts))


def _widened(base: Tensor, tuned: Tensor | Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Base and tuned models, a part that a core's cache holds at a time, as sums are taken of them.

    Those of 16 bits in float32, in which their products are exact; others in float64. They are the caller's own.
    """
    import torch

    models = [model.reshape(-1) for model in (base, *(tuned if isinstance(tuned, Sequence) else [tuned]))]
    is_short = all(model.element_size() == 2 for model in models)
    total = base.numel()
    for start in range(0, max(total, 1), PART):
        parts = [model[start : start + PART] for model in models]
        yield [part.float() if is_short else part.to(torch.float64, copy=True) for part in parts]


def in_blocks(given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The same data, block by block: tensors are flattened and cut, all else is passed on."""
    total = given["base"].numel()
    for start in range(0, total, BLOCK) if total else [0]:
        yield {name: _cut(value, start) for name, value in given.items()}


def _cut(value: Any, start: int) -> Any:
    if isinstance(value, (list, tuple)) and value and hasattr(value[0], "numel"):
        return [_cut(tensor, start) for tensor in value]
    return value.reshape(-1)[start : start + BLOCK] if hasattr(value, "numel") else value
