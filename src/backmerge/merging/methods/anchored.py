"""Anchored: a λ for each direction of a layer's inputs, small where guard prompts need the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backmerge.merging.inputs import LamByDirection, lam_by_direction
from backmerge.merging.method import merge_method
from backmerge.merging.methods.linear import coefficients, interpolated

if TYPE_CHECKING:
    from torch import Tensor

    from backmerge.merging.inputs import LayerInputs

RIDGE = 0.01


def through_inputs(
    guard_inputs: LayerInputs | None, task_inputs: LayerInputs | None, /, *, lam: float, ridge: float = RIDGE
) -> LamByDirection | None:
    """Return λ by direction; `None` at the ends and without statistics for a layer: then one λ for all directions."""
    if guard_inputs is None or lam in (0, 1):
        return None
    return lam_by_direction(guard_inputs, task_inputs, lam=lam, ridge=ridge)


@merge_method(
    has_exact_endpoints=True,
    is_idempotent=True,
    cut="tensor",
    coefficients=coefficients,
    through_inputs=through_inputs,
)
def anchored(
    base: Tensor,
    tuned: Tensor,
    guard_inputs: LayerInputs | None,
    task_inputs: LayerInputs | None,
    /,
    *,
    lam: float,
    ridge: float = RIDGE,
) -> Tensor:
    """Base + lam·Δ·T·(lam·T + (1 - lam)·G)⁻¹: λ by direction; G: guard inputs, T: task inputs, or I without them.

    Of all weights, these act most like the base on the guard's inputs and most like the tuned model on the task's (or
    on all inputs alike, without task inputs), by least squares weighted with 1 - lam and lam. G and T are second
    moments of the layer's inputs, scaled to a mean diagonal of 1, with a ridge: (1 - ridge)·C + ridge·I. With white
    guard inputs (C = I), or ridge 1, it is Linear. A tensor without statistics (embeddings, norms, biases, the head) is
    merged linearly with lam.

    Args:
        base: Any shape; a layer with statistics is a matrix.
        tuned: Same shape.
        guard_inputs: This layer's inputs when the base reads the guard prompts.
        task_inputs: This layer's inputs when the tuned model reads the task rows.
        lam: Share of the tuned side, in [0, 1].
        ridge: Share of the identity in the second moments, in [1e-6, 1].

    Source: with both, RegMean (Jin et al., arXiv 2212.09849, equation 1) of base and tuned, weighted. Ours are the
    guard for the base's side, the identity for the task's, and the ridge.
    """
    if lam == 0:
        return base
    if lam == 1:
        return tuned
    by_direction = through_inputs(guard_inputs, task_inputs, lam=lam, ridge=ridge)
    if by_direction is None:
        return interpolated(base, tuned, lam)
    delta = tuned - base
    # −0.0 - 0.0 is −0.0: unchanged elements keep the base's bits
    return base - by_direction.of_delta(delta).neg_().add_(0.0)
