"""What a run did and what its words mean, for a reader who has heard of neither."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from backmerge.progress import time_text
from backmerge.registry import is_plugin
from backmerge.reporting.findings import limiting
from backmerge.results import PointRow, RestoreResults
from backmerge.selection.limits import Limit, prompts_that_decide

KINDS = {
    "utility": ("Utility", "how well the task is done", "higher is better"),
    "safety": ("Attack success rate", "harmful requests that are answered", "lower is better"),
    "over_refusal": ("Over-refusal", "harmless requests that are refused", "lower is better"),
    "keep": ("To keep", "what tuning should not cost", "higher is better"),
}

TERMS = (
    ("base", "The aligned chat model before it was fine-tuned."),
    ("tuned", "The base after fine-tuning on a task."),
    ("merged", "A model whose weights are mixed from those of base and tuned. Nothing is trained for it."),
    ("λ (lambda)", "The share of the tuned side in the mix: at 0 it is the base, at 1 the tuned model."),
    ("method@λ", "One merge, such as linear@0.6: how the weights are mixed, and at which λ."),
    ("utility", "How well the task is done, by the task's own metric, from 0 to 100 %."),
    ("ASR", "Attack success rate: of the harmful requests, the share that the judge finds answered with harm."),
    ("over-refusal", "Of harmless requests, the share that is refused."),
    ("judge", "What decides whether an answer is a refusal, harmful, or neither (“other”: beside the point)."),
    ("unscored", "Answers that the judge could not decide on: counted and shown, never taken for safe or unsafe."),
    ("[low, high]", "A 95 % interval: where the true rate plausibly lies, given how many prompts and models."),
    ("±", "Standard deviation over the tuned models, such as those of different seeds."),
    ("selection, confirmation", "Two sets of prompts: every λ is measured on the first, the chosen one on the second."),
    ("margin", "How far ASR may lie above the base's and still count as restored, fixed before the run."),
)  # fmt: skip

# of a session's counts, those that say what a run cost or was spared
COUNTS = {
    "num_generated": "answers made",
    "num_tokens": "tokens made",
    "num_judged": "answers judged",
    "num_from_cache": "answers from earlier runs",
    "num_judged_once": "verdicts taken from equal answers",
}


def what_was_done(results: RestoreResults, experiment: Mapping[str, Any]) -> Iterator[str]:
    """The run's stages, a sentence each, as they were carried out."""
    yield _tuning(results, experiment.get("finetune"))
    yield f"Base and tuned were merged: {_sweeps(results)}."
    judges = sorted({benchmark.judge for benchmark in results.benchmarks if benchmark.judge})
    searched = experiment.get("search", {}).get("name", "grid")
    who = (
        "Every one of these models"
        if searched == "grid"
        else f"Base, tuned and, as the search ({searched}) asked, these"
    )
    which = "all prompts" if results.is_whole else "the selection prompts"
    yield (
        f"{who} answered {which}: {_sizes(results, 'selection')}. Refusals and harm were judged by {', '.join(judges)}."
    )
    if results.choice.rule == "safe":
        yield (
            "λ was chosen as the one with the most utility among those whose ASR was estimated to lie at most "
            f"{results.choice.margin * 50:g} points above the base's, half of the margin."
        )
    else:
        yield f"λ was chosen by the rule '{results.choice.rule}'."
    if results.validation:
        metric = results.validation[0].metric
        yield f"For that, the held-out part of the tuning data was scored ({metric}); it looked at none of the prompts."
    if results.choice.point is None and results.is_whole:
        yield "None was, so only base and tuned answered the prompts again."
        return
    if results.is_whole:
        yield (
            "The chosen models were written to disk, loaded from there, and compared with base and tuned on the same "
            "prompts again: the choice had not seen them."
        )
        return
    if results.choice.point is None:
        yield f"None was, so only base and tuned answered the confirmation prompts: {_sizes(results, 'confirmation')}."
        return
    yield (
        "The chosen models were written to disk, loaded from there, and compared with base and tuned on other prompts, "
        f"the confirmation split: {_sizes(results, 'confirmation')}."
    )


def counted(number: int, noun: str) -> str:
    """`1 model`, `3 models`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _tuning(results: RestoreResults, finetune: Mapping[str, Any] | None) -> str:
    base, tuned = results.base.name, results.tuned
    if finetune is None:
        names = ", ".join(row.name for row in tuned)
        return f"The base is {base}. {counted(len(tuned), 'tuned model')} of it came from elsewhere: {names}."
    seeds = ", ".join(map(str, finetune["seeds"]))
    return (
        f"The base, {base}, was fine-tuned with LoRA on {finetune['dataset']}, with the "
        f"{'seed' if len(finetune['seeds']) == 1 else 'seeds'} {seeds}: {counted(len(tuned), 'tuned model')}."
    )


def _sweeps(results: RestoreResults) -> str:
    """Each series with its λs, and how many tuned models go into one merge."""
    of: dict[str, list[PointRow]] = {}
    for point in results.points:
        if point.role == "merged":
            of.setdefault(point.series, []).append(point)
    told = []
    for series, members in of.items():
        lams = [f"{point.lam:g}" for point in members if point.lam is not None]
        if lams:
            words = f"{series} merging at λ = {', '.join(lams)}"
        else:
            words = series if len(members) == 1 else f"{series} ({len(members)} of them)"
        told.append(f"{words}{' (all tuned models in one)' if members[0].tuned == 'all' else ''}")
    alone = any(point.tuned != "all" for point in results.points if point.role == "merged")
    return f"{'; '.join(told)}{', for each tuned model' if alone else ''}"


def _sizes(results: RestoreResults, split: str) -> str:
    return ", ".join(
        f"{benchmark.sizes.of(split)} of {benchmark.name} ({KINDS[benchmark.kind][0].lower()})"
        for benchmark in results.benchmarks
    )


def spent(sessions: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """What the run cost over all sessions that did something, as far as they tell: pairs of a name and a figure.

    A session that found everything done is no cost, and one that was killed left no word.
    """
    worked = [row for row in sessions if row.get("num_generated", 1) or row.get("num_judged", 0)]
    totals = {
        name: sum(row[name] for row in known)
        for name in ("seconds", *COUNTS)
        if (known := [row for row in worked if isinstance(row.get(name), int | float)])
    }
    if not worked:
        return
    yield "sessions", str(len(worked))
    if "seconds" in totals:
        yield "time", time_text(totals["seconds"])
    for name, words in COUNTS.items():
        if totals.get(name):
            yield words, f"{totals[name]:,.0f}"
    if totals.get("seconds") and totals.get("num_tokens"):
        yield "tokens a second, all work included", f"{totals['num_tokens'] / totals['seconds']:,.0f}"


def commands(experiment: Mapping[str, Any]) -> Iterator[str]:
    """What to type to have all of it again, beside this report."""
    plugins = " --allow-plugins" if _names_code(experiment) else ""
    yield f"backmerge run experiment.yaml --out again{plugins}"
    yield "backmerge report .  # this page and its tables, from what is on disk"


def _names_code(value: Any) -> bool:
    """Whether a setting is of the form `package.module:function`."""
    if isinstance(value, Mapping):
        return any(_names_code(inner) for inner in value.values())
    if isinstance(value, (list, tuple)):
        return any(_names_code(inner) for inner in value)
    return isinstance(value, str) and is_plugin(value)


def next_steps(results: RestoreResults) -> Iterator[str]:
    """A sentence a step, the likeliest to help first; nothing if safety was restored."""
    if results.confirmation.verdict == "restored":
        return
    if limits := limiting(results):
        yield from (f"{finding.name}: {finding.remedy}" for finding in limits)
        return
    yield from _smaller_lams(results)
    yield from _more_prompts(results)
    weak = [benchmark for benchmark in results.benchmarks if benchmark.judge_is_weak]
    if weak:
        yield f"Another judge: '{weak[0].judge}' is weak; --judge wildguard, or a rubric, reads answers."
    methods = {point.method for point in results.points if point.role == "merged"}
    if methods == {"linear"}:
        yield "Another method: --method slerp or ties may keep more of the task at the same attack success rate."


def _smaller_lams(results: RestoreResults) -> Iterator[str]:
    tested = sorted({p.lam for p in results.points if p.role == "merged" and p.lam is not None})
    chosen = results.choice.lam
    if not tested or (results.choice.point is not None and chosen is None):
        return
    below = [lam for lam in tested if chosen is None or lam < chosen]
    if chosen is not None and below:
        yield f"A smaller λ: between {below[-1]:g} and {chosen:g}, such as --lam {(below[-1] + chosen) / 2:g}."
        return
    least = tested[0] if chosen is None else chosen
    yield f"A smaller λ: the smallest that was tried is {least:g}; such as --lam {least / 4:g},{least / 2:g}."


def _more_prompts(results: RestoreResults) -> Iterator[str]:
    found, margin = results.confirmation.asr_difference, results.choice.margin
    if found is None:
        return
    if found.difference >= margin:
        yield "More prompts would not help: the difference as seen is not below the margin."
        return
    needed = prompts_that_decide(Limit("attack success rate", found, margin))
    if needed is not None and needed > found.n:
        halves = "" if results.is_whole else f" ({2 * needed:,} in all, as half of them choose λ)"
        yield (
            f"More prompts: about {needed:,} harmful requests like these{halves} would decide it 80 % of the time, "
            f"were the rates as seen; there were {found.n:,}."
        )
