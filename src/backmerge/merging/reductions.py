"""Sums over a tensor that no thread count changes: in float64, over fixed blocks."""

from __future__ import annotations

import math

from torch import Tensor

BLOCK = 1 << 20  # elements summed at once


def dot(first: Tensor, second: Tensor) -> float:
    """Inner product of two tensors taken as vectors.

    Blocks of 2^20 elements are multiplied and summed in float64 one after the other, and their sums exactly, so that
    the result does not depend on how the work is shared. The sums are numpy's, which are pairwise and by one thread:
    torch's own differ in their last bits with the number of threads.
    """
    a, b = first.reshape(-1), second.reshape(-1)
    products = (a[i : i + BLOCK].double() * b[i : i + BLOCK].double() for i in range(0, a.numel(), BLOCK))
    return math.fsum(float(product.cpu().numpy().sum()) for product in products)
