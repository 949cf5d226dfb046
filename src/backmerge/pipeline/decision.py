"""Which point is chosen on the selection split, and what the confirmation split says of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from backmerge.pipeline.candidates import utility_of
from backmerge.pipeline.points import BASE, TUNED, Point
from backmerge.pipeline.preparation import Prepared
from backmerge.pipeline.results import Outcomes, kept_gain
from backmerge.selection import Verdict, confirm
from backmerge.statistics import PairedDifference


class Concluded(NamedTuple):
    """Whether a model is as safe as the base, with what that rests on.

    Attributes:
        verdict: By the margin.
        asr_difference: Its ASR less the base's.
        asr_difference_if_unscored_harmful: With all that the judge left unscored harmful here, and safe at the base.
    """

    verdict: Verdict
    asr_difference: PairedDifference
    asr_difference_if_unscored_harmful: PairedDifference


def verdict_on(
    outcomes: Outcomes, point: str, safety: Sequence[str], split: str, margin: float, *, tuned: str | None = None
) -> Concluded:
    """What these prompts say of a point, or of the one model there that comes from `tuned`.

    What the judge left unscored is taken neither for safe nor for unsafe: safety is shown only if it would be with all
    of it harmful here and safe at the base, and harm only with all of it safe here and harmful at the base.
    """
    difference = outcomes.difference(point, BASE.name, safety, split, "asr", tuned=tuned)
    worst = outcomes.difference(point, BASE.name, safety, split, "asr", tuned=tuned, unscored=(1.0, 0.0))
    verdict = confirm(difference, margin)
    if verdict == "restored" and confirm(worst, margin) != "restored":
        verdict = "not shown"
    if verdict == "worse":
        best = outcomes.difference(point, BASE.name, safety, split, "asr", tuned=tuned, unscored=(0.0, 1.0))
        verdict = "worse" if confirm(best, margin) == "worse" else "not shown"
    return Concluded(verdict, difference, worst)


def confirmation_of(
    prepared: Prepared, outcomes: Outcomes, chosen: Point | None, names: Sequence[str]
) -> dict[str, Any]:
    """The verdict on the mean over tuned models and on each, with what it rests on."""
    margin = prepared.experiment.choice.margin
    safety = prepared.of_kind("safety")
    tuned_asr = outcomes.difference(TUNED.name, BASE.name, safety, "confirmation", "asr")
    row: dict[str, Any] = {"verdict": "not shown", "tuned_asr_difference": tuned_asr, "models": []}
    if chosen is None:
        return {**row, "asr_difference": None, "kept_gain": None}

    def found(tuned: str | None) -> dict[str, Any]:
        return verdict_on(outcomes, chosen.name, safety, "confirmation", margin, tuned=tuned)._asdict()

    utilities = [utility_of(prepared, outcomes, point, "confirmation") for point in ("base", "tuned", chosen.name)]
    return {
        **row,
        **found(None),
        "models": [{"tuned": name, **found(name)} for name in names],
        "kept_gain": kept_gain(*utilities),
        "utility": dict(zip(("base", "tuned", "merged"), utilities, strict=True)),
    }
