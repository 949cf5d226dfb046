"""Merge methods that are compared with the shipped ones, and shipped only if they win.

    export PYTHONPATH=experiments
    backmerge merge BASE TUNED --method candidates:spectral_flatten --lam 0.2,0.4 --allow-plugins --out out

In an experiment file they go under `merge`, as `method: candidates:dg_hard`. What they share: λ scales the change, so
that λ=0 is the base; tensors that are not matrices are merged linearly, unless a method says otherwise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from backmerge.errors import MergeError
from backmerge.merging.consensus import shifted
from backmerge.merging.factors import Stack
from backmerge.merging.inputs import LamByDirection
from backmerge.merging.method import merge_method
from backmerge.merging.methods.linear import coefficients
from backmerge.merging.reductions import gram_of_deltas

UNIT = 2.0**-24  # half of a float32's distance from 1 to the next
NO_RANK = 1e-6  # of the largest singular value; below it is no direction of the change
LEAST_ELEMENTS = 1024  # of a matrix whose noise can be told from its signal, as in DG-Hard's code


def check_share(name: str, share: float) -> None:
    """Refuse a value outside [0, 1]."""
    if not 0 <= share <= 1:
        raise MergeError(f"{name} is {share}, and must be in [0, 1]", remedy=f"such as {name}=0.5.")


def flat(values: np.ndarray, t: float) -> np.ndarray:
    """(1 - t)·σ + t·mean(σ) of positive singular values."""
    found: np.ndarray = (1 - t) * values + t * values.mean()
    return found


def flattened_factors(factors: Stack, /, *, lam: float = 1.0, t: float = 0.5) -> LamByDirection | None:
    """What A is multiplied by from the right to flatten B·A; `None` where B·A is zero."""
    check_share("t", t)
    rest_b = np.linalg.qr(factors.b.astype(np.float64) * factors.scales, mode="r")
    base_a, rest_a = np.linalg.qr(factors.a.T.astype(np.float64))
    _, values, right = np.linalg.svd(rest_b @ rest_a.T)
    rank = int((values > NO_RANK * values[0]).sum())
    if not rank:
        return None
    return LamByDirection(lam, right[:rank] @ base_a.T, lam * flat(values[:rank], t) / values[:rank], False)


@merge_method(
    has_exact_endpoints=False,
    is_idempotent=True,
    cut="tensor",
    coefficients=coefficients,
    through_inputs=flattened_factors,
)
def spectral_flatten(base: Tensor, tuned: Tensor, /, *, lam: float = 1.0, t: float = 0.5) -> Tensor:
    """Base + lam·U·diag((1 - t)·σ + t·mean(σ))·Vᵀ, U·diag(σ)·Vᵀ the delta's singular value decomposition.

    The large directions of the delta shrink and the small ones grow; t=0 is Linear. The mean is over the delta's rank:
    singular values that float32 rounding of the tuned weights explains are left alone. On a LoRA it is a LoRA of the
    same rank. A matrix that an adapter trained whole is flattened in a checkpoint, and merged linearly in an adapter.

    Args:
        base: Any shape.
        tuned: Same shape.
        lam: Share of the tuned side, in [0, 1].
        t: How far singular values move to their mean, in [0, 1].

    Raises:
        MergeError: `t` is outside [0, 1].

    Source: none known; a rival in the comparison with Linear.
    """
    check_share("t", t)
    delta = tuned - base
    if delta.ndim == 2 and bool(delta.any()):
        left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
        noise = UNIT * float(tuned.double().square().mean().sqrt()) * sum(map(math.sqrt, delta.shape))
        rank = int((values > max(NO_RANK * float(values[0]), 2 * noise)).sum())
        if rank:
            values[:rank] = torch.from_numpy(flat(values[:rank].cpu().numpy(), t)).to(values)
            delta = ((left * values) @ right).float()
    return shifted(base, delta.mul_(lam))


@merge_method(has_exact_endpoints=False, is_idempotent=True, cut="tensor")
def base_projection(base: Tensor, tuned: Tensor, /, *, lam: float = 1.0, mu: float = 1.0, share: float = 0.1) -> Tensor:
    """Base + lam·(Δ - mu·P_U·Δ·P_V): less of the change within the top singular spaces of the base's own weight.

    U and V are the left and right singular vectors of the base's largest singular values, P their projections.

    Args:
        base: Any shape.
        tuned: Same shape.
        lam: Share of the tuned side, in [0, 1].
        mu: Of the change within both spaces, how much is taken away; 1 is all of it.
        share: Of the base's singular directions, the largest first, in [0, 1].

    Raises:
        MergeError: `share` is outside [0, 1].

    Source: none known; a rival in the comparison with Linear.
    """
    check_share("share", share)
    delta = tuned - base
    if delta.ndim == 2 and bool(delta.any()):
        left, _, right = torch.linalg.svd(base.double(), full_matrices=False)
        kept = round(share * len(right))
        left, right = left[:, :kept], right[:kept]
        wide = delta.double()
        delta = (wide - mu * (left @ ((left.T @ wide) @ right.T) @ right)).float()
    return shifted(base, delta.mul_(lam))


def with_alignment(base: Tensor, tuned: Tensor, unaligned: Tensor, /) -> np.ndarray:
    """Inner products of tuned - base and unaligned - base, shape (2, 2)."""
    return gram_of_deltas(base, [tuned, unaligned])


@merge_method(has_exact_endpoints=False, is_idempotent=True, reductions=[with_alignment])
def alignment_projection(
    base: Tensor, tuned: Tensor, unaligned: Tensor, statistics: Sequence[np.ndarray], /, *, lam: float = 1.0
) -> Tensor:
    """Base + lam·(Δ - min(0, ⟨Δ, A⟩/‖A‖²)·A), A = base - unaligned: what undoes the alignment is taken away.

    One-sided: a change that goes along with the alignment, or across it, stays as it is. Every tensor is taken as one
    vector, whatever its shape. Needs one more model, `unaligned`, as RESTA does.

    Args:
        base: The aligned model, any shape.
        tuned: Same shape.
        unaligned: The base before its alignment, same shape.
        statistics: Inner products over the whole tensor.
        lam: Share of the tuned side, in [0, 1].

    Source: none known; a rival in the comparison with Linear.
    """
    ((_, with_unaligned), (_, length)) = statistics[0]
    # the alignment is the other way: ⟨Δ, A⟩ = -⟨Δ, unaligned - base⟩
    share = min(0.0, -float(with_unaligned) / float(length)) if length > 0 else 0.0
    return shifted(base, (tuned - base).add_(base - unaligned, alpha=-share).mul_(lam))


@functools.cache
def noise_factor(beta: float) -> float:
    """ω(β)/√(median of Marchenko-Pastur): the threshold over the median singular value, for an aspect ratio in (0, 1].

    The median is found with x = 1 + β + 2·√β·cos θ, in which the density has no poles.
    """
    angles = np.linspace(0, math.pi, 10_001)
    places = 1 + beta + 2 * math.sqrt(beta) * np.cos(angles)
    # sin²θ/x is 0/0 at the lower end of a square matrix, where it is 1
    density = np.divide(np.sin(angles) ** 2, places, out=np.ones_like(angles), where=places > 1e-12)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    median = float(np.interp(below[-1] / 2, below, places))
    omega = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    return omega / math.sqrt(median)


@merge_method(has_exact_endpoints=False, is_idempotent=True, cut="tensor")
def dg_hard(base: Tensor, tuned: Tensor, /, *, lam: float = 1.0) -> Tensor:
    """Base + lam·Δ without the singular values of Δ that noise explains: those up to ω(β)/√μ(β) · their median.

    β is the ratio of the sides, μ the median of the Marchenko-Pastur law. Only matrices of at least 1,024 elements
    change, as in the paper's code. A LoRA's delta has a median of zero, and stays as it is: for full tunings only.

    Args:
        base: Any shape.
        tuned: Same shape.
        lam: Share of the tuned side, in [0, 1]; 1 in the paper.

    Source: Abro and Tahir, Spectral Unforgetting (arXiv 2605.20296); threshold of Gavish and Donoho (arXiv 1305.5870),
    equation 11 and section III.E.
    """
    delta = tuned - base
    if delta.ndim == 2 and delta.numel() >= LEAST_ELEMENTS and bool(delta.any()):
        left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
        short, long = sorted(delta.shape)
        # the lower of two middle ones, as torch has it
        kept = values > noise_factor(short / long) * values.median()
        delta = ((left * (values * kept)) @ right).float()
    return shifted(base, delta.mul_(lam))
