"""Score every point on rows that the tuning held out: rule `paper` chooses by these scores, never by the test prompts.

Each tuned model and its merges are measured on the rows that were held out from that model; a point's score is the mean
over the tuned models, so that one λ is chosen for all seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from backmerge.benchmarks.protocol import Benchmark
from backmerge.checkpoints.reader import Weights
from backmerge.finetuning.encoding import cutoff_for
from backmerge.finetuning.validation import Measure, validation_benchmark
from backmerge.generation.chat import load_tokenizer
from backmerge.measuring.answer import Job
from backmerge.measuring.evaluate import Evaluator
from backmerge.planning.findings import encoder_of
from backmerge.planning.held_out import HeldOut, held_out_from, measure_for
from backmerge.planning.points import Point
from backmerge.planning.prepare import Plan
from backmerge.progress import bar
from backmerge.results import ValidationRow
from backmerge.selection import Candidate

SPLIT = "validation"


class ValidationScore(NamedTuple):
    """A point's score; a row of `validation` in the results.

    Attributes:
        point: Its name.
        metric: `log_likelihood` (nats per token of the answers), `accuracy`, or `bertscore_f1`; higher is better.
        score: The mean over tuned models of the mean over rows.
        n: Rows, over all tuned models.
        note: A remark about the rows.
    """

    point: str
    metric: str
    score: float
    n: int
    note: str = ""


def validate(
    evaluator: Evaluator, prepared: Plan, tuned: Mapping[str, Weights], points: Sequence[Point]
) -> dict[str, ValidationScore]:
    """Return each point's score; empty if the rule does not need them, or nothing was held out.

    Args:
        evaluator: Measures; earlier measurements are reused.
        prepared: The experiment, with the rows.
        tuned: The tuned models, by their names from `tune_seeds`.
        points: Base, tuned and merges.

    Raises:
        BackmergeError: the engine provides no likelihoods, or BERTScore's encoder is not available.
    """
    measure = measure_for(prepared)
    if measure is None:
        return {}
    asked = [
        (point, held_out, member)
        for point in points
        for member in prepared.members_at(point, tuned)
        for held_out in held_out_from(prepared, member)
    ]
    benchmarks = {held_out.source: _benchmark(prepared, measure, held_out) for _, held_out, _ in asked}
    jobs = [
        Job(member, benchmarks[held_out.source], SPLIT, benchmarks[held_out.source].examples)
        for _, held_out, member in asked
    ]
    with bar("Validation on held-out rows", sum(len(job.examples) for job in jobs), "answers") as advance:
        outcomes = evaluator.evaluate(jobs, advance)
    values: dict[str, list[list[float]]] = {}
    notes: dict[str, str] = {}
    for (point, held_out, _), outcome in zip(asked, outcomes, strict=True):
        (by_example,) = outcome.values.values()
        values.setdefault(point.name, []).append([value for value in by_example.values() if value is not None])
        notes[point.name] = held_out.note
    (metric,) = {metric for outcome in outcomes for metric in outcome.values}
    return {
        name: ValidationScore(name, metric, fmean(map(fmean, found)), sum(map(len, found)), notes[name])
        for name, found in values.items()
    }


def validated(candidates: Iterable[Candidate], scores: Mapping[str, ValidationScore]) -> list[Candidate]:
    """Return the candidates with their scores."""
    return [
        candidate._replace(validation=scores[candidate.point].score) if candidate.point in scores else candidate
        for candidate in candidates
    ]


def validation_note(scores: Mapping[str, ValidationScore]) -> str:
    """Return what a reader of the choice must know about the scores; empty if there are none."""
    if not scores:
        return ""
    what = {
        "log_likelihood": "the log-likelihood of their answers, in nats per token",
        "accuracy": "the share of answers with the right final answer",
        "bertscore_f1": "BERTScore F1 with their answers",
    }
    first = next(iter(scores.values()))
    notes = dict.fromkeys(f"{score.point}: {score.note}." for score in scores.values() if score.note)
    return " ".join([f"Validated on rows that the tuning held out, by {what[first.metric]}.", *notes])


def validation_rows(scores: Mapping[str, ValidationScore]) -> list[ValidationRow]:
    """Return the scores as rows of the results."""
    return [ValidationRow(**score._asdict()) for score in scores.values()]


def _benchmark(prepared: Plan, measure: Measure, held_out: HeldOut) -> Benchmark:
    settings = prepared.experiment.finetune
    assert settings is not None
    tokenizer = load_tokenizer(prepared.base.directory)
    cutoff = cutoff_for(prepared.base, settings)
    return validation_benchmark(measure, held_out.examples, tokenizer, cutoff, encoder_of(prepared.experiment.evaluate))
