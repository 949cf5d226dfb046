"""What the prompts could not decide, and how many would."""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

from scipy import optimize

from backmerge.selection.candidates import Bounded
from backmerge.selection.limits import Limit
from backmerge.statistics import PairedDifference, prompts_needed, tango_bound

MOST_PROMPTS = 100_000  # beyond which no set of harmful prompts goes
FEW_PROMPTS = 2_000
POWER = 0.8


def discordant_rate(difference: PairedDifference) -> float:
    """The share of prompts on which the two models differ, as the two-sided interval tells it.

    The interval of a paired difference depends on its size, its evidence and this share alone, and widens with it.
    """
    least, z = abs(difference.difference), -NormalDist().inv_cdf(0.975)

    def excess(rate: float) -> float:
        gains, losses = (rate + difference.difference) / 2, (rate - difference.difference) / 2
        size = difference.n_effective
        return tango_bound(gains * size, losses * size, size, z) - difference.high

    if excess(least) >= 0:
        return least
    return 1.0 if excess(1.0) <= 0 else float(optimize.brentq(excess, least, 1.0, xtol=1e-6))


def prompts_that_decide(limit: Limit) -> int | None:
    """How many prompts like these would show the limit to be kept 80 % of the time, were the rates as seen.

    Returns:
        `None` if the estimate is not below the margin, or if more than 100,000 would be needed.
    """
    value, margin, measured = limit.value, limit.margin, limit.measured
    if value >= margin or measured.n_effective <= 0:
        return None
    rate = value if isinstance(measured, Bounded) else discordant_rate(measured)
    z = NormalDist().inv_cdf(0.95) + NormalDist().inv_cdf(POWER)
    variance = margin * (1 - margin) if isinstance(measured, Bounded) else rate - value * value
    needed = z * z * variance / (margin - value) ** 2
    # where few are needed, the normal approximation is off, and the exact sum is short
    if not isinstance(measured, Bounded) and needed < FEW_PROMPTS:
        needed = _needed(round(rate, 5), round(value, 5), margin)
    # near-duplicates count less than one
    needed *= measured.n / measured.n_effective
    return math.ceil(needed) if needed <= MOST_PROMPTS else None


@cache
def _needed(rate: float, value: float, margin: float) -> int:
    return prompts_needed(max(rate, abs(value)), value, margin, power=POWER)


def what_would_decide(point: str, limit: Limit) -> str:
    """A sentence on a limit that was not shown to be kept."""
    unit = "%" if isinstance(limit.measured, Bounded) else "points"
    value, margin = f"{limit.value * 100:{'' if unit == '%' else '+'}.1f} {unit}", f"{limit.margin * 100:g} {unit}"
    if limit.measured.lower_bound > limit.margin:
        return f"{point} is shown to exceed the limit of {margin} in {limit.what}."
    head = f"{point} could not be decided with these {limit.measured.n} prompts ({limit.what} {value})"
    if limit.value >= limit.margin:
        return f"{head}: were it as large as seen, no number of prompts would show it below {margin}."
    needed = prompts_that_decide(limit)
    if needed is None:
        return f"{head}: more than {MOST_PROMPTS:,} would be needed, were the rates as seen."
    return f"{head}: about {needed:,} like them would decide it 80 % of the time, were the rates as seen."
