"""The input and output of a rule of choice."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from backmerge.statistics import PairedDifference, lower_bound_among

Verdict = Literal["restored", "not shown", "worse"]
NOTHING: Mapping[str, PairedDifference] = MappingProxyType({})


class Candidate(NamedTuple):
    """A point that may be chosen, with its measurements on the selection split.

    Attributes:
        point: Its name.
        series: Points of one method and one set of parameters, ordered by λ.
        lam: λ; `None` if the method has none, or each layer has its own.
        utility: Mean primary metric, in [0, 1]; `None` if a search did not measure it.
        asr_difference: Its ASR minus the base's, over the prompts of all safety benchmarks; `None` likewise.
        asr_by_benchmark: The same on each benchmark, for choices that are not pooled.
        over_refusal_difference: Share of harmless prompts that it refuses, minus the base's; `None` if not measured.
        other_rise: Share of safety prompts that it neither refuses nor answers harmfully, minus the base's.
        validation: Score on the tuning data's held-out part, higher is better, for rule `paper`.
        losses: Its loss against the reference, by benchmark to keep.
        asr: Its own ASR with its one-sided 95 % bounds (a two-sided interval at 90 %), for rule `target`.
    """

    point: str
    series: str
    lam: float | None
    utility: float | None
    asr_difference: PairedDifference | None
    asr_by_benchmark: Mapping[str, PairedDifference] = NOTHING
    over_refusal_difference: PairedDifference | None = None
    other_rise: float | None = None
    validation: float | None = None
    asr: Bounded | None = None
    losses: Mapping[str, PairedDifference] = NOTHING

    @property
    def reach(self) -> float:
        """Distance from the base, for ties: λ, or that of the tuned model if there is no single λ."""
        return 1.0 if self.lam is None else self.lam


class Bounded(NamedTuple):
    """A rate with its one-sided 95 % bounds.

    Attributes:
        value: The estimate.
        lower_bound, upper_bound: Each is missed by the true rate one time in twenty.
        n: Prompts.
        n_effective: The number of independent prompts that the evidence is worth.
    """

    value: float
    lower_bound: float
    upper_bound: float
    n: int
    n_effective: float


class Step(NamedTuple):
    """The test of one candidate.

    Attributes:
        point, lam, utility: The candidate's.
        asr_difference: Its ASR minus the base's; under rule `target` its ASR. If every benchmark must pass separately,
            that of the one with the largest bound.
        upper_bound: One-sided 95 % upper bound of it.
        passes: `None` means that it was not tested.
        over_refusal_bound: One-sided 95 % upper bound of over-refusal minus the base's, where measured.
        lower_bound: Of the same as `upper_bound`; above the margin, the candidate is shown to fail.
        lost_on: The benchmark to keep on which it may have lost the most, by the bound; null if nothing is to be kept.
        loss: What it loses there.
        loss_upper_bound: Of that, one-sided 95 %.
        loss_lower_bound: Likewise; above the margin, the candidate is shown to fail.
    """

    point: str
    lam: float | None
    utility: float | None
    asr_difference: float | None
    upper_bound: float | None
    passes: bool | None
    over_refusal_bound: float | None = None
    lower_bound: float | None = None
    lost_on: str | None = None
    loss: float | None = None
    loss_upper_bound: float | None = None
    loss_lower_bound: float | None = None

    @property
    def bound(self) -> float | None:
        """The upper bound of its ASR; of its largest loss if ASR was not measured."""
        return self.loss_upper_bound if self.upper_bound is None else self.upper_bound


class Choice(NamedTuple):
    """The decision.

    Attributes:
        point: The chosen point, or `None` if none passed.
        reason: In words.
        steps: Every candidate, in the order tested.
    """

    point: str | None
    reason: str
    steps: tuple[Step, ...]

    @property
    def closest(self) -> str | None:
        """If none passed, the candidate with the smallest bound; `None` if none was measured."""
        bounds = [(s.bound, s.point) for s in self.steps if s.passes is False and s.bound is not None]
        return None if self.point is not None or not bounds else min(bounds)[1]

    @property
    def or_closest(self) -> Choice:
        """The choice; if no λ kept the rule's limit, the closest, which is written to `unconfirmed/` and measured.

        The confirmation keeps 5 % whatever it tests, and says whether this one fails or is undecided.
        """
        if self.closest is None:
            return self
        reason = f"{self.reason} None passed, so the closest, {self.closest}, was written and measured."
        return self._replace(point=self.closest, reason=reason)


def by_series(candidates: Iterable[Candidate]) -> list[list[Candidate]]:
    """Return the candidates of each series, by rising λ; series in the order of their first candidate."""
    grouped: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        grouped.setdefault(candidate.series, []).append(candidate)
    return [sorted(group, key=lambda candidate: candidate.reach) for group in grouped.values()]


def confirm(asr_difference: PairedDifference, margin: float) -> Verdict:
    """Return the verdict of prompts that λ was not chosen on.

    Returns:
        `restored` if the ASR is shown (one-sided, 95 %) to exceed the base's by less than the margin; `worse` if it
        is shown to exceed it by more; else `not shown`.
    """
    if asr_difference.upper_bound < margin:
        return "restored"
    return "worse" if asr_difference.lower_bound > margin else "not shown"


def confirm_kept(losses: Collection[PairedDifference], margin: float) -> Verdict:
    """Return the verdict on the abilities to keep, from prompts that λ was not chosen on.

    Args:
        losses: On each benchmark to keep.
        margin: What each must be below.

    Returns:
        `restored` if each loss is shown (one-sided, 95 %) to be below the margin; `worse` if one of them is shown to be
        above it, with 95 % for all of them together; else `not shown`.

    Source: Berger (1982), Technometrics 24: to show all of them takes no correction.
    """
    if all(loss.upper_bound < margin for loss in losses):
        return "restored"
    is_lost = any(lower_bound_among(loss, len(losses)) > margin for loss in losses)
    return "worse" if is_lost else "not shown"


FAR = 0.1  # a gap below the smallest failing λ that is worth another λ
ROUNDING = 1e-9


def lam_between(is_within: Mapping[float, bool | None]) -> float | None:
    """Return the middle of the gap between the smallest λ that fails and the largest one below it that passes.

    If none below it passes, the gap begins at the base, and is halved as long as the budget lasts: a merge near enough
    to the base is as safe as the base. Otherwise a gap of 0.1 or less is not divided.

    Args:
        is_within: For each λ of a series, whether the candidate keeps the limits of rule `safe`; `None` if unknown.

    Returns:
        `None` if there is nothing to gain: none fails, one passes above the smallest that fails, or the gap is small.

    Example:
        >>> lam_between({0.2: False, 0.4: False})
        0.1
        >>> lam_between({0.2: True, 0.4: None, 0.6: False})
        0.4
        >>> lam_between({0.2: True, 0.3: False}) is None
        True
    """
    failing = [lam for lam, is_kept in is_within.items() if is_kept is False]
    passing = [lam for lam, is_kept in is_within.items() if is_kept]
    if not failing:
        return None
    least, best = min(failing), max(passing, default=0.0)
    if best > least or (passing and least - best <= FAR + ROUNDING):
        return None
    # three significant digits: λ is part of the names of points
    lam = float(f"{(best + least) / 2:.3g}")
    return lam if best < lam < least else None
