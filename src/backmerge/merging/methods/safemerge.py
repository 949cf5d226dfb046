"""SafeMERGE: merge back only the layers whose update leaves the directions of alignment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backmerge.merging.consensus import shifted
from backmerge.merging.method import merge_method
from backmerge.merging.methods.safe_lora import cosine, projected

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(has_exact_endpoints=False, is_idempotent=True, cut="tensor")
def safemerge(
    base: Tensor,
    tuned: Tensor,
    unaligned: Tensor,
    safe: Tensor | None,
    /,
    *,
    lam: float,
    threshold: float = 0.35,
) -> Tensor:
    """Base + lam·Δ + (1 - lam)·Δ_safe if cos(C·Δ, Δ) < threshold, else the tuned tensor; C as in Safe LoRA.

    Needs another model, `unaligned`: the pretrained model before alignment. With it alone no data are needed: the safe
    side is the base itself, Δ_safe = 0. The paper's safe side is a model tuned on safety data: give it as `safe`. Only
    matrices are merged; all other tensors are the tuned model's.

    Args:
        base: The aligned model, any shape.
        tuned: Same shape.
        unaligned: Same shape.
        safe: Same shape, or `None` for the base.
        lam: Share of the tuned side in the merged tensors, in [0, 1].
        threshold: Cosine below which a tensor is merged.

    Source: Djuhera et al., SafeMERGE (arXiv 2503.17239).
    """
    delta = tuned - base
    moved = projected(base, delta, unaligned)
    if moved is None or cosine(moved, delta) >= threshold:
        return tuned
    merged = delta * lam
    if safe is not None:
        merged.add_(safe - base, alpha=1 - lam)
    return shifted(base, merged)
