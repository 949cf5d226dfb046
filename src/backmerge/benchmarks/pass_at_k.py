"""pass@k: how likely one of k samples is right, from n samples of which c are."""

from __future__ import annotations

import math
from collections.abc import Sequence

KS = (1, 10, 100)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """1 − C(n − c, k) / C(n, k): the unbiased estimate of the chance that one of k samples is right.

    Computed as (C(n, k) − C(n − c, k)) / C(n, k) in whole numbers, rounded once at the end, where the published code
    multiplies up to c rounded factors and subtracts from 1.

    Args:
        num_samples: n, at least k.
        num_right: c, from 0 to n.
        k: At least 1.

    Returns:
        In [0, 1]; 0 only if no sample is right.

    Raises:
        ValueError: the three do not fit together. For k > n there is no unbiased estimate.

    Source: Chen et al. (2021), arXiv 2107.03374, equation 1.
    """
    if not (1 <= k <= num_samples and 0 <= num_right <= num_samples):
        raise ValueError(f"pass@{k} of {num_right} right among {num_samples} samples has no meaning")
    all_draws = math.comb(num_samples, k)
    return (all_draws - math.comb(num_samples - num_right, k)) / all_draws


def pass_at_ks(is_right: Sequence[bool], ks: Sequence[int] = KS) -> dict[str, float]:
    """`{"pass@1": ..., "pass@10": ...}` of one problem's samples, for each k that there are enough samples for."""
    return {f"pass@{k}": pass_at_k(len(is_right), sum(is_right), k) for k in ks if k <= len(is_right)}
