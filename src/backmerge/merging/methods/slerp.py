"""Spherical linear interpolation of weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backmerge.merging.method import merge_method
from backmerge.merging.randomness import TensorRandom
from backmerge.merging.reductions import dot

# beyond this cosine the angle of two nearly parallel vectors is lost to cancellation, and the chord is taken for the
# arc, as mergekit does
PARALLEL = 0.9995


@merge_method(has_exact_endpoints=True, is_idempotent=True)
def slerp(base: Tensor, tuned: Tensor, rng: TensorRandom, /, *, lam: float) -> Tensor:  # noqa: ARG001 - not random
    """sin((1 - lam)·θ)/sin θ · base + sin(lam·θ)/sin θ · tuned, θ the angle between the two.

    The tensor is taken as one vector, whatever its shape; the weights apply to the vectors as they are, not to unit
    vectors. At the size of LoRA deltas this is Linear but for about 0.1 %.

    Args:
        base: Any shape.
        tuned: Same shape.
        rng: Not used.
        lam: Share of the tuned side, in [0, 1].

    Source: Shoemake, Animating rotation with quaternion curves (1985); as a merge, mergekit's `slerp`.
    """
    if lam == 0:
        return base
    if lam == 1:
        return tuned
    lengths = math.sqrt(dot(base, base) * dot(tuned, tuned))
    cosine = dot(base, tuned) / lengths if lengths > 0 else 1.0
    if abs(cosine) > PARALLEL:
        merged = torch.lerp(base, tuned, lam)
    else:
        angle = math.acos(cosine)
        merged = math.sin((1 - lam) * angle) / math.sin(angle) * base + math.sin(lam * angle) / math.sin(angle) * tuned
    return merged.where(base != tuned, base)
