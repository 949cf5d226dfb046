"""Model Stock: how far to go from the base towards the mean of several tuned models, by the angle between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from itertools import combinations
from typing import TYPE_CHECKING

from backmerge.merging.method import merge_method
from backmerge.merging.reductions import gram_of_deltas

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

LEAST = 1e-6  # smallest product of norms, and smallest denominator


def coefficients(gram: np.ndarray, /) -> list[float]:
    """Return the share t / N for each delta: t = N·cosθ / (1 + (N - 1)·cosθ), cosθ the mean over pairs.

    Args:
        gram: Inner products of the deltas, shape (N, N).
    """
    count = len(gram)
    lengths = [math.sqrt(gram[i, i]) for i in range(count)]
    cosines = [
        max(-1.0, min(1.0, gram[i, j] / max(lengths[i] * lengths[j], LEAST))) for i, j in combinations(range(count), 2)
    ]
    cosine = math.fsum(cosines) / len(cosines)
    denominator = 1 + (count - 1) * cosine
    # if the deltas cancel out there is no finite estimate, and the base is kept
    ratio = 0.0 if abs(denominator) < LEAST else count * cosine / denominator
    return [ratio / count] * count


@merge_method(
    has_exact_endpoints=False,
    is_idempotent=True,
    reductions=[gram_of_deltas],
    num_tuned=(2, None),
    coefficients=coefficients,
    widens=True,
)
def model_stock(base: Tensor, tuned: Sequence[Tensor], statistics: Sequence[np.ndarray], /) -> Tensor:
    """(1 - t)·base + t·mean(tuned), t = N·cosθ / (1 + (N - 1)·cosθ); no λ.

    θ is the angle between the tuned models' deltas, tensor by tensor: the mean cosine over all pairs, as in mergekit.

    Args:
        base: Any shape.
        tuned: N ≥ 2 models of the same shape, such as those of several seeds.
        statistics: Inner products of the whole deltas.

    Source: Jang et al., Model Stock (arXiv 2403.19522), section 4.
    """
    share = coefficients(statistics[0])[0]
    start = _wide(base)
    # the gaps from the tuned models to the base, and for a negative share the reverse: where all agree these are 0.0,
    # of which −0.0 - share·0.0 leaves the base's −0.0
    gaps = (start - _wide(model) if share >= 0 else _wide(model) - start for model in tuned)
    gap = reduce(lambda total, one: total.add_(one), gaps)
    return start.sub(gap, alpha=abs(share))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.element_size() == 2 else tensor
