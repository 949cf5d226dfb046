"""The effect of a LoRA on one tensor: its factors, their scale, and the sum, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from backmerge.checkpoints.layout import Region

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

EMBEDDING_A = ".lora_embedding_A"


class Factors(NamedTuple):
    """The names of one tensor's low-rank delta, scale · B·A.

    Attributes:
        a: Tensor name of A, shape (r, in); for stacked experts (experts·r, in), expert by expert.
        b: Tensor name of B, shape (out, r); for stacked experts (out, r·experts), rank by rank.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
        is_transposed: Whether the weight is stored (in, out): embeddings, Conv1D layers, the experts of some models.
        magnitude: Tensor name of DoRA's magnitudes, shape (out,); `None` for other kinds.
        region: The tensor's part of the adapted parameter, if it is not the whole or has stacked experts.
    """

    a: str
    b: str
    scale: float
    is_transposed: bool = False
    magnitude: str | None = None
    region: Region | None = None

    @property
    def is_embedding(self) -> bool:
        """Return whether they belong to an embedding; peft has other names for its factors."""
        return self.a.endswith(EMBEDDING_A)


def _products(
    factors: Factors, a: np.ndarray, b: np.ndarray, first: int, last: int
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Yield the two matrices whose product is the unscaled delta of some rows, with the first and last of these rows.

    A tensor of stacked experts has the rows of one expert after those of the other.
    """
    region = factors.region
    if region is None:
        left, right = (a.T, b.T) if factors.is_transposed else (b, a)
        yield first, last, left[first:last], right
        return
    rank = len(a) // region.num_experts
    for number in range(first // region.rows, -(-last // region.rows)):
        expert = region.first + number
        own_a, own_b = a[expert * rank : (expert + 1) * rank], b[:, expert :: region.num_experts]
        left, right = (own_a.T, own_b.T) if factors.is_transposed else (own_b, own_a)
        begin, end = max(first, number * region.rows), min(last, (number + 1) * region.rows)
        shift = region.start - number * region.rows
        yield begin, end, left[begin + shift : end + shift], right


def tuned_rows(weight: Tensor, factors: Factors, a: np.ndarray, b: np.ndarray, first: int) -> Tensor:
    """Return W + scale·B·A, in float32, for some rows of a weight.

    Args:
        weight: Rows `first` and following, shape (rows, columns).
        factors: Factors of the whole weight.
        a: The tensor A (see `Factors`).
        b: The tensor B (see `Factors`).
        first: The first row.
    """
    import torch

    tuned = []
    for begin, end, left, right in _products(factors, a, b, first, first + weight.shape[0]):
        delta = torch.from_numpy(left).to(weight.device) @ torch.from_numpy(right).to(weight.device)
        tuned.append(weight[begin - first : end - first].float() + factors.scale * delta)
    return tuned[0] if len(tuned) == 1 else torch.cat(tuned)


def rescaled_rows(rows: Tensor, magnitudes: np.ndarray) -> Tensor:
    """Return DoRA's weight: m · V / ‖V‖ row by row, V = W + scale·B·A.

    Args:
        rows: V, shape (rows, columns).
        magnitudes: m of these rows, shape (rows,).

    Source: Liu et al., DoRA (arXiv 2402.09353), equation 5; norms are over the inputs of each output, as in peft.
    """
    import torch

    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    factors: Tensor = torch.from_numpy(magnitudes).to(rows.device).unsqueeze(1) / norms
    return rows * factors
