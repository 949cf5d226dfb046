"""From float32 to the dtype of the output: to the nearest value, or to one of the two next to it at random."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from backmerge.merging.randomness import ROUNDING, TensorRandom

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SAMPLED = 100  # one element in this many is used to estimate the loss from rounding
LEAST_SAMPLE = 1000  # elements; fewer are too noisy
NOTABLE_LOSS = 0.1  # share of the change: a loss above this is a warning
REMEDIES = "an adapter (--as adapter) or float32 keeps all of it, and --rounding stochastic keeps it on average"


def survival(loss: float, dtype: str) -> str:
    """Return how much of a merge's change survived the rounding of its output, in words.

    Args:
        loss: The share from `RoundingLoss`, 0 or more.
        dtype: The output's dtype, as torch names it.
    """
    kept = max(0.0, 1 - loss)
    share = "more than 99" if 0.99 < kept < 1 else f"{100 * kept:.0f}"
    return f"{share} % of the change survived rounding to {dtype}"


def rounding_line(name: str, loss: float, dtype: str, remedies: str = REMEDIES) -> str:
    """Return the line that a command prints about a checkpoint, a warning if rounding lost much of the change.

    Args:
        name: The checkpoint's name.
        loss: The share from `RoundingLoss`.
        dtype: The checkpoint's dtype, as torch names it.
        remedies: Ways to keep the change; empty if it was rounded at random, which keeps it on average.
    """
    text = f"{name}: {survival(loss, dtype)} (measured on 1 % of it)."
    if loss > NOTABLE_LOSS and remedies:
        return f"Warning: {text} The rest is lost: {remedies}."
    return text


def stochastic(values: Tensor, dtype: torch.dtype, rng: TensorRandom) -> Tensor:
    """Return one of the two values of `dtype` next to each number, the nearer one more often: unbiased.

    A number that `dtype` can represent stays as it is. A delta smaller than the step of the weights is lost when it is
    rounded to the nearest value; here it survives in the mean over many weights, at the price of noise.

    Args:
        values: Float32, any shape.
        dtype: bfloat16 or float16; others are rounded to the nearest.
        rng: Random numbers of these elements; draws from a separate stream.

    Source: Gupta et al., Deep learning with limited numerical precision (arXiv 1502.02551), section 3.
    """
    import torch

    if dtype.itemsize != 2 or values.dtype != torch.float32:
        return values.to(dtype)
    nearest = values.to(dtype)
    bits = nearest.view(torch.int16)
    # bit patterns of one sign rise with the magnitude: the next value towards zero is one less
    inner = torch.where(nearest.float().abs() > values.abs(), bits - 1, bits)
    outer = inner + 1
    low, high = inner.view(dtype).float(), outer.view(dtype).float()
    share = ((values - low) / (high - low)).nan_to_num_(0.0, 0.0, 0.0)  # beyond the dtype's range there is no outer
    is_outer = (rng.uniform(values, stream=ROUNDING) < share) & (low != values)
    return torch.where(is_outer, outer, inner).view(dtype)


class RoundingLoss:
    """The share of the intended change that is lost to the output's dtype, from a sample.

    The share is ‖rounded - merged‖ / ‖merged - base‖ over the sampled elements: 0 if nothing is lost, 1 if the error is
    as large as the change itself.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[float, float, int]] = []  # squared error, squared change, elements

    def add(self, base: Tensor, merged: Tensor, rounded: Tensor) -> None:
        """Add sampled elements: the base's, the merged ones before and after rounding; flat."""
        exact = merged.double()
        lost = float((rounded.double() - exact).square_().sum())
        meant = float((exact - base.double()).square_().sum())
        self._parts.append((lost, meant, merged.numel()))

    @property
    def share(self) -> float | None:
        """Return the share that is lost; `None` if too little was sampled or nothing changes."""
        if sum(count for _, _, count in self._parts) < LEAST_SAMPLE:
            return None
        # exact sums, independent of the order in which threads add the parts
        lost, meant = (math.fsum(part[place] for part in self._parts) for place in (0, 1))
        return math.sqrt(lost / meant) if meant else None
