"""Every point scored on rows that the tuning held out: what rule `paper` chooses by, which is never the test.

Each tuned model and the merges of it are measured on the rows that were held out from that very model; a point's score
is the mean over the tuned models, so that λ is one for all seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import NamedTuple

from backmerge.benchmarks.protocol import Benchmark
from backmerge.benchmarks.split import limited
from backmerge.checkpoints.reader import Weights
from backmerge.errors import ConfigError
from backmerge.finetuning.encoding import cutoff_for
from backmerge.finetuning.validation import Encoder, Measure, measure_of, validation_benchmark
from backmerge.generation.chat import load_tokenizer
from backmerge.generation.protocol import Generator
from backmerge.measuring.answer import Job
from backmerge.measuring.evaluate import Evaluator
from backmerge.pipeline.preparation import Prepared
from backmerge.planning.points import ALL, Member, Point
from backmerge.progress import bar
from backmerge.records import Example
from backmerge.results import ValidationRow
from backmerge.selection import Candidate

SPLIT = "validation"
ENOUGH = 100  # rows: a share's standard error is 5 points at most


class ValidationScore(NamedTuple):
    """A point's score; a row of `validation` in the results.

    Attributes:
        point: Its name.
        metric: `log_likelihood` (nats per token of the answers), `accuracy`, or `bertscore_f1`; higher is better.
        score: The mean over tuned models of the mean over rows.
        n: Rows, over all tuned models.
        note: What is special about the rows.
    """

    point: str
    metric: str
    score: float
    n: int
    note: str = ""


class HeldOut(NamedTuple):
    """Rows to validate on.

    Attributes:
        source: The tuned model that they were held out from, or `all`.
        examples: The rows.
        note: What is special about them.
    """

    source: str
    examples: tuple[Example, ...]
    note: str = ""


def check_validation(prepared: Prepared, engine: Generator) -> None:
    """Whether what λ is to be chosen by can be measured, before anything is tuned.

    Raises:
        ConfigError: the engine gives no likelihoods; or no prompts are kept for the confirmation, since λ was to be
            chosen on held-out rows, and there are none.
    """
    measure = _measure(prepared)
    if measure is None:
        if prepared.experiment.choice.rule == "paper" and prepared.experiment.evaluate.split == "whole":
            raise ConfigError(
                "no row of the tuning data is held out to choose λ on, and split 'whole' keeps no prompts for it",
                remedy="raise finetune.data.validation, give more rows, or set evaluate.split to 'halves'.",
            )
        return
    if measure.metric == "loss" and not engine.gives_likelihoods:
        raise ConfigError(
            "choice.validation 'loss' compares likelihoods, which the engine "
            f"{engine.identity['engine']} does not give",
            remedy="take the engine transformers or vllm, or set choice.validation to accuracy, bertscore or none.",
        )


def validate(
    evaluator: Evaluator, prepared: Prepared, tuned: Mapping[str, Weights], points: Sequence[Point]
) -> dict[str, ValidationScore]:
    """Point to its score; empty where the rule does not ask, or nothing was held out.

    Args:
        evaluator: Measures; what it measured before, it does not measure again.
        prepared: The experiment, with the rows.
        tuned: The tuned models, by the names that `tune_seeds` gives them.
        points: Base, tuned and merges.

    Raises:
        BackmergeError: the engine gives no likelihoods, or BERTScore's encoder cannot be had.
    """
    measure = _measure(prepared)
    if measure is None:
        return {}
    asked = [
        (point, held_out, member)
        for point in points
        for member in prepared.members_at(point, tuned)
        for held_out in _held_out_from(prepared, member)
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
    """The candidates, with their scores."""
    return [
        candidate._replace(validation=scores[candidate.point].score) if candidate.point in scores else candidate
        for candidate in candidates
    ]


def validation_note(scores: Mapping[str, ValidationScore]) -> str:
    """What a reader of the choice must know of the scores; nothing where there are none."""
    if not scores:
        return ""
    what = {
        "log_likelihood": "the log-likelihood of their answers, in nats per token",
        "accuracy": "the share of answers that arrive where theirs do",
        "bertscore_f1": "BERTScore F1 with their answers",
    }
    first = next(iter(scores.values()))
    notes = dict.fromkeys(f"{score.point}: {score.note}." for score in scores.values() if score.note)
    return " ".join([f"Validated on rows that the tuning held out, by {what[first.metric]}.", *notes])


def validation_rows(scores: Mapping[str, ValidationScore]) -> list[ValidationRow]:
    """The scores as rows of the results."""
    return [ValidationRow(**score._asdict()) for score in scores.values()]


def num_validation_answers(prepared: Prepared, points: Iterable[Point]) -> int:
    """Rows to be answered, or whose answers' likelihood is to be found, over all models at the points."""
    if _measure(prepared) is None:
        return 0
    sizes = {seeds: sum(len(rows.examples) for rows in _rows(prepared, seeds)) for seeds in ("each", ALL)}
    return sum(sizes[ALL if point.is_joint else "each"] for point in points)


def _measure(prepared: Prepared) -> Measure | None:
    """What is measured; nothing where the rule does not ask for it, or there is nothing to measure it on."""
    settings, choice = prepared.experiment.finetune, prepared.experiment.choice
    if settings is None or choice.rule != "paper":
        return None
    if not prepared.training or not all(data.validation for data in prepared.training.values()):
        return None
    return measure_of(settings.dataset, choice.validation)


def _held_out_from(prepared: Prepared, member: Member) -> list[HeldOut]:
    """What a model is validated on: its own seed's rows; the base, each seed's."""
    if member.tuned == ALL:
        return _rows(prepared, ALL)
    return [rows for rows in _rows(prepared, "each") if member.tuned in (None, rows.source)]


def _rows(prepared: Prepared, seeds: str) -> list[HeldOut]:
    """The rows held out from each seed, or those for a merge of all seeds' models."""
    if seeds == ALL:
        return [held_out_from_all(prepared)]
    return [HeldOut(f"seed-{seed}", _limited(prepared, data.validation)) for seed, data in prepared.training.items()]


def held_out_from_all(prepared: Prepared) -> HeldOut:
    """The rows for a model that is merged of all seeds' models.

    What one seed held out, another was mostly tuned on. So the rows are those that no seed was tuned on, if they are
    100 or half of all; else all that any seed held out, which favours such merges beside others, and is noted.
    """
    held_out = {(e.id, _asked(e)): e for data in prepared.training.values() for e in data.validation}
    tuned_on = {_asked(example) for data in prepared.training.values() for example in data.training}
    unseen = [example for example in held_out.values() if _asked(example) not in tuned_on]
    if len(unseen) == len(held_out):
        return HeldOut(ALL, _limited(prepared, unseen))
    if len(unseen) >= min(ENOUGH, len(held_out) / 2):
        note = "merged of all tuned models, and validated on held-out rows that none was tuned on"
        return HeldOut(ALL, _limited(prepared, unseen), note)
    examples = _limited(prepared, list(held_out.values()))
    seen = sum(_asked(example) in tuned_on for example in examples)
    note = (
        f"merged of all tuned models; of its {len(examples):,} rows, {seen:,} were held out from one and tuned on by "
        "another, which flatters it"
    )
    return HeldOut(ALL, examples, note)


def _limited(prepared: Prepared, examples: Sequence[Example]) -> tuple[Example, ...]:
    """As many as a split of a benchmark may have, under ids of their own."""
    return tuple(limited(_told_apart(examples), prepared.experiment.evaluate.limit))


def _asked(example: Example) -> tuple[tuple[str, str], ...]:
    """The prompt, system prompt aside: what training and held-out rows never share."""
    return tuple((message.role, message.content) for message in example.messages if message.role != "system")


def _told_apart(examples: Sequence[Example]) -> list[Example]:
    """The same, under ids of their own: code of the user's may give several examples one."""
    seen: dict[str, int] = {}
    found = []
    for example in examples:
        number = seen[example.id] = seen.get(example.id, 0) + 1
        found.append(example if number == 1 else replace(example, id=f"{example.id}#{number}"))
    return found


def _benchmark(prepared: Prepared, measure: Measure, held_out: HeldOut) -> Benchmark:
    settings = prepared.experiment.finetune
    assert settings is not None
    tokenizer = load_tokenizer(prepared.base.directory)
    cutoff = cutoff_for(prepared.base, settings)
    return validation_benchmark(measure, held_out.examples, tokenizer, cutoff, _encoder(prepared))


def _encoder(prepared: Prepared) -> Encoder:
    """BERTScore's, as the first benchmark that names one has it."""
    named = (one.options for one in prepared.experiment.evaluate.utility if "model" in one.options)
    options = next(named, None)
    return Encoder() if options is None else Encoder(str(options["model"]), options.get("layer"))
