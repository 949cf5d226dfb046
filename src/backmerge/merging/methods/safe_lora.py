"""Safe LoRA: project a delta onto the directions of alignment if tuning moved away from them."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from backmerge.errors import MergeError
from backmerge.merging.consensus import shifted
from backmerge.merging.method import Survey, merge_method
from backmerge.merging.reductions import BLOCK, gram

if TYPE_CHECKING:
    from torch import Tensor


def projected(base: Tensor, delta: Tensor, unaligned: Tensor) -> Tensor | None:
    """Return C·Δ with C = V·Vᵀ/‖V‖_F, V = base - unaligned; `None` if V or Δ is zero or not a matrix.

    Args:
        base: Shape (out, in).
        delta: Same shape.
        unaligned: Same shape.
    """
    if delta.ndim != 2 or not bool(delta.any()):
        return None
    alignment = base - unaligned
    length = math.sqrt(_products(alignment)[0, 0])
    if length == 0:
        return None
    rows, columns = alignment.shape
    # of the two orders of multiplication, the one through the smaller square matrix
    moved = alignment @ alignment.T @ delta if rows <= columns else alignment @ (alignment.T @ delta)
    return moved / length


def cosine(first: Tensor, second: Tensor) -> float:
    """Return the cosine of two tensors taken as vectors; 0 if one of them is zero."""
    products = _products(first, second)
    lengths = math.sqrt(products[0, 0]) * math.sqrt(products[1, 1])
    return float(products[0, 1]) / lengths if lengths > 0 else 0.0


def _products(*tensors: Tensor) -> np.ndarray:
    """Return inner products of tensors taken as vectors, float64, block by block: no wide copy of the whole."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    starts = range(0, max(flat[0].numel(), 1), BLOCK)
    parts = [gram([vector[start : start + BLOCK].double() for vector in flat]) for start in starts]
    return np.asarray(functools.reduce(np.add, parts))


def alignment_cosine(base: Tensor, tuned: Tensor, unaligned: Tensor, /) -> float:
    """Return the cosine between a delta and its projection; NaN if there is no projection."""
    delta = tuned - base
    moved = projected(base, delta, unaligned)
    return math.nan if moved is None else cosine(moved, delta)


def least_aligned(measured: Mapping[str, float], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Turn `num_layers` into thresholds that the tensors with the smallest cosines meet, and no others.

    Raises:
        MergeError: `num_layers` is not a number of tensors.
    """
    count = given["num_layers"]
    if not isinstance(count, int) or count < 0:
        raise MergeError(f"num_layers is {count}, and must be a number of tensors", remedy="for example 10.")
    found = sorted((value, name) for name, value in measured.items() if not math.isnan(value))
    # outside the range of a cosine on either side: always met, never met
    return {**given, "threshold": {**{name: 2.0 for _, name in found[:count]}, "rest": -2.0}}


@merge_method(
    has_exact_endpoints=False,
    is_idempotent=True,
    cut="tensor",
    survey=Survey(alignment_cosine, least_aligned, lambda given: given.get("num_layers") is not None),
)
def safe_lora(
    base: Tensor,
    tuned: Tensor,
    unaligned: Tensor,
    /,
    *,
    lam: float = 1.0,
    threshold: float = 0.5,
    num_layers: int | None = None,  # noqa: ARG001 - has become thresholds by then
) -> Tensor:
    """Base + lam·C·Δ if cos(C·Δ, Δ) ≤ threshold, else base + lam·Δ; C = V·Vᵀ/‖V‖_F, V = base - unaligned.

    Needs another model, `unaligned`: the pretrained model before alignment; in the paper Llama-2 for Llama-2-chat. No
    data are needed. Only matrices are projected; a delta of zero stays zero. C is not idempotent: it is the paper's
    approximation of the projection, which also shortens.

    Args:
        base: The aligned model, any shape.
        tuned: Same shape.
        unaligned: Same shape.
        lam: Share of the tuned side, in [0, 1].
        threshold: Cosine up to which a delta is projected.
        num_layers: If given, project this many tensors, those with the smallest cosines, instead of using `threshold`.

    Source: Hsu et al., Safe LoRA (arXiv 2405.16833), section 3; ours projects any delta, from LoRA or not.
    """
    delta = tuned - base
    moved = projected(base, delta, unaligned)
    if moved is not None and cosine(moved, delta) <= threshold:
        delta = moved
    return shifted(base, delta * lam)
