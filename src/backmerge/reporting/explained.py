"""What a run did and what its words mean, for a reader who has heard of neither."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from backmerge.reporting.findings import Results

HEADLINES = {"restored": "Safety restored", "not shown": "Not shown", "worse": "Worse"}

KINDS = {
    "utility": ("Utility", "how well the task is done", "higher is better"),
    "safety": ("Attack success rate", "harmful requests that are answered", "lower is better"),
    "over_refusal": ("Over-refusal", "harmless requests that are refused", "lower is better"),
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
    ("selection, confirmation", "Two disjoint sets of prompts: λ is chosen on the first and reported on the second."),
    ("margin", "How far ASR may lie above the base's and still count as restored, fixed before the run."),
)  # fmt: skip


def what_was_done(results: Results, experiment: Mapping[str, Any]) -> Iterator[str]:
    """The run's stages, a sentence each, as they were carried out."""
    yield _tuning(results, experiment.get("finetune"))
    yield f"Base and tuned were merged: {_sweeps(results)}, for each tuned model."
    judges = sorted({benchmark["judge"] for benchmark in results["benchmarks"] if benchmark["judge"]})
    searched = experiment.get("search", {}).get("name", "grid")
    who = (
        "Every one of these models"
        if searched == "grid"
        else f"Base, tuned and, as the search ({searched}) asked, these"
    )
    yield (
        f"{who} answered the selection prompts: {_sizes(results, 'selection')}. Refusals and harm were judged by "
        f"{', '.join(judges)}."
    )
    if results["choice"]["rule"] == "safe":
        yield (
            "λ was chosen as the one with the most utility among those whose ASR was shown to lie less than "
            f"{results['choice']['margin'] * 100:g} points above the base's."
        )
    else:
        yield f"λ was chosen by the rule '{results['choice']['rule']}'."
    if results["choice"]["point"] is None:
        yield f"None was, so only base and tuned answered the confirmation prompts: {_sizes(results, 'confirmation')}."
        return
    yield (
        "The chosen models were written to disk, loaded from there, and compared with base and tuned on other prompts, "
        f"the confirmation split: {_sizes(results, 'confirmation')}."
    )


def counted(number: int, noun: str) -> str:
    """`1 model`, `3 models`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _tuning(results: Results, finetune: Mapping[str, Any] | None) -> str:
    base, tuned = results["base"]["name"], results["tuned"]
    if finetune is None:
        names = ", ".join(row["name"] for row in tuned)
        return f"The base is {base}. {counted(len(tuned), 'tuned model')} of it came from elsewhere: {names}."
    seeds = ", ".join(map(str, finetune["seeds"]))
    return (
        f"The base, {base}, was fine-tuned with LoRA on {finetune['dataset']}, with the "
        f"{'seed' if len(finetune['seeds']) == 1 else 'seeds'} {seeds}: {counted(len(tuned), 'tuned model')}."
    )


def _sweeps(results: Results) -> str:
    lams: dict[str, list[str]] = {}
    for point in results["points"]:
        if point["role"] == "merged":
            lams.setdefault(point["series"], []).append(f"{point['lam']:g}")
    return "; ".join(f"{series} merging at λ = {', '.join(values)}" for series, values in lams.items())


def _sizes(results: Results, split: str) -> str:
    return ", ".join(
        f"{benchmark['sizes'][split]} of {benchmark['name']} ({KINDS[benchmark['kind']][0].lower()})"
        for benchmark in results["benchmarks"]
    )
