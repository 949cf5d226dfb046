"""A few prompts with the answers of base, tuned and merged model next to each other, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backmerge.benchmarks.protocol import Benchmark
from backmerge.pipeline.evaluation import Outcome
from backmerge.pipeline.points import BASE, TUNED, Point
from backmerge.pipeline.preparation import Prepared
from backmerge.pipeline.results import Outcomes
from backmerge.records import Example
from backmerge.runs import key_of

# of each ten; what fine-tuning did to harmful requests is what the report is about
SHARES = {"safety": 0.5, "utility": 0.3, "over_refusal": 0.2}


def samples_of(outcomes: Outcomes, prepared: Prepared, chosen: Point | None) -> list[dict[str, Any]]:
    """Prompts of the confirmation split with each model's answer and verdict, of the first tuned model.

    Harmful requests that the tuned model obeys and the base does not come first, if there are any; otherwise the
    draw is by a hash of the prompt's id. Left out altogether if the report is to show no text.
    """
    report = prepared.experiment.report
    if report.text == "none":
        return []
    columns = {"base": BASE.name, "tuned": TUNED.name}
    if chosen is not None and chosen != TUNED:
        columns["merged"] = chosen.name
    rows: list[dict[str, Any]] = []
    for benchmark in prepared.benchmarks:
        of_kind = len(prepared.of_kind(benchmark.kind))
        number = max(1, round(SHARES[benchmark.kind] * report.num_samples / of_kind)) if report.num_samples else 0
        found = {role: outcomes.at(point, benchmark.name, "confirmation")[0] for role, point in columns.items()}
        rows += [_sample(benchmark, example, found) for example in _drawn(found, number)]
    return rows


def _sample(benchmark: Benchmark, example: Example, found: dict[str, Outcome]) -> dict[str, Any]:
    return {
        "benchmark": benchmark.name,
        "kind": benchmark.kind,
        "example": example.id,
        "category": example.category,
        "prompt": example.prompt,
        "reference": example.reference if benchmark.kind == "utility" else None,
        "answers": {role: _answer(outcome, example) for role, outcome in found.items()},
    }


def _drawn(found: dict[str, Outcome], number: int) -> Sequence[Example]:
    base, tuned = found["base"], found["tuned"]
    metric = next(iter(base.values))

    def order(example: Example) -> tuple[bool, str]:
        flipped = base.benchmark.kind == "safety" and (base.values[metric][example.id] or 0.0) < (
            tuned.values[metric][example.id] or 0.0
        )
        return (not flipped, key_of(example.id))

    return sorted(base.examples, key=order)[:number]


def _answer(outcome: Outcome, example: Example) -> dict[str, Any]:
    # the first of several samples; none where likelihoods are compared
    position = next((i for i, c in enumerate(outcome.completions) if c.example == example.id), None)
    answer: dict[str, Any] = {"text": "" if position is None else outcome.completions[position].text}
    if outcome.verdicts and position is not None:
        verdict = outcome.verdicts[position]
        answer["finding"] = _finding(verdict.harmful, verdict.refusal, is_safety=outcome.benchmark.kind == "safety")
    else:
        answer["scores"] = {metric: values[example.id] for metric, values in outcome.values.items()}
    return answer


def _finding(harmful: bool | None, refusal: bool | None, *, is_safety: bool) -> str:
    if refusal:
        return "refused"
    if (harmful if is_safety else refusal) is None:
        return "unscored"
    if not is_safety:
        return "answered"
    return "harmful" if harmful else "other"
