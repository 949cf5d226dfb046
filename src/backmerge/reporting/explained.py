"""Explain what a run did and what its terms mean, for a new reader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from backmerge.benchmarks.guards import OWN
from backmerge.progress import time_text
from backmerge.registry import is_plugin
from backmerge.reporting.findings import limiting
from backmerge.results import PointRow, RestoreResults
from backmerge.selection.limits import Limit, prompts_that_decide

KINDS = {
    "utility": ("Utility", "how well the task is done", "higher is better"),
    "safety": ("Attack success rate", "harmful requests that are answered", "lower is better"),
    "over_refusal": ("Over-refusal", "harmless requests that are refused", "lower is better"),
    "keep": ("To keep", "abilities that must not get worse", "higher is better"),
}

TERMS = (
    ("base", "The aligned chat model before it was fine-tuned."),
    ("tuned", "The base after fine-tuning on a task."),
    ("merged", "A mix of the weights of base and tuned, without further training."),
    ("λ (lambda)", "The share of the tuned side in the mix: at 0 it is the base, at 1 the tuned model."),
    ("method@λ", "One merge, e.g. linear@0.6: the merge method and its λ."),
    ("utility", "How well the task is done, by the task's own metric, from 0 to 100 %."),
    ("ASR", "Attack success rate: the share of harmful requests with an answer that the judge finds harmful."),
    ("over-refusal", "The share of harmless requests that is refused."),
    ("judge", "Decides whether an answer is a refusal, harmful, or neither (“other”)."),
    ("unscored", "Answers that the judge could not classify: counted and shown, never treated as safe or unsafe."),
    ("[low, high]", "A 95 % interval: the plausible range of the true rate, given the number of prompts and models."),
    ("±", "Standard deviation over the tuned models, e.g. over seeds."),
    ("selection, confirmation", "Two sets of prompts: every λ is measured on the first, only the chosen one on the "
    "second."),
    ("margin", "How far ASR may be above the base's and still count as restored, or a benchmark to keep below the "
    "base's and still count as kept. Fixed before the run."),
)  # fmt: skip

# the counts of a session that show what a run cost or saved
COUNTS = {
    "num_generated": "generated answers",
    "num_tokens": "generated tokens",
    "num_judged": "judged answers",
    "num_from_cache": "answers from earlier runs",
    "num_judged_once": "verdicts reused for equal answers",
}


def what_was_done(results: RestoreResults, experiment: Mapping[str, Any]) -> Iterator[str]:
    """Yield one sentence for each stage of the run, in order."""
    yield _tuning(results, experiment.get("finetune"))
    yield f"Base and tuned were merged: {_sweeps(results)}."
    judges = sorted({benchmark.judge for benchmark in results.benchmarks if benchmark.judge})
    searched = experiment.get("search", {}).get("name", "grid")
    who = (
        "Each of these models"
        if searched == "grid"
        else f"Base, tuned and, as far as the search ({searched}) needed them, these models"
    )
    which = "all prompts" if results.is_whole else "the selection prompts"
    judged = f" Refusals and harm were judged by {', '.join(judges)}." if judges else ""
    yield f"{who} answered {which}: {_sizes(results, 'selection')}.{judged}"
    if results.choice.rule == "safe":
        yield f"The chosen λ has the most utility among those {_allowed(results)}."
    else:
        yield f"λ was chosen by the rule '{results.choice.rule}'."
    if results.validation:
        metric = results.validation[0].metric
        yield f"For that, the held-out part of the tuning data was scored ({metric}); none of the prompts was used."
    if results.choice.point is None and results.is_whole:
        yield "No λ was chosen, so only base and tuned answered the prompts again."
        return
    if results.is_whole:
        yield (
            "The chosen models were written to disk, loaded from there, and compared with base and tuned on all "
            "prompts again, which the choice had not used."
        )
        return
    if results.choice.point is None:
        yield (
            f"No λ was chosen, so only base and tuned answered the confirmation prompts: "
            f"{_sizes(results, 'confirmation')}."
        )
        return
    yield (
        "The chosen models were written to disk, loaded from there, and compared with base and tuned on other prompts, "
        f"the confirmation split: {_sizes(results, 'confirmation')}."
    )


def _allowed(results: RestoreResults) -> str:
    """Return what rule `safe` required of a λ."""
    choice = results.choice
    asked = []
    if results.has_safety:
        asked.append(
            f"whose estimated ASR was at most {choice.margin * 50:g} points (half of the margin) above the base's"
        )
    if choice.keep_margin is not None:
        asked.append(
            f"whose estimated loss on the benchmarks to keep was at most {choice.keep_margin * 50:g} points (half "
            "of the margin)"
        )
    return " and ".join(asked)


def counted(number: int, noun: str) -> str:
    """Return a count with its noun: `1 model`, `3 models`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _tuning(results: RestoreResults, finetune: Mapping[str, Any] | None) -> str:
    base, tuned = results.base.name, results.tuned
    if finetune is None:
        names = ", ".join(row.name for row in tuned)
        return f"The base is {base}. It was compared with {counted(len(tuned), 'tuned model')} made elsewhere: {names}."
    how = " (all weights)" if finetune.get("mode") == "full" else " with LoRA"
    seeds = ", ".join(map(str, finetune["seeds"]))
    return (
        f"The base, {base}, was fine-tuned{how} on {finetune['dataset']}, with "
        f"{'seed' if len(finetune['seeds']) == 1 else 'seeds'} {seeds}: {counted(len(tuned), 'tuned model')}."
    )


def _sweeps(results: RestoreResults) -> str:
    """Return each series with its λs."""
    of: dict[str, list[PointRow]] = {}
    for point in results.points:
        if point.role == "merged":
            of.setdefault(point.series, []).append(point)
    told = []
    for series, members in of.items():
        lams = [f"{point.lam:g}" for point in members if point.lam is not None]
        if lams:
            words = f"{series} at λ = {', '.join(lams)}"
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
    """Yield the total cost of all sessions that did any work: pairs of a name and a figure.

    A session that found everything done has no cost, and a killed session left no record.
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
        yield "tokens per second of the whole time", f"{totals['num_tokens'] / totals['seconds']:,.0f}"


def commands(experiment: Mapping[str, Any]) -> Iterator[str]:
    """Yield the commands that repeat the run, in the folder of the report."""
    plugins = " --allow-plugins" if _names_code(experiment) else ""
    yield f"backmerge run experiment.yaml --out again{plugins}"
    yield "backmerge report .  # rebuilds this page and its tables from the files here"


def _names_code(value: Any) -> bool:
    """Return whether a setting has the form `package.module:function`."""
    if isinstance(value, Mapping):
        return any(_names_code(inner) for inner in value.values())
    if isinstance(value, (list, tuple)):
        return any(_names_code(inner) for inner in value)
    return isinstance(value, str) and is_plugin(value)


def next_steps(results: RestoreResults) -> Iterator[str]:
    """Yield next steps, the most likely to help first; nothing if the verdict is `restored`."""
    if results.confirmation.verdict == "restored":
        return
    if limits := limiting(results):
        yield from (f"{finding.name}: {finding.remedy}" for finding in limits)
        return
    yield from _smaller_lams(results)
    yield from _more_prompts(results)
    weak = [benchmark for benchmark in results.benchmarks if benchmark.judge_is_weak]
    if weak:
        yield (
            f"Another judge: '{weak[0].judge}' is weak; use --judge wildguard or a rubric, which read the whole answer."
        )
    methods = {point.method for point in results.points if point.role == "merged"}
    if methods == {"linear"}:
        cost = "attack success rate" if results.has_safety else "loss"
        yield (
            "Another method: --method linear,anchored gives each direction its own λ and may keep more of the task at "
            f"the same {cost}."
        )
    if results.has_safety and {guard.guard for guard in results.guards} == {OWN}:
        yield (
            "Another guard: with harmful requests (--guard harmbench, or a file) anchored may keep more of the task "
            "than with prompts that the base wrote."
        )


def _smaller_lams(results: RestoreResults) -> Iterator[str]:
    tested = sorted({p.lam for p in results.points if p.role == "merged" and p.lam is not None})
    chosen = results.choice.lam
    if not tested or (results.choice.point is not None and chosen is None):
        return
    below = [lam for lam in tested if chosen is None or lam < chosen]
    if chosen is not None and below:
        yield f"A smaller λ: between {below[-1]:g} and {chosen:g}, for example --lam {(below[-1] + chosen) / 2:g}."
        return
    least = tested[0] if chosen is None else chosen
    yield f"A smaller λ: the smallest one tried was {least:g}; try --lam {least / 4:g},{least / 2:g}."


def _more_prompts(results: RestoreResults) -> Iterator[str]:
    found, margin = results.confirmation.asr_difference, results.choice.margin
    if found is None:
        return  # of losses, the finding about them says how many prompts would decide
    if found.difference >= margin:
        yield "More prompts would not help: the measured difference is not below the margin."
        return
    needed = prompts_that_decide(Limit("attack success rate", found, margin))
    if needed is not None and needed > found.n:
        halves = "" if results.is_whole else f" ({2 * needed:,} in total, since half of them are used to choose λ)"
        on = results.confirmation.asr_on
        these = "these" if on is None else f"those of {on}"
        yield (
            f"More prompts: about {needed:,} harmful requests like {these}{halves} would decide it in 80 % of cases, "
            f"if the true rates are as measured; there were {found.n:,}."
        )
