"""DARE: drop a random part of the delta and rescale the rest, then Linear."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backmerge.errors import MergeError
from backmerge.merging.elements import where
from backmerge.merging.method import merge_method
from backmerge.merging.methods.linear import interpolated

if TYPE_CHECKING:
    from torch import Tensor

    from backmerge.merging.randomness import TensorRandom


@merge_method(has_exact_endpoints=False, is_idempotent=True, is_native=True)
def dare_linear(base: Tensor, tuned: Tensor, rng: TensorRandom, /, *, lam: float, drop: float = 0.5) -> Tensor:
    """Base + lam · m ∘ (tuned - base) / (1 - drop), m keeping each element with probability 1 - drop.

    λ=0 is the base bit for bit; λ=1 is the tuned model in expectation. mergekit rescales to the L1 norm of the delta
    instead, and draws masks whose order depends on the execution; ours is the paper's, and a mask is a function of
    seed, tensor and position.

    Args:
        base: Any shape.
        tuned: Same shape.
        rng: Draws the mask.
        lam: Share of the tuned side, in [0, 1].
        drop: Probability of dropping an element of the delta, in [0, 1).

    Raises:
        MergeError: `drop` is outside [0, 1).

    Source: Yu et al., Language Models are Super Mario (arXiv 2311.03099), equation 2.
    """
    check_drop(drop)
    if lam == 0:
        return base
    share = lam / (1 - drop)
    moved = interpolated(base, tuned, share)
    return where(rng.keeps(base, 1 - drop), moved, base)


def check_drop(drop: float) -> None:
    """Refuse what is no probability, or leaves nothing.

    Raises:
        MergeError: `drop` is outside [0, 1).
    """
    if not 0 <= drop < 1:
        raise MergeError(
            f"drop is {drop}, and must be in [0, 1): what is kept is divided by 1 - drop", remedy="such as drop=0.5."
        )
