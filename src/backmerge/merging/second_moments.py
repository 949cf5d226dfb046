"""Second moments of inputs, gathered in bounded memory: exact up to a number of directions, then the largest ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from backmerge.merging.inputs import LayerInputs

MAX_DIRECTIONS = 1024
NOISE = 1e-9  # share of the largest variance: below it a direction is not distinguished from the others


class SecondMoments:
    """Gather the mean of x·xᵀ over inputs x, as at most `max_directions` directions and the trace.

    For inputs of up to 2·max_directions elements the whole matrix is summed: products in float32 for the inputs of one
    call, and their sums in float64. For longer inputs at most 2·max_directions rows of float32 are kept: when they are
    full, they are replaced by their leading directions. So the result is exact, within rounding, for short inputs and
    for few inputs; otherwise it is that of incremental principal components, with an exact trace.

    Memory, in bytes: 8·width² for up to 2·max_directions elements, else 8·max_directions·width.

    Args:
        width: Elements of an input, d.
        max_directions: Number of directions to keep.

    Source: Ross et al., Incremental learning for robust visual tracking (2008), without the mean, for the update;
    Tipping and Bishop, Probabilistic principal component analysis (1999), for the equal share of the rest.
    """

    def __init__(self, width: int, max_directions: int = MAX_DIRECTIONS) -> None:
        self.width = width
        self._limit = min(width, max_directions)
        self._trace = 0.0
        self._sum: Tensor | None = None
        self._rows: list[Tensor] = []
        self._num_rows = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs, shape (inputs, width), in their order."""
        rows = inputs.detach().to(torch.float32)
        if rows.device.type == "mps":  # which has no float64
            rows = rows.cpu()
        self._trace += float(rows.double().square_().sum())
        if self.width <= 2 * self._limit:
            products = (rows.T @ rows).double()
            self._sum = products if self._sum is None else self._sum.add_(products)
            return
        for start in range(0, len(rows), self._limit):
            part = rows[start : start + self._limit]
            if self._num_rows + len(part) > 2 * self._limit:
                self._rows = [self._leading(torch.float32)[0]]
                self._num_rows = len(self._rows[0])
            self._rows.append(part.clone())
            self._num_rows += len(part)

    def found(self) -> LayerInputs:
        """Return the second moments so far, scaled to a mean diagonal of 1; the identity if all inputs are zero."""
        if self._trace == 0:
            return LayerInputs(np.zeros((0, self.width), np.float32), np.zeros(0, np.float32), 1.0)
        rows, squares = self._leading(torch.float64)
        is_kept = squares > NOISE * squares.max()
        rows, squares = rows[is_kept], squares[is_kept]
        variances = squares * (self.width / self._trace)
        left = self.width - len(variances)
        rest = max(0.0, self.width - float(variances.sum())) / left if left else 0.0
        directions = rows / squares.sqrt()[:, None]
        return LayerInputs(directions.float().cpu().numpy(), variances.float().cpu().numpy(), rest)

    def _leading(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return orthogonal rows with the same second moments, the largest first, and their squared lengths.

        There are fewer rows than elements, so the decomposition is of their inner products. Before that, float32 is
        enough: any orthonormal combination of all rows has their second moments, and the part that is cut off is small.
        """
        if self._sum is not None:
            squares, right = torch.linalg.eigh(self._sum)
            squares = squares.clamp(min=0).flip(0)[: self._limit]
            return right.T.flip(0)[: self._limit] * squares.sqrt()[:, None], squares
        held = torch.cat(self._rows).to(dtype)
        squares, left = torch.linalg.eigh(held @ held.T)
        return left.T.flip(0)[: self._limit] @ held, squares.clamp(min=0).flip(0)[: self._limit]
