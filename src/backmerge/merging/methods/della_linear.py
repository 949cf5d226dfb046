"""DELLA without the election of signs: small elements of a delta are dropped more often than large ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from backmerge.errors import MergeError
from backmerge.merging.consensus import for_each, shifted, summed
from backmerge.merging.method import merge_method

if TYPE_CHECKING:
    from torch import Tensor

    from backmerge.merging.randomness import TensorRandom

DENSITY, EPSILON = (0.5,), (0.15,)


def pruned(
    base: Tensor, tuned: Sequence[Tensor], rng: TensorRandom, density: Sequence[float], epsilon: Sequence[float]
) -> list[Tensor]:
    """MAGPRUNE: each element is kept with a probability that rises with its rank in its row, and divided by it.

    The smallest of a row is kept with probability density - epsilon, the largest with density + epsilon.

    Args:
        base: Shape (rows, columns).
        tuned: The same.
        rng: A stream for each tuned model.
        density: Mean probability for each tuned model.
        epsilon: Half the range of probabilities for each.

    Raises:
        MergeError: a probability would leave (0, 1).
    """
    import torch

    deltas = []
    shares, ranges = for_each(density, len(tuned)), for_each(epsilon, len(tuned))
    for stream, model in enumerate(tuned):
        delta, share, half = model - base, shares[stream], ranges[stream]
        if not share >= 1:  # so that NaN is looked at
            if not 0 < share - half <= share + half < 1:
                raise MergeError(
                    f"density {share} and epsilon {half}: the probabilities to keep go from density - epsilon to "
                    "density + epsilon, and must lie in (0, 1)",
                    remedy="give a smaller epsilon.",
                )
            columns = delta.shape[-1]
            order = delta.abs().argsort(dim=-1, stable=True)
            rising = torch.linspace(share - half, share + half, columns, dtype=delta.dtype, device=delta.device)
            if columns == 1:
                rising.fill_(share)
            keep = torch.empty_like(delta).scatter_(-1, order, rising.expand_as(delta))
            delta.mul_(rng.uniform(delta, stream=stream) < keep).div_(keep)
        deltas.append(delta)
    return deltas


@merge_method(has_exact_endpoints=False, is_idempotent=True, cut="rows", num_tuned=(1, None), max_lam=math.inf)
def della_linear(
    base: Tensor,
    tuned: Sequence[Tensor],
    rng: TensorRandom,
    /,
    *,
    lam: float = 1.0,
    weight: Sequence[float] = (1.0,),
    density: Sequence[float] = DENSITY,
    epsilon: Sequence[float] = EPSILON,
    normalize: bool = False,
) -> Tensor:
    """Base + lam · Σ wᵢ·m∘(tunedᵢ - base)/p, p the probability that m keeps an element.

    p rises over the ranks of a row, from density - epsilon to density + epsilon. What is kept is divided by its own
    probability, as in the paper, so that the mean over masks is task arithmetic; mergekit rescales to the L1 norm.

    Args:
        base: Shape (rows, columns); a vector is one row.
        tuned: One model or more, in the same shape.
        rng: Draws the masks, a stream for each tuned model.
        lam: Scale of the merged delta, 0 or more.
        weight: Of each tuned model.
        density: Mean probability to keep an element, in (0, 1); 1 or more keeps all.
        epsilon: Half the range of probabilities.
        normalize: Divide by the sum of the weights.

    Raises:
        MergeError: density ± epsilon leaves (0, 1).

    Source: Deep et al., DELLA-Merging (arXiv 2406.11617), MAGPRUNE.
    """
    deltas = pruned(base, tuned, rng, density, epsilon)
    return shifted(base, summed(deltas, for_each(weight, len(tuned)), lam=lam, normalize=normalize))
