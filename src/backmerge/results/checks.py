"""The parts of what `check` found, and of what another judge makes of a run."""

from __future__ import annotations

from backmerge.results.parts import BenchmarkKind, Difference, Part
from backmerge.selection.candidates import Verdict


class CheckFindings(Part):
    """The verdict of a check, with the figures that it depends on.

    Attributes:
        verdict: `restored` (as safe as the base), `not shown` or `worse`.
        measured_verdict: The verdict of the figures alone, without the findings.
        margin: How far the attack success rate may exceed the base's.
        asr_difference: The model's attack success rate less the base's.
        asr_difference_if_unscored_harmful: The same with every unscored answer taken for harmful here and for safe at
            the base.
        what_would_decide: What would decide an open verdict; null if it is not open.
        other_difference: The same of answers that are neither refused nor harmful; null if not measured.
        over_refusal_margin: How far over-refusal may exceed the base's.
        over_refusal_difference: Over-refusal less the base's; null if not measured.
        utility_difference: Utility less the base's; null if not measured.
    """

    verdict: Verdict
    measured_verdict: Verdict | None = None
    margin: float
    asr_difference: Difference
    asr_difference_if_unscored_harmful: Difference
    what_would_decide: str | None = None
    other_difference: Difference | None = None
    over_refusal_margin: float
    over_refusal_difference: Difference | None = None
    utility_difference: Difference | None = None


class CheckRow(Part):
    """A metric at both models, on one benchmark or on all of a kind.

    Attributes:
        kind: `utility`, `safety` or `over_refusal`.
        benchmarks: Which.
        metric: The metric.
        base: The base's mean.
        model: The model's mean.
        difference: The model's less the base's.
        margin: What the difference is compared with; null if nothing.
        kept: Whether it is kept, in words; null if there is no margin.
        unscored: Answers that were not scored, of both.
    """

    kind: BenchmarkKind
    benchmarks: tuple[str, ...]
    metric: str
    base: float
    model: float
    difference: Difference
    margin: float | None
    kept: str | None
    unscored: int


class RedecidedPoint(Part):
    """A point as another judge sees it on the selection split.

    Attributes:
        point: The point.
        lam: Its λ.
        utility: Mean utility, as the run measured it.
        asr_difference: Its attack success rate less the base's.
    """

    point: str
    lam: float | None
    utility: float | None
    asr_difference: Difference


class Redecision(Part):
    """What another judge's findings make of a run, whose answers it looked at again.

    Attributes:
        point: The point that the run chose.
        margin: How far the attack success rate may exceed the base's.
        verdict: The verdict on that point by this judge.
        earlier_verdict: The run's verdict.
        asr_difference: Its attack success rate less the base's; null if there are no answers to compare.
        chosen_by_this_judge: The point that the rule chooses by this judge; null if none passes.
        candidates: The points.
    """

    point: str | None
    margin: float
    verdict: Verdict
    earlier_verdict: Verdict
    asr_difference: Difference | None
    chosen_by_this_judge: str | None
    candidates: tuple[RedecidedPoint, ...]


class Fingerprints(Part):
    """Hashes of the weights that were compared.

    Attributes:
        base: The base's; null if its weights are not here.
        model: The model's; null likewise.
    """

    base: str | None
    model: str | None
