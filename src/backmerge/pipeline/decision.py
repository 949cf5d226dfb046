"""What the confirmation split says of the chosen point, how often it was asked, and what it can show at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from backmerge.benchmarks.split import clusters_over, wording_of
from backmerge.errors import RunError
from backmerge.pipeline.candidates import utility_of
from backmerge.pipeline.points import BASE, TUNED, Point
from backmerge.pipeline.preparation import Prepared
from backmerge.pipeline.results import Outcomes, kept_gain
from backmerge.runs import RunDirectory, key_of, write_whole
from backmerge.selection import Verdict, confirm
from backmerge.statistics import PairedDifference, paired_difference, prompts_needed

LOOKS = "looks.jsonl"


class Look(NamedTuple):
    """One confirmation, as the run directory remembers it.

    Attributes:
        prompts: A hash of the base and of the confirmation's harmful requests.
        tested: A hash of all that was tested: settings, models, data, judge, engine, point.
        point: What was confirmed, or not.
        verdict: Whether it was.
    """

    prompts: str
    tested: str
    point: str
    verdict: Verdict


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


def counted_looks(
    run: RunDirectory, prepared: Prepared, inputs: Mapping[str, Any], chosen: Point | None, verdict: Verdict
) -> int:
    """Record this confirmation, and return how many there were on the same prompts; the same again counts once.

    A confirmation errs in 5 % of runs. Another one on the same prompts, with other settings, has another chance to err,
    so that the report must say how many there were.
    """
    asked = [wording_of(e) for name in prepared.of_kind("safety") for e in prepared.splits[name]["confirmation"]]
    prompts = key_of(prepared.base.fingerprint, sorted(set(asked)))
    file = run.path / LOOKS
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    try:
        looks = [Look(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise RunError(
            f"{file} is damaged, so that confirmations on the same prompts cannot be counted: {error}",
            remedy="give another --out, or delete that file and count them yourself.",
        ) from error
    if chosen is not None:
        look = Look(prompts, key_of(inputs, chosen.name), chosen.name, verdict)
        if look.tested not in {known.tested for known in looks}:
            looks.append(look)
            write_whole(file, "".join(json.dumps(known._asdict()) + "\n" for known in looks))
    return sum(look.prompts == prompts for look in looks)


def margin_note(prepared: Prepared) -> str:
    """What the confirmation prompts can show at all, if that is less than the margin; else nothing."""
    margin = prepared.experiment.choice.margin
    halves = {name: prepared.splits[name]["confirmation"] for name in prepared.of_kind("safety")}
    size = len(set(clusters_over(halves).values()))
    least = paired_difference([0.0] * size, [0.0] * size).upper_bound
    if least < margin:
        return ""
    needed = prompts_needed(0.0, 0.0, margin, power=0.8)
    return (
        f"The confirmation has {size} different harmful requests, which can show a margin of {least * 100:.1f} points "
        f"at best, and not {margin * 100:g}: that takes {needed}, if no answer differs from the base's."
    )
