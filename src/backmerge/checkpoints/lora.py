"""What a LoRA does to one tensor: which factors, how they are scaled, and the sum, a few rows at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

EMBEDDING_A = ".lora_embedding_A"


class Factors(NamedTuple):
    """The names of one tensor's low-rank delta, scale · B·A.

    Attributes:
        a: Tensor name of A, shape (r, in).
        b: Tensor name of B, shape (out, r).
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
        is_transposed: Whether the weight is stored (in, out): embeddings, and Conv1D layers (`fan_in_fan_out`).
        magnitude: Tensor name of DoRA's magnitudes, shape (out,), or nothing for other kinds.
    """

    a: str
    b: str
    scale: float
    is_transposed: bool = False
    magnitude: str | None = None

    @property
    def is_embedding(self) -> bool:
        """Whether they belong to an embedding, for whose factors peft has names of its own."""
        return self.a.endswith(EMBEDDING_A)


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What B·A is multiplied by, patterns and rsLoRA included.

    Args:
        config: An adapter's configuration.
        module: The module's name in the base.
        rank: r of that module's factors.
    """
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    # as peft matches them: the pattern is the module's name, or its end after a dot
    matching = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    alpha = next(matching, config.get("lora_alpha", rank))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def tuned_rows(weight: Tensor, factors: Factors, a: np.ndarray, b: np.ndarray, first: int) -> Tensor:
    """W + scale·B·A, in float32, for some rows of a weight.

    Args:
        weight: Rows `first` and following, shape (rows, columns).
        factors: Of the whole weight.
        a: A, shape (r, in).
        b: B, shape (out, r).
        first: The first row.
    """
    import torch

    left, right = (a.T, b.T) if factors.is_transposed else (b, a)
    rows = torch.from_numpy(left[first : first + weight.shape[0]]).to(weight.device)
    delta = rows @ torch.from_numpy(right).to(weight.device)
    return weight.float() + factors.scale * delta


def rescaled_rows(rows: Tensor, magnitudes: np.ndarray) -> Tensor:
    """DoRA's weight: m · V / ‖V‖ row by row, V = W + scale·B·A.

    Args:
        rows: V, shape (rows, columns).
        magnitudes: m of these rows, shape (rows,).

    Source: Liu et al., DoRA (arXiv 2402.09353), equation 5; norms are over the inputs of each output, as in peft.
    """
    import torch

    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    factors: Tensor = torch.from_numpy(magnitudes).to(rows.device).unsqueeze(1) / norms
    return rows * factors
