"""RESTA: add to a tuned model what alignment had added to the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backmerge.merging.consensus import shifted
from backmerge.merging.method import merge_method
from backmerge.merging.methods.task_vectors import check_drop

if TYPE_CHECKING:
    from torch import Tensor

    from backmerge.merging.randomness import TensorRandom


@merge_method(has_exact_endpoints=False, is_idempotent=False)
def resta(
    base: Tensor,
    tuned: Tensor,
    unaligned: Tensor,
    rng: TensorRandom,
    /,
    *,
    lam: float = 1.0,
    beta: float = 1.0,
    drop: float = 0.0,
) -> Tensor:
    """Base + lam·(tuned - base) + beta·(base - unaligned).

    Needs another model, `unaligned`: the base without its alignment, such as the pretrained model before it, or the
    base tuned to comply with harmful requests, as in the paper. With either of them, no data are needed. With `drop`,
    the tuned model's delta first loses a random part (the paper's RESTA_d), rescaled as in DARE.

    Args:
        base: The aligned model, any shape.
        tuned: Same shape.
        unaligned: Same shape.
        rng: Draws the mask.
        lam: Share of the tuned side, in [0, 1].
        beta: How much of the alignment's delta is added.
        drop: Probability of dropping an element of the tuned delta, in [0, 1).

    Raises:
        MergeError: `drop` is outside [0, 1).

    Source: Bhardwaj, Anh and Poria, Language Models are Homer Simpson! (arXiv 2402.11746).
    """
    check_drop(drop)
    delta = tuned - base
    if drop:
        delta.mul_(rng.keeps(base, 1 - drop)).div_(1 - drop)
    return shifted(base, delta.mul_(lam).add_(base - unaligned, alpha=beta))
