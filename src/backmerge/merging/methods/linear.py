"""Linear interpolation of weights, the paper's main method."""

from __future__ import annotations

import torch
from torch import Tensor

from backmerge.merging.method import merge_method
from backmerge.merging.randomness import TensorRandom


@merge_method(has_exact_endpoints=True, is_idempotent=True)
def linear(base: Tensor, tuned: Tensor, rng: TensorRandom, /, *, lam: float) -> Tensor:  # noqa: ARG001 - not random
    """(1 - lam)·base + lam·tuned.

    Args:
        base: Any shape.
        tuned: Same shape.
        rng: Not used.
        lam: Share of the tuned side, in [0, 1].

    Source: Wortsman et al., Model soups (arXiv 2203.05482); Farn et al. (arXiv 2412.19512), section 2.
    """
    # explicit endpoints: (1 - 1)·base + 1·tuned would turn −0.0 into 0.0
    if lam == 0:
        return base
    if lam == 1:
        return tuned
    # where both are equal nothing may change, and −0.0 + lam·0 is 0.0
    return torch.lerp(base, tuned, lam).where(base != tuned, base)
