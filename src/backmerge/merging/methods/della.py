"""DELLA: small elements of a delta are dropped more often than large ones; then signs are elected, as in TIES."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from backmerge.merging.consensus import elected, for_each, shifted
from backmerge.merging.method import merge_method
from backmerge.merging.methods.della_linear import DENSITY, EPSILON, pruned

if TYPE_CHECKING:
    from torch import Tensor

    from backmerge.merging.randomness import TensorRandom


@merge_method(has_exact_endpoints=False, is_idempotent=True, cut="rows", num_tuned=(1, None), max_lam=math.inf)
def della(
    base: Tensor,
    tuned: Sequence[Tensor],
    rng: TensorRandom,
    /,
    *,
    lam: float = 1.0,
    weight: Sequence[float] = (1.0,),
    density: Sequence[float] = DENSITY,
    epsilon: Sequence[float] = EPSILON,
    normalize: bool = True,
) -> Tensor:
    """Base + lam · mean of those wᵢ·m∘(tunedᵢ - base)/p whose sign is elected, p the probability that m keeps one.

    Args:
        base: Shape (rows, columns); a vector is one row.
        tuned: One model or more, in the same shape.
        rng: Draws the masks, a stream for each tuned model.
        lam: Scale of the merged delta, 0 or more.
        weight: Of each tuned model.
        density: Mean probability to keep an element, in (0, 1); 1 or more keeps all.
        epsilon: Half the range of probabilities.
        normalize: Divide by the sum of the weights that agree.

    Raises:
        MergeError: density ± epsilon leaves (0, 1).

    Source: Deep et al., DELLA-Merging (arXiv 2406.11617).
    """
    deltas = pruned(base, tuned, rng, density, epsilon)
    return shifted(base, elected(deltas, for_each(weight, len(tuned)), lam=lam, normalize=normalize))
