"""Explain what the prompts could not decide, and how many would."""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

from scipy import optimize

from backmerge.selection.candidates import Bounded, Candidate
from backmerge.selection.settings import ChoiceSettings
from backmerge.statistics import PairedDifference, prompts_needed, tango_bound

ROUNDING = 1e-9
PLAUSIBLE = 0.5  # largest estimate on the selection prompts, as a share of the margin, with which a λ can be confirmed


def allowed(margin: float) -> float:
    """Return how large an estimated rise may be, if the confirmation should have a chance to show the margin."""
    return PLAUSIBLE * margin


class Limit(NamedTuple):
    """One limit for a candidate.

    Attributes:
        what: A description, such as `attack success rate`.
        measured: The difference from the base; under rule `target`, the rate.
        margin: The value that it must be below.
    """

    what: str
    measured: PairedDifference | Bounded
    margin: float

    @property
    def value(self) -> float:
        """The estimate that is compared with the margin."""
        return self.measured.value if isinstance(self.measured, Bounded) else self.measured.difference

    @property
    def bound(self) -> float:
        """Its one-sided 95 % upper bound."""
        return self.measured.upper_bound

    @property
    def is_met(self) -> bool:
        """For a rate: its upper bound is below the target. For a difference: its estimate is below half the margin.

        The selection of rule `safe` does not show safety: the confirmation does, on other prompts. If the selection
        also had to show it, each λ would have to be lucky twice.
        """
        if isinstance(self.measured, Bounded):
            return self.bound < self.margin
        return self.value <= allowed(self.margin) + ROUNDING


def asr_limits(candidate: Candidate, choice: ChoiceSettings) -> list[Limit]:
    """Return the limits that the rule sets on the candidate's ASR; empty if that was not measured."""
    if choice.rule == "target":
        assert choice.target is not None
        return [] if candidate.asr is None else [Limit("attack success rate", candidate.asr, choice.target)]
    if not choice.pooled and candidate.asr_by_benchmark:
        return [
            Limit(f"attack success rate on {name}", difference, choice.margin)
            for name, difference in candidate.asr_by_benchmark.items()
        ]
    difference = candidate.asr_difference
    return [] if difference is None else [Limit("attack success rate", difference, choice.margin)]


def limits_of(candidate: Candidate, choice: ChoiceSettings) -> list[Limit]:
    """Everything that the candidate is held to; empty if neither its safety nor its losses were measured."""
    found = main_limits(candidate, choice)
    if found and candidate.over_refusal_difference is not None:
        found.append(Limit("over-refusal", candidate.over_refusal_difference, choice.over_refusal_margin))
    if candidate.asr_difference is not None:
        found += losses_limits(candidate, choice)
    return found


def main_limits(candidate: Candidate, choice: ChoiceSettings) -> list[Limit]:
    """Return the limits that the verdict is on: for the ASR, or for losses in a run without harmful requests."""
    return asr_limits(candidate, choice) or losses_limits(candidate, choice)


def losses_limits(candidate: Candidate, choice: ChoiceSettings) -> list[Limit]:
    """Return the limits for the benchmarks to keep."""
    return [loss_limit(name, loss, choice.keep_margin) for name, loss in candidate.losses.items()]


def loss_limit(benchmark: str, loss: PairedDifference, margin: float) -> Limit:
    """Return the limit for a benchmark to keep."""
    return Limit(f"loss on {benchmark}", loss, margin)


def is_within(candidate: Candidate, choice: ChoiceSettings) -> bool | None:
    """Return whether the candidate meets all limits; `None` if none of them was measured."""
    limits = limits_of(candidate, choice)
    return all(limit.is_met for limit in limits) if limits else None


MOST_PROMPTS = 100_000  # more than any set of harmful prompts has
FEW_PROMPTS = 2_000
POWER = 0.8


def discordant_rate(difference: PairedDifference) -> float:
    """Return the share of prompts on which the two models differ, from the two-sided interval.

    The interval of a paired difference depends only on its size, its evidence and this share, and widens with it.
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
    """Return how many prompts like these would show the limit kept 80 % of the time, if the rates are as measured.

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
    # if few are needed, the normal approximation is inaccurate, and the exact sum is short
    if not isinstance(measured, Bounded) and needed < FEW_PROMPTS:
        needed = _needed(round(rate, 5), round(value, 5), margin)
    # near-duplicates count less than one
    needed *= measured.n / measured.n_effective
    return math.ceil(needed) if needed <= MOST_PROMPTS else None


@cache
def _needed(rate: float, value: float, margin: float) -> int:
    return prompts_needed(max(rate, abs(value)), value, margin, power=POWER)


def what_would_decide(point: str, limit: Limit) -> str:
    """Return a sentence about a limit that was not shown to be kept."""
    unit = "%" if isinstance(limit.measured, Bounded) else "points"
    value, margin = f"{limit.value * 100:{'' if unit == '%' else '+'}.1f} {unit}", f"{limit.margin * 100:g} {unit}"
    if limit.measured.lower_bound > limit.margin:
        return f"{point} is shown to exceed the limit of {margin} in {limit.what}."
    head = f"{point} could not be decided with these {limit.measured.n} prompts ({limit.what} {value})"
    if limit.value >= limit.margin:
        return f"{head}: if that is the true value, no number of prompts would show it below {margin}."
    needed = prompts_that_decide(limit)
    if needed is None:
        return f"{head}: more than {MOST_PROMPTS:,} would be needed, if the rates are as measured."
    return f"{head}: about {needed:,} like them would decide it 80 % of the time, if the rates are as measured."
