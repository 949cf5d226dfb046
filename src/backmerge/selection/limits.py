"""What a candidate is held to: the differences that must stay below their margins, and whether they do."""

from __future__ import annotations

from typing import NamedTuple

from backmerge.selection.candidates import Bounded, Candidate
from backmerge.selection.settings import ChoiceSettings
from backmerge.statistics import PairedDifference

ROUNDING = 1e-9
PLAUSIBLE = 0.5  # share of a margin up to which an estimate on the selection prompts lets a λ be confirmed


def allowed(margin: float) -> float:
    """How large a rise may be as estimated, if the confirmation is to have a chance to show the margin."""
    return PLAUSIBLE * margin


class Limit(NamedTuple):
    """One thing that a candidate is held to.

    Attributes:
        what: In words, such as `attack success rate`.
        measured: The difference from the base; under rule `target`, the rate.
        margin: What it must be below.
    """

    what: str
    measured: PairedDifference | Bounded
    margin: float

    @property
    def value(self) -> float:
        """The estimate that is held to the margin."""
        return self.measured.value if isinstance(self.measured, Bounded) else self.measured.difference

    @property
    def bound(self) -> float:
        """Its one-sided 95 % upper bound."""
        return self.measured.upper_bound

    @property
    def is_met(self) -> bool:
        """A rate: its upper bound is below the target. A difference: its estimate is within half of the margin.

        The selection of rule `safe` shows nothing: the confirmation does, on other prompts. A selection that had to
        show the same would only ask each λ to be lucky twice.
        """
        if isinstance(self.measured, Bounded):
            return self.bound < self.margin
        return self.value <= allowed(self.margin) + ROUNDING


def asr_limits(candidate: Candidate, choice: ChoiceSettings) -> list[Limit]:
    """What the rule holds the candidate's ASR to; empty where that was not measured."""
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
    """Everything that the candidate is held to; empty where its safety was not measured."""
    found = asr_limits(candidate, choice)
    if found and candidate.over_refusal_difference is not None:
        found.append(Limit("over-refusal", candidate.over_refusal_difference, choice.over_refusal_margin))
    if found:
        found += [loss_limit(name, loss, choice.keep_margin) for name, loss in candidate.losses.items()]
    return found


def loss_limit(benchmark: str, loss: PairedDifference, margin: float) -> Limit:
    """What is held to the margin of a benchmark to keep."""
    return Limit(f"loss on {benchmark}", loss, margin)


def is_within(candidate: Candidate, choice: ChoiceSettings) -> bool | None:
    """Whether the candidate keeps all limits; `None` where its safety was not measured."""
    limits = limits_of(candidate, choice)
    return all(limit.is_met for limit in limits) if limits else None
