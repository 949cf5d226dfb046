"""Spherical linear interpolation of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from backmerge.merging.method import merge_method
from backmerge.merging.methods.linear import interpolated
from backmerge.merging.reductions import gram_of_models

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# above this cosine the angle of two nearly parallel vectors is lost to cancellation, so the chord replaces the arc, as
# in mergekit
PARALLEL = 0.9995


@merge_method(has_exact_endpoints=True, is_idempotent=True, reductions=[gram_of_models], is_native=True)
def slerp(base: Tensor, tuned: Tensor, statistics: Sequence[np.ndarray], /, *, lam: float) -> Tensor:
    """sin((1 - lam)·θ)/sin θ · base + sin(lam·θ)/sin θ · tuned, θ the angle between the two.

    The tensor is taken as one vector, whatever its shape; the weights apply to the vectors themselves, not to unit
    vectors. At the size of LoRA deltas this differs from Linear by about 0.1 %.

    Args:
        base: Any shape.
        tuned: Same shape.
        statistics: Inner products of the two whole tensors.
        lam: Share of the tuned side, in [0, 1].

    Source: Shoemake, Animating rotation with quaternion curves (1985); as a merge, mergekit's `slerp`.
    """
    if lam == 0:
        return base
    if lam == 1:
        return tuned
    ((base_square, product), (_, tuned_square)) = statistics[0]
    lengths = math.sqrt(base_square) * math.sqrt(tuned_square)
    cosine = product / lengths if lengths > 0 else 1.0
    if abs(cosine) > PARALLEL:
        return interpolated(base, tuned, lam)
    angle = math.acos(cosine)
    merged = base.float() if base.element_size() < 4 else base
    merged = merged * (math.sin((1 - lam) * angle) / math.sin(angle))
    return merged.add_(tuned, alpha=math.sin(lam * angle) / math.sin(angle))
