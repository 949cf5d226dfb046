"""The Karcher mean of base and tuned models: the point on the sphere that is nearest to all of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from backmerge.merging.consensus import where
from backmerge.merging.method import merge_method
from backmerge.merging.reductions import gram_of_models

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-5
MOST_STEPS = 10


def karcher_shares(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean as a sum of the vectors: the share of each.

    Riemannian gradient descent on the shares rather than on the vectors, since only the vectors' inner products matter.
    The mean direction is scaled to the weighted mean length.

    Args:
        gram: Inner products of the vectors, shape (n, n).
        weights: Weight of each; they add up to 1.
    """
    lengths = np.sqrt(np.diag(gram))
    used = (lengths > TOLERANCE) & (weights > 0)
    if not used.any():
        return np.where(weights > 0, weights, 0.0)
    cosines = gram[np.ix_(used, used)] / np.outer(lengths[used], lengths[used])
    pull = weights[used] / weights[used].sum()

    def unit(shares: np.ndarray) -> np.ndarray:
        return np.asarray(shares / np.sqrt(max(float(shares @ cosines @ shares), 0.0)))

    first = np.zeros(len(pull))
    first[0] = 1.0
    mean = unit(pull) if float(pull @ cosines @ pull) >= TOLERANCE**2 else first
    for _ in range(MOST_STEPS):
        dots = np.clip(cosines @ mean, -1.0, 1.0)
        angles = np.arccos(dots)
        far = angles >= TOLERANCE
        stretch = np.where(far, angles / np.where(far, np.sin(angles), 1.0), 0.0) * pull
        tangent = stretch - float(stretch @ dots) * mean
        size = float(np.sqrt(max(float(tangent @ cosines @ tangent), 0.0)))
        if size < TOLERANCE:
            break
        mean = unit(np.cos(size) * mean + np.sin(size) / size * tangent)
    shares = np.zeros(len(gram))
    shares[used] = float(weights @ lengths) * mean / lengths[used]
    return shares


@merge_method(has_exact_endpoints=True, is_idempotent=True, reductions=[gram_of_models], num_tuned=(1, None))
def karcher(base: Tensor, tuned: Sequence[Tensor], statistics: Sequence[np.ndarray], /, *, lam: float) -> Tensor:
    """The Karcher mean of base (weight 1 - lam) and N tuned models (weight lam/N each), at their mean length.

    With one tuned model this is SLERP of the directions. λ=0 is the base bit for bit; with one tuned model, λ=1 is that
    model bit for bit. mergekit's `karcher` has no base and weighs all models alike: that is λ = N / (N + 1). Each
    tensor is taken as one vector.

    Args:
        base: Any shape.
        tuned: One model or more, of the same shape.
        statistics: Inner products of the whole tensors, the base's first.
        lam: Share of the tuned side, in [0, 1].

    Source: Karcher, Riemannian center of mass and mollifier smoothing (1977); as a merge, mergekit's `karcher`.
    """
    if lam == 0:
        return base
    if lam == 1 and len(tuned) == 1:
        return tuned[0]
    shares = karcher_shares(statistics[0], np.array([1 - lam, *[lam / len(tuned)] * len(tuned)]))
    merged = base * float(shares[0])
    for model, share in zip(tuned, shares[1:], strict=True):
        merged.add_(model, alpha=float(share))
    differs = functools.reduce(lambda one, other: one | other, [model != base for model in tuned])
    return where(differs, merged, base)
