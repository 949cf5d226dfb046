"""Arcee Fusion: keep the most important changes, and drop all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from backmerge.merging.consensus import where
from backmerge.merging.method import merge_method
from backmerge.merging.methods.linear import linear
from backmerge.merging.reductions import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

QUARTILES = (0.25, 0.5, 0.75)
SPREADS = 1.5  # a change is important from this many interquartile ranges above the median
LEAST = 1e-8  # added to each probability


def importance(base: Tensor, tuned: Tensor) -> Tensor:
    """Return |tuned - base| · KL(softmax(tuned) ‖ softmax(base)), the divergence by row; in the shape of the input.

    The divergence is taken in float64: at the size of LoRA deltas its terms cancel to a tenth of float32's precision.

    Args:
        base: Shape (rows, columns).
        tuned: The same shape.
    """
    import torch

    found = (tuned - base).abs_()
    rows = max(1, BLOCK // max(1, base.shape[1]))
    for start in range(0, len(base), rows):
        p, q = (side[start : start + rows].double().softmax(-1).add_(LEAST) for side in (tuned, base))
        ratio = (p / q).log_()
        # summed by numpy, in one order for any number of threads
        divergence = np.einsum("ij,ij->i", p.cpu().numpy(), ratio.cpu().numpy())
        found[start : start + rows] *= torch.from_numpy(divergence).to(found).unsqueeze(1)
    return found


def threshold(important: Tensor) -> float:
    """Return median + 1.5 · (third quartile - first); quartiles are elements, not means of two."""
    values = important.cpu().numpy().reshape(-1)
    ranks = [int(share * (values.size - 1)) for share in QUARTILES]
    first, median, third = np.partition(values, ranks)[ranks].tolist()
    return float(median + SPREADS * (third - first))


@merge_method(has_exact_endpoints=False, is_idempotent=True, cut="tensor")
def arcee_fusion(base: Tensor, tuned: Tensor, /, *, lam: float = 1.0) -> Tensor:
    """Base + lam · (tuned - base) where |tuned - base|·KL is at least median + 1.5·(Q3 - Q1) of it; base elsewhere.

    KL is that of softmax(tuned) from softmax(base) over an element's row. mergekit computes it in float32, and rounding
    then decides 3 to 18 % of the elements that it takes (ten tensors of a LoRA on SmolLM2-135M); it estimates the
    quartiles of large tensors from a million elements drawn at random. Ours are float64 and exact.

    Args:
        base: Any shape; rows lie along the last dimension.
        tuned: Same shape.
        lam: Share of the tuned side in the elements that change, in [0, 1]; mergekit always uses 1.

    Source: mergekit's `arcee_fusion` (Arcee AI).
    """
    if not base.numel():
        return base
    columns = base.shape[-1] if base.ndim else 1
    important = importance(base.reshape(-1, columns), tuned.reshape(-1, columns)).reshape(base.shape)
    fused: Tensor = linear.function(base, where(important >= threshold(important), tuned, base), lam=lam)
    return fused
