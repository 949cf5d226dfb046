"""How many prompts are enough: exact power of the tests for non-inferiority."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from backmerge.statistics.paired import check_margin, tango_score

NEGLIGIBLE = 1e-9  # probability in each tail that is ignored
MOST_PROMPTS = 10_000_000


def power_of(n: int, *, discordant_rate: float, true_difference: float, margin: float, alpha: float = 0.05) -> float:
    """Return the probability that n paired prompts show a difference to be below the margin.

    Exact: the sum of the probabilities of all counts of gains and losses for which Tango's one-sided bound is below the
    margin. Gains have the rate (d + δ)/2 and losses (d − δ)/2.

    Args:
        n: Number of independent prompts; for clustered prompts, the effective number.
        discordant_rate: d, the share of prompts on which the two models differ, in [|δ|, 1].
        true_difference: δ, the first model's rate minus the second's.
        margin: In (0, 1).
        alpha: One-sided level.

    Raises:
        ValueError: the rates are impossible, or n is not positive.

    Source: the test of Tango (1998); Liu et al. (2002), Statistics in Medicine 21, for the design.
    """
    check_margin(margin)
    if n < 1:
        raise ValueError(f"power needs at least one prompt: {n}")
    if not abs(true_difference) <= discordant_rate <= 1:
        raise ValueError(
            f"the share of prompts on which the models differ must be from |{true_difference}| to 1: {discordant_rate}"
        )
    gain, loss = (discordant_rate + true_difference) / 2, (discordant_rate - true_difference) / 2
    losses = _likely(n, loss)
    z = NormalDist().inv_cdf(1 - alpha)
    most = _most(lambda gains: tango_score(gains, losses, n, margin) < -z, n - losses)
    share = min(1.0, gain / (1 - loss)) if loss < 1 else 0.0
    chances = stats.binom.pmf(losses, n, loss) * stats.binom.cdf(most, n - losses, share)
    return min(1.0, float(chances.sum()))


def prompts_needed(
    discordant_rate: float, true_difference: float, margin: float, alpha: float = 0.05, power: float = 0.8
) -> int:
    """Return how many paired prompts show non-inferiority with the required power.

    Since counts are integers, power falls a little before each rise: the result is the smallest number that has the
    power and keeps it for as long as such a fall may last.

    Args:
        discordant_rate: Share of prompts on which the two models differ, as observed so far.
        true_difference: First rate minus second; below the margin.
        margin: In (0, 1).
        alpha: One-sided level.
        power: The probability of showing it, in (0, 1).

    Returns:
        The number of independent prompts; for clustered ones, multiply it by n over `effective_size`.

    Raises:
        ValueError: the true difference is not below the margin, so no number is enough; or the rates are impossible.
    """
    _check_decidable(true_difference, margin, power)

    def reached(n: int) -> float:
        return power_of(n, discordant_rate=discordant_rate, true_difference=true_difference, margin=margin, alpha=alpha)

    return _least(reached, power, tooth=math.ceil(1 / margin))


def _check_decidable(true_difference: float, margin: float, power: float) -> None:
    check_margin(margin)
    if not 0 < power < 1:
        raise ValueError(f"power must be a probability in (0, 1): {power}")
    if true_difference >= margin:
        raise ValueError(f"a difference of {true_difference} is not below {margin}: no number of prompts shows that")


def _least(reached: Callable[[int], float], power: float, tooth: int) -> int:
    """Return the least n from which on the power stays reached for `tooth` more prompts."""
    high = 1
    while reached(high) < power:
        high *= 2
        if high > MOST_PROMPTS:
            raise ValueError(f"more than {MOST_PROMPTS:,} prompts would be needed")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) >= power else (middle, high)
    failing = [n for n in range(high, high + tooth + 1) if reached(n) < power]
    while failing:
        high = failing[-1] + 1
        failing = [n for n in range(high, high + tooth + 1) if reached(n) < power]
    return high


def _likely(n: int, rate: float) -> NDArray[np.float64]:
    """Return the counts of n that occur with more than a negligible probability."""
    low, high = stats.binom.ppf([NEGLIGIBLE, 1 - NEGLIGIBLE], n, rate)
    return np.arange(max(0.0, low), min(n, high) + 1)


def _most(
    passes: Callable[[NDArray[np.float64]], NDArray[np.bool_]], greatest: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the largest counts that still pass, by bisection (if more passes, so does fewer); −1 if none does."""
    low, high = np.full_like(greatest, -1.0), greatest + 1
    while (high - low > 1).any():
        middle = np.floor((low + high) / 2)
        is_within = (high - low > 1) & passes(np.clip(middle, 0, greatest))
        low, high = np.where(is_within, middle, low), np.where(is_within | (high - low <= 1), high, middle)
    return low
