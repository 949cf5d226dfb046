"""The arithmetic of what an experiment takes: models, answers, tokens and GPU-hours, stage by stage.

Hours are tokens × parameters over a rate, as docs/scale.md reckons them for a 70B model; the rates stand here, so that
whoever knows better of their own machine can put theirs in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from backmerge.benchmarks.split import Split
from backmerge.finetuning.schedule import num_steps
from backmerge.finetuning.settings import FinetuneSettings
from backmerge.planning.points import BASE, TUNED, Point
from backmerge.planning.settings import Experiment


class Rates(NamedTuple):
    """What one GPU does in a second (H100, bfloat16), and what a judge is asked.

    Attributes:
        output: Output tokens × parameters: 1,250 tokens/s of a 70.55B model, an eighth of a node's 10,000.
        input: Input tokens × parameters: 3,000 tokens/s of a 70.55B model, an eighth of a node's 24,000.
        training: Floating-point operations; a token takes 6 for each parameter.
        judged_tokens: That a judge reads for an answer: its own question, the prompt, and the answer.
        verdict_tokens: That it writes.
        row_tokens: Of a row to tune on, prompt and answer.
        row_answer_tokens: Of a held-out row's answer.
    """

    output: float = 1_250 * 70.55e9
    input: float = 3_000 * 70.55e9
    training: float = 3e14
    judged_tokens: int = 450
    verdict_tokens: int = 30
    row_tokens: int = 400
    row_answer_tokens: int = 250


RATES = Rates()


class Load(NamedTuple):
    """What one model is asked of a benchmark.

    Attributes:
        num_answers: To each split's prompts, all samples counted.
        prompt_tokens: Of a prompt.
        answer_tokens: Of an answer; 0 where likelihoods are compared.
        num_samples: Answers to a prompt, which is read once for all of them.
        is_judged: Whether a judge looks at the answers.
    """

    num_answers: Mapping[Split, int]
    prompt_tokens: float
    answer_tokens: float
    num_samples: int = 1
    is_judged: bool = False


class Stage(NamedTuple):
    """A part of the work.

    Attributes:
        name: In words.
        num_models: That are trained or asked.
        num_answers: That they give; 0 in training.
        input_tokens: That they read, judges apart.
        output_tokens: That they write.
        num_judged: Answers that judges look at.
        gpu_hours: Judges included; `None` where a model's size is not known.
    """

    name: str
    num_models: int
    num_answers: int
    input_tokens: float
    output_tokens: float
    num_judged: int
    gpu_hours: float | None


def num_models(points: Iterable[Point], num_tuned: int) -> int:
    """Models that stand at points: one of the base and of a merge of all tuned models, else one for each of these."""
    return sum(1 if point.role == "base" or point.is_joint else num_tuned for point in points)


def confirmed_points(points: Sequence[Point], *, compares: bool) -> list[Point]:
    """What the confirmation measures: base, tuned, and one merge; of each series, where series are compared."""
    merged: dict[str, Point] = {}
    for point in points:
        if point.role == "merged":
            merged.setdefault(point.series if compares else "the chosen", point)
    return [BASE, TUNED, *merged.values()]


def generation_hours(
    input_tokens: float, output_tokens: float, num_parameters: float | None, rates: Rates = RATES
) -> float | None:
    """GPU-hours to read and write so many tokens: tokens × parameters / rate / 3600."""
    if num_parameters is None:
        return None
    return (input_tokens / rates.input + output_tokens / rates.output) * num_parameters / 3600


def training_stage(
    settings: FinetuneSettings, num_examples: int, num_parameters: float | None, rates: Rates = RATES
) -> Stage:
    """Tuning one model for each seed, of so many examples each.

    Raises:
        ConfigError: a snapshot lies beyond the schedule.
    """
    row = min(rates.row_tokens, settings.cutoff)
    tokens = len(settings.seeds) * num_steps(settings, num_examples) * settings.batch_size * row
    hours = None if num_parameters is None else tokens * 6 * num_parameters / rates.training / 3600
    return Stage("fine-tuning", len(settings.seeds), 0, tokens, 0, 0, hours)


def validation_stage(
    points: Sequence[Point], num_tuned: int, num_rows: int, num_parameters: float | None, *, generates: bool
) -> Stage:
    """Scoring every point on the rows held out from each tuned model; the base, and a merge of all, on all of them."""
    models = num_models(points, num_tuned)
    answers = len(points) * num_tuned * num_rows
    read = answers * (RATES.row_tokens - (RATES.row_answer_tokens if generates else 0))
    written = answers * RATES.row_answer_tokens if generates else 0
    hours = generation_hours(read, written, num_parameters)
    return Stage("validation on held-out rows", models, answers, read, written, 0, hours)


def answering_stage(
    name: str,
    models: int,
    split: Split,
    loads: Sequence[Load],
    num_parameters: float | None,
    judges: Sequence[float | None],
    rates: Rates = RATES,
) -> Stage:
    """Asking so many models everything of a split, and judging what is to be judged.

    Args:
        name: Of the stage.
        models: How many.
        split: Of the prompts.
        loads: What each is asked.
        num_parameters: Of each; `None` if unknown.
        judges: Parameters of each judge that is a model; `None` if unknown.
        rates: Of the machine.
    """
    answers = models * sum(load.num_answers[split] for load in loads)
    read = models * sum(load.num_answers[split] / load.num_samples * load.prompt_tokens for load in loads)
    written = models * sum(load.num_answers[split] * load.answer_tokens for load in loads)
    judged = models * sum(load.num_answers[split] for load in loads if load.is_judged)
    hours = generation_hours(read, written, num_parameters, rates)
    for judge in judges if judged else ():
        more = generation_hours(judged * rates.judged_tokens, judged * rates.verdict_tokens, judge, rates)
        hours = None if hours is None or more is None else hours + more
    return Stage(name, models, answers, read, written, judged * max(1, len(judges)) if judged else 0, hours)


def num_searched(experiment: Experiment, points: Sequence[Point], num_tuned: int) -> int:
    """Models that are measured to choose λ, at most.

    Those at the points, those of λs beyond the grid, and the trials of a search by layers.
    """
    num_trials = experiment.layers.num_trials if experiment.layers is not None else 0
    series = {point.series: point for point in points if point.role == "merged" and point.lam is not None}
    refined = experiment.num_refined * num_models(series.values(), num_tuned)
    return num_models(points, num_tuned) + refined + num_trials * num_tuned
