"""Linear interpolation of weights, the paper's main method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backmerge.merging.method import merge_method

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def coefficients(gram: np.ndarray, /, *, lam: float) -> list[float]:  # noqa: ARG001 - needs no angles
    """The delta's share: λ."""
    return [lam]


def interpolated(base: Tensor, tuned: Tensor, lam: float) -> Tensor:
    """(1 - lam)·base + lam·tuned, for any λ, in one kernel that keeps what both agree on.

    Where both are −0.0, torch.lerp gives −0.0 only if it is asked for a weight from a half to one, for which it takes
    `end - (end - start)·(1 - weight)`, or for one below zero; otherwise the two change places.
    """
    return base.lerp(tuned, lam) if 0.5 <= lam <= 1 else tuned.lerp(base, 1 - lam)


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
