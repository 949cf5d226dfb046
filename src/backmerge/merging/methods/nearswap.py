"""NearSwap: no weight moves further than a limit, so that weights that are nearly equal become the tuned model's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backmerge.errors import MergeError
from backmerge.merging.method import merge_method
from backmerge.merging.methods.linear import linear

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(has_exact_endpoints=False, is_idempotent=True)
def nearswap(base: Tensor, tuned: Tensor, /, *, lam: float = 1.0, t: float = 1e-4) -> Tensor:
    """Base + lam · (tuned - base), with each element of the change limited to ±t before it is scaled.

    With lam=1, weights that are at most t apart become the tuned model's bit for bit, and all others end up t away from
    the base. mergekit divides t by |tuned - base|, but by at least 1e-6, so that below t=1e-6 its changes are smaller
    than ours.

    Args:
        base: Any shape.
        tuned: Same shape.
        lam: Share of the tuned side, in [0, 1]; mergekit always uses 1.
        t: Largest change of a weight, 0 or more; the default is that of the model for which the method was made.

    Raises:
        MergeError: `t` is below 0.

    Source: QuartetAnemoi-70B-t0.0001 by alchemonaut; mergekit's `nearswap`.
    """
    if not t >= 0:
        raise MergeError(
            f"t is {t}, and must be 0 or more: it limits the change of a weight", remedy="for example t=0.001."
        )
    near: Tensor = linear.function(base, tuned.clamp(base - t, base + t), lam=lam)
    return near
