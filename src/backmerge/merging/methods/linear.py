"""Linear interpolation of weights, the paper's main method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backmerge.merging.method import merge_method

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


NEAR = 2.0**-10  # distance from an end within which float32's 2^-24 would be visible in the change


def coefficients(gram: np.ndarray, /, *, lam: float) -> list[float]:  # noqa: ARG001 - needs no angles
    """Return the delta's share: λ."""
    return [lam]


def interpolated(base: Tensor, tuned: Tensor, lam: float) -> Tensor:
    """Return (1 - lam)·base + lam·tuned for any λ; elements that agree keep their bits.

    The delta is subtracted from the nearer end, since `-0.0 + lam·0.0` is 0.0 and `-0.0 - lam·0.0` is −0.0. For 16-bit
    floats torch's lerp does the same in one kernel, in float32 and rounded once. It subtracts from a weight of one half
    upwards (below that it adds), and keeps the weight in float32, which is too coarse very near an end.
    """
    if lam == 1:
        return tuned
    if base.element_size() == 2 and not (0 <= lam < NEAR or 1 - NEAR < lam <= 1):
        return base.lerp(tuned, lam) if 0.5 <= lam < 1 else tuned.lerp(base, 1 - lam)
    near, far = (side.float() if side.element_size() == 2 else side for side in (base, tuned))
    share = lam
    if 0.5 <= lam < 1:
        near, far, share = far, near, 1 - lam
    return near.sub(near - far, alpha=share)


@merge_method(has_exact_endpoints=True, is_idempotent=True, is_native=True, coefficients=coefficients)
def linear(base: Tensor, tuned: Tensor, /, *, lam: float) -> Tensor:
    """(1 - lam)·base + lam·tuned.

    Args:
        base: Any shape.
        tuned: Same shape.
        lam: Share of the tuned side, in [0, 1].

    Source: Wortsman et al., Model soups (arXiv 2203.05482); Farn et al. (arXiv 2412.19512), section 2.
    """
    # explicit endpoints: (1 - 1)·base + 1·tuned would turn −0.0 into 0.0
    if lam == 0:
        return base
    if lam == 1:
        return tuned
    return interpolated(base, tuned, lam)
