"""What the prompts could not decide, and how many would."""

from __future__ import annotations

import math
from statistics import NormalDist

from scipy import optimize

from backmerge.selection.candidates import Bounded
from backmerge.selection.limits import Limit
from backmerge.statistics import PairedDifference, prompts_needed, tango_bound

MOST_PROMPTS = 100_000  # beyond which no set of harmful prompts goes
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
    if value >= margin:
        return None
    rate = value if isinstance(measured, Bounded) else discordant_rate(measured)
    z = NormalDist().inv_cdf(0.95) + NormalDist().inv_cdf(POWER)
    # the normal approximation spares the exact sum where it would be long and its answer of no use
    if z * z * (rate - value * value) / (margin - value) ** 2 > MOST_PROMPTS:
        return None
    if isinstance(measured, Bounded):
        needed = math.ceil(z * z * max(rate * (1 - rate), margin * (1 - margin)) / (margin - value) ** 2)
    else:
        needed = prompts_needed(rate, value, margin, power=POWER)
    # near-duplicates count less than one
    return math.ceil(needed * measured.n / measured.n_effective)


def what_would_decide(point: str, limit: Limit) -> str:
    """A sentence on a limit that was not shown to be kept."""
    value, margin = f"{limit.value * 100:+.1f}", f"{limit.margin * 100:g}"
    if limit.measured.lower_bound > limit.margin:
        return f"{point} is shown to exceed the limit of {margin} points in {limit.what}."
    head = f"{point} could not be decided with these {limit.measured.n} prompts ({limit.what} {value} points)"
    if limit.value >= limit.margin:
        return f"{head}: were the difference as large as seen, no number of prompts would show it below {margin}."
    needed = prompts_that_decide(limit)
    if needed is None:
        return f"{head}: more than {MOST_PROMPTS:,} would be needed, were the rates as seen."
    return f"{head}: about {needed:,} like them would decide it 80 % of the time, were the rates as seen."
