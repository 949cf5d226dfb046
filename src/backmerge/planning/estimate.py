"""What an experiment needs: models, answers, tokens, bytes and hours. The one cost model, for runs and dry runs.

Models and data on this machine are counted exactly, with the base's own tokenizer; others as declared. Hours are tokens
× parameters over a rate, as docs/scale.md computes them for a 70B model; for other machines, put other rates in
`RATES`.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, Kind
from backmerge.benchmarks.split import SPLITS, Split, limited
from backmerge.checkpoints.reader import Weights
from backmerge.finetuning.settings import FinetuneSettings, num_steps
from backmerge.finetuning.validation import measure_of
from backmerge.generation.cache import cache_directory
from backmerge.generation.chat import load_tokenizer, prompt_lengths
from backmerge.generation.protocol import Generator
from backmerge.merging.recipe import Variant
from backmerge.merging.served import checkpoint_bytes
from backmerge.planning import declared
from backmerge.planning.declared import ModelSize
from backmerge.planning.findings import Rows, size_of
from backmerge.planning.held_out import num_validation_answers
from backmerge.planning.points import BASE, TUNED, Point
from backmerge.planning.prepare import LookedUp, Plan, num_tuned
from backmerge.planning.settings import EvaluateSettings, Experiment
from backmerge.progress import Rates, count_text, size_text
from backmerge.records import Example
from backmerge.runs import key_of

SAMPLE = 500  # prompts of a benchmark's split whose tokens are counted; if there are more, a sample is used
ANSWER_TOKENS, PROMPT_TOKENS = 300, 150  # if nothing is declared
LETTERS = 4  # letters of English text per token, about
SPEEDS = "speeds.jsonl"  # in the cache's folder
NUM_SPEEDS = 5  # last speeds of which the median is used


class GpuRates(NamedTuple):
    """The work that one GPU does in a second (H100, bfloat16), and assumed lengths.

    Attributes:
        output: Output tokens × parameters: 1,250 tokens/s of a 70.55B model, an eighth of a node's 10,000.
        input: Input tokens × parameters: 3,000 tokens/s of a 70.55B model, an eighth of a node's 24,000.
        training: Floating-point operations; a token needs 6 for each parameter.
        judged_tokens: Tokens that a judge reads for an answer: its own question, the prompt, and the answer.
        verdict_tokens: Tokens that it writes.
        row_tokens: Tokens of a training row, prompt and answer.
        row_answer_tokens: Tokens of a held-out row's answer.
    """

    output: float = 1_250 * 70.55e9
    input: float = 3_000 * 70.55e9
    training: float = 3e14
    judged_tokens: int = 450
    verdict_tokens: int = 30
    row_tokens: int = 400
    row_answer_tokens: int = 250


RATES = GpuRates()


class Load(NamedTuple):
    """The prompts for one model; loads of several benchmarks are added up.

    Attributes:
        num_answers: Number of answers, all samples included.
        read: Tokens of the prompts; each prompt is read once for all its samples.
        written: Tokens of the answers, at an assumed length.
        most_written: The same if every answer reached its limit.
        num_judged: Answers that a judge reads.
    """

    num_answers: int = 0
    read: float = 0.0
    written: float = 0.0
    most_written: int = 0
    num_judged: int = 0

    def plus(self, other: Load) -> Load:
        """Return the sum of both."""
        return Load(
            self.num_answers + other.num_answers,
            self.read + other.read,
            self.written + other.written,
            self.most_written + other.most_written,
            self.num_judged + other.num_judged,
        )


class Stage(NamedTuple):
    """A part of the work.

    Attributes:
        name: A description.
        num_models: Models that are trained or asked.
        num_answers: Their answers; 0 in training.
        input_tokens: Tokens that they read, without the judges'.
        output_tokens: Tokens that they generate, as assumed.
        most_output_tokens: The same if every answer reached its limit; 0 for training and validation.
        num_judged: Answers that judges read.
        gpu_hours: GPU-hours, including judges; `None` if a model's size is not known.
    """

    name: str
    num_models: int
    num_answers: int
    input_tokens: float
    output_tokens: float
    most_output_tokens: int
    num_judged: int
    gpu_hours: float | None


CHOOSING, CONFIRMING, VALIDATING = "answers to choose λ", "answers to confirm it", "validation on held-out rows"


class Cost(NamedTuple):
    """The work to do at most, as if nothing had been done before.

    Attributes:
        stages: In their order.
        num_merged: Merged models among those measured to choose λ.
        bytes_read: Bytes of weights to read.
        bytes_written: Bytes of weights to write: tuned models, adapters for the engine, checkpoints that it needs, the
            chosen models.
        is_at_most: Whether the search may skip some of the answers.
        num_refined: Largest number of λs beyond the grid that are measured, of each series; included in the counts
            above.
    """

    stages: tuple[Stage, ...]
    num_merged: int
    bytes_read: float
    bytes_written: float
    is_at_most: bool
    num_refined: int

    def stage(self, name: str) -> Stage:
        """Return a stage; an empty one if it is not part of the work."""
        return next((stage for stage in self.stages if stage.name == name), Stage(name, 0, 0, 0, 0, 0, 0, 0.0))

    @property
    def gpu_hours(self) -> float | None:
        """GPU-hours of all stages; `None` if a model's size is not known."""
        hours = [stage.gpu_hours for stage in self.stages]
        return None if None in hours else sum(hour for hour in hours if hour is not None)

    @property
    def counts(self) -> dict[str, Any]:
        """The counts as plain data, for the log of a session."""
        choosing, confirming = self.stage(CHOOSING), self.stage(CONFIRMING)
        return {
            "num_models": choosing.num_models,
            "num_answers": choosing.num_answers,
            "num_validating": self.stage(VALIDATING).num_answers,
            "num_confirming": confirming.num_answers,
            "num_prompt_tokens": round(choosing.input_tokens + confirming.input_tokens),
            "max_new_tokens": choosing.most_output_tokens + confirming.most_output_tokens,
            "num_judged": choosing.num_judged + confirming.num_judged,
            "num_merged": self.num_merged,
            "bytes_read": round(self.bytes_read),
            "bytes_written": round(self.bytes_written),
            "is_at_most": self.is_at_most,
            "num_refined": self.num_refined,
        }

    @property
    def sentence(self) -> str:
        """A sentence for the terminal."""
        counts = self.counts
        at_most = "at most " if self.is_at_most else ""
        held_out = f" and {counts['num_validating']:,} on held-out rows" if counts["num_validating"] else ""
        refined = f" (with up to {self.num_refined} beyond the grid)" if self.num_refined else ""
        return (
            f"To generate: {at_most}{count_text(counts['num_answers'], 'answer')} of "
            f"{count_text(counts['num_models'], 'model')} to choose λ{refined}"
            f"{held_out}, {counts['num_confirming']:,} to confirm it; {at_most or 'about '}"
            f"{counts['num_prompt_tokens']:,} prompt tokens, at most {counts['max_new_tokens']:,} generated. Weights: "
            f"about {size_text(self.bytes_read)} to read, {size_text(self.bytes_written)} to write. "
            "Earlier answers are reused."
        )


class Needs(NamedTuple):
    """The figures that the cost is computed from, as far as they are known.

    Attributes:
        base: Its size.
        tuned_bytes: Size of one tuned model.
        merged_bytes: Size of one merged model as a checkpoint.
        rows: Rows of one seed's tuning; `None` if nothing is left to tune.
        num_validating: Answers to held-out rows; `None` if they are to be counted from `rows`.
        loads: The prompts for one model in each split.
        judges: Number of parameters of each judge's model.
        ways: How each merge gets into the engine; merged in memory if not known.
    """

    base: ModelSize | None
    tuned_bytes: float
    merged_bytes: float
    rows: Rows | None
    num_validating: int | None
    loads: Mapping[Split, Load]
    judges: Sequence[float | None]
    ways: Sequence[str] = ()


def cost_of(experiment: Experiment, needs: Needs, points: Sequence[Point]) -> Cost:
    """Return what an experiment costs at most.

    Args:
        experiment: Its settings.
        needs: The figures.
        points: All that may be measured.

    Raises:
        ConfigError: a snapshot is beyond the schedule.
    """
    count = num_tuned(experiment)
    parameters = needs.base.num_parameters if needs.base is not None else None
    stages: list[Stage] = []
    if experiment.finetune is not None and needs.rows is not None:
        stages.append(training_stage(experiment.finetune, needs.rows.num_training, parameters))
    validation = _validation_stage(experiment, needs, points, parameters)
    stages += [] if validation is None else [validation]
    num_measured = num_searched(experiment, points, count)
    num_confirmed = num_models(confirmed_points(points, compares=experiment.choice.compare), count)
    stages.append(answering_stage(CHOOSING, num_measured, needs.loads["selection"], parameters, needs.judges))
    stages.append(answering_stage(CONFIRMING, num_confirmed, needs.loads["confirmation"], parameters, needs.judges))
    num_merged = num_measured - num_models([point for point in points if point.role != "merged"], count)
    read, written = _moved(needs, num_merged, count)
    is_at_most = experiment.searched_by != "grid" or experiment.num_refined > 0
    return Cost(tuple(stages), num_merged, read, written, is_at_most, experiment.num_refined)


def needs_of(looked_up: LookedUp, experiment: Experiment, points: Sequence[Point]) -> Needs:
    """Return an experiment's needs before a run: exact for what is on this machine, else as declared."""
    plan, models, measures = looked_up.plan, looked_up.models, looked_up.measures
    if plan is not None:
        return needs_of_plan(plan, points=points)._replace(judges=measures.judge_sizes)
    tokenizer = None if models.base is None else load_tokenizer(models.base.directory, needs_template=False)
    whole = 0.0 if models.base_size is None else models.base_size.num_bytes
    loads = loads_of(experiment.evaluate, measures.asked, None, tokenizer)
    tuned = _bytes_of_tuned(experiment, models.tuned, models.base_size)
    return Needs(models.base_size, tuned, whole, looked_up.rows, None, loads, measures.judge_sizes)


def needs_of_plan(
    plan: Plan, points: Sequence[Point], tuned: Mapping[str, Weights] | None = None, engine: Generator | None = None
) -> Needs:
    """Return the needs of an experiment that has everything on this machine.

    Args:
        plan: The experiment.
        points: All that may be measured.
        tuned: The tuned models, if they are made.
        engine: Decides how merges get into it.
    """
    experiment = plan.experiment
    there = plan.tuned if tuned is None else tuned
    size = size_of(plan.base)
    ways: list[str] = []
    if engine is not None and there:
        merged = [point for point in points if point.role == "merged"]
        members = [member for point in merged for member in plan.members_at(point, there)]
        ways = [engine.realisation(member.local_variant) for member in members]
    rows = next((Rows(len(data.training), len(data.validation)) for data in plan.training.values()), None)
    return Needs(
        size,
        _bytes_of_tuned(experiment, there, size),
        checkpoint_bytes(Variant(plan.base, dtype=plan.output.dtype)),
        None if there else rows,
        num_validation_answers(plan, points),
        loads_of(
            experiment.evaluate,
            plan.benchmarks,
            plan.splits,
            load_tokenizer(plan.base.directory, needs_template=False),
        ),
        [0.0] * (1 if plan.second_judge is None else 2),
        ways,
    )


def loads_of(
    settings: EvaluateSettings,
    benchmarks: Sequence[Benchmark | None],
    splits: Mapping[str, Mapping[Split, Sequence[Example]]] | None,
    tokenizer: Any,
) -> dict[Split, Load]:
    """Return the prompts for one model in each split.

    Args:
        settings: Names the benchmarks.
        benchmarks: One for each of these; `None` for one whose data is not on this machine.
        splits: Each benchmark's halves; halves of equal size if not given.
        tokenizer: The base's; without it tokens are estimated from letters.
    """
    loads: dict[Split, Load] = dict.fromkeys(SPLITS, Load())
    for (kind, _, asked), benchmark in zip(settings.benchmarks, benchmarks, strict=True):
        for split in SPLITS:
            examples = None if splits is None or benchmark is None else splits[benchmark.name][split]
            load = _load_of(asked, kind, settings, split, benchmark, examples, tokenizer)
            loads[split] = loads[split].plus(load)
    return loads


def _load_of(
    asked: BenchmarkSettings,
    kind: Kind,
    settings: EvaluateSettings,
    split: Split,
    benchmark: Benchmark | None,
    examples: Sequence[Example] | None,
    tokenizer: Any,
) -> Load:
    known = declared.BENCHMARKS.get(asked.name)
    if benchmark is not None:
        sampling = benchmark.sampling_as(settings.sampling, settings.max_new_tokens)
        samples, limit, size = sampling.num_samples, sampling.max_new_tokens, len(benchmark.examples)
        prompt_tokens = _mean_tokens(benchmark, benchmark.examples if examples is None else examples, tokenizer)
        if benchmark.choices is not None:  # likelihoods are compared: every pair is read, nothing is generated
            samples, limit = 1, 0
    else:
        samples = asked.num_samples or (known.num_samples if known else 1)
        limit = asked.max_new_tokens or (known.max_new_tokens if known else 512)
        limit = min(limit, settings.max_new_tokens or limit)
        size = known.num_prompts if known else 0
        prompt_tokens = float(known.prompt_tokens if known else PROMPT_TOKENS)
    if examples is not None:
        num_prompts = len(examples)
    else:
        half = size if settings.split == "whole" else -(-size // 2) if split == "selection" else size // 2
        num_prompts = min(half, settings.limit or half)
    num_answers = num_prompts * samples
    answer_tokens = min(known.answer_tokens if known else ANSWER_TOKENS, limit)
    is_judged = kind in ("safety", "over_refusal")
    return Load(
        num_answers,
        num_prompts * prompt_tokens,
        num_answers * answer_tokens,
        num_answers * limit,
        num_answers if is_judged else 0,
    )


def _mean_tokens(benchmark: Benchmark, examples: Sequence[Example], tokenizer: Any) -> float:
    """Return the mean length in tokens of prompts, or of texts with compared likelihoods; counted on a sample."""
    sample = limited(examples, SAMPLE)
    if not sample:
        return 0.0
    if tokenizer is None:
        return sum(len(message.content) for one in sample for message in one.messages) / LETTERS / len(sample)
    if benchmark.choices is None:
        return sum(prompt_lengths(tokenizer, sample)) / len(sample)
    texts = [context + more for context, more in benchmark.choices.pairs(tokenizer, sample)]
    return sum(map(len, tokenizer(texts)["input_ids"])) / len(sample) if texts else 0.0


def num_models(points: Iterable[Point], count: int) -> int:
    """Return the number of models at points: one for the base and for merges of all tuned models, else one for each."""
    return sum(1 if point.role == "base" or point.is_joint else count for point in points)


def confirmed_points(points: Sequence[Point], *, compares: bool) -> list[Point]:
    """Return the points of the confirmation: base, tuned, and one merge; one of each series if they are compared."""
    merged: dict[str, Point] = {}
    for point in points:
        if point.role == "merged":
            merged.setdefault(point.series if compares else "the chosen", point)
    return [BASE, TUNED, *merged.values()]


def num_searched(experiment: Experiment, points: Sequence[Point], count: int) -> int:
    """Return the number of models that are measured to choose λ, at most.

    They are the models at the points, those of λs beyond the grid, and the trials of a search by layers.
    """
    num_trials = experiment.layers.num_trials if experiment.layers is not None else 0
    series = {point.series: point for point in points if point.role == "merged" and point.lam is not None}
    refined = experiment.num_refined * num_models(series.values(), count)
    return num_models(points, count) + refined + num_trials * count


def training_stage(
    settings: FinetuneSettings, num_examples: int, num_parameters: float | None, rates: GpuRates = RATES
) -> Stage:
    """Return the stage that tunes one model for each seed, on this many examples each.

    Raises:
        ConfigError: a snapshot is beyond the schedule.
    """
    row = min(rates.row_tokens, settings.cutoff)
    tokens = len(settings.seeds) * num_steps(settings, num_examples) * settings.batch_size * row
    hours = None if num_parameters is None else tokens * 6 * num_parameters / rates.training / 3600
    return Stage("fine-tuning", len(settings.seeds), 0, tokens, 0, 0, 0, hours)


def _validation_stage(
    experiment: Experiment, needs: Needs, points: Sequence[Point], num_parameters: float | None
) -> Stage | None:
    """Return the stage that scores every point on held-out rows, if λ is chosen by it."""
    settings, choice, count = experiment.finetune, experiment.choice, num_tuned(experiment)
    if settings is None or choice.rule != "paper" or not settings.data.validation:
        return None
    measure = measure_of(settings.dataset, choice.validation)
    answers = needs.num_validating
    if answers is None:
        held_out = needs.rows.num_validation if needs.rows is not None else 0
        answers = len(points) * count * min(held_out, experiment.evaluate.limit or held_out)
    if measure is None or not answers:
        return None
    generates = measure.metric != "loss"
    read = answers * (RATES.row_tokens - (RATES.row_answer_tokens if generates else 0))
    written = answers * RATES.row_answer_tokens if generates else 0
    hours = generation_hours(read, written, num_parameters)
    return Stage(VALIDATING, num_models(points, count), answers, read, written, 0, 0, hours)


def answering_stage(
    name: str,
    models: int,
    load: Load,
    num_parameters: float | None,
    judges: Sequence[float | None],
    rates: GpuRates = RATES,
) -> Stage:
    """Return the stage that asks this many models, and judges their answers.

    Args:
        name: The stage's name.
        models: Number of models.
        load: The prompts for each.
        num_parameters: Parameters of each; `None` if unknown.
        judges: Parameters of each judge's model; 0 without one, `None` if unknown.
        rates: The machine's rates.
    """
    read, written, judged = models * load.read, models * load.written, models * load.num_judged
    hours = generation_hours(read, written, num_parameters, rates)
    for judge in judges if judged else ():
        more = generation_hours(judged * rates.judged_tokens, judged * rates.verdict_tokens, judge, rates)
        hours = None if hours is None or more is None else hours + more
    most = models * load.most_written
    return Stage(name, models, models * load.num_answers, read, written, most, judged * len(judges), hours)


def generation_hours(
    input_tokens: float, output_tokens: float, num_parameters: float | None, rates: GpuRates = RATES
) -> float | None:
    """Return the GPU-hours to read and generate this many tokens: tokens × parameters / rate / 3600."""
    if num_parameters is None:
        return None
    return (input_tokens / rates.input + output_tokens / rates.output) * num_parameters / 3600


def _moved(needs: Needs, num_merged: int, count: int) -> tuple[float, float]:
    """Return the bytes of weights that are read and written.

    If models are merged in memory, base and tuned model are read for each; an adapter is written and read, and the base
    read once. The chosen models are written, and the confirmation reads them with base and tuned model.
    """
    base = needs.base.num_bytes if needs.base is not None else 0.0
    tuned, whole = needs.tuned_bytes, needs.merged_bytes
    num_adapters, num_checkpoints = needs.ways.count("adapter"), needs.ways.count("checkpoint")
    num_live = num_merged - num_adapters - num_checkpoints
    read = base + count * (base + tuned)  # measured to choose λ, unmerged
    read += num_live * (base + tuned) + num_adapters * 2 * tuned + num_checkpoints * (base + tuned + whole)
    read += base + count * (base + tuned) + count * (base + tuned + whole)  # confirmed
    written = num_adapters * tuned + num_checkpoints * whole + count * whole
    if needs.rows is not None:
        written += count * tuned
    return read, written


def _bytes_of_tuned(experiment: Experiment, tuned: Mapping[str, Weights], base: ModelSize | None) -> float:
    """Return the bytes of one tuned model: on disk, or as tuning will write it (adapters in float32)."""
    if tuned:
        files = [file for weights in tuned.values() for file in weights.directory.glob("*.safetensors")]
        return round(sum(file.stat().st_size for file in files) / len(tuned))
    settings = experiment.finetune
    if settings is None or base is None:
        return 0.0
    return base.num_bytes if settings.mode == "full" else 4.0 * settings.lora.r * base.lora_dims


def speed_key(engine: Mapping[str, str], base: Weights) -> str:
    """Return the key of a measured speed: this machine, an engine, and models with this configuration."""
    return key_of(platform.node(), engine, Variant(base).companions.config_digest)


def remember_speed(measured_on: str, rates: Rates) -> None:
    """Store a measured speed for later runs on this machine; without a writable cache, do nothing."""
    if not measured_on:
        return
    line = json.dumps({"measured_on": measured_on, **rates._asdict()}) + "\n"
    with suppress(OSError):
        cache_directory().mkdir(parents=True, exist_ok=True, mode=0o700)
        with (cache_directory() / SPEEDS).open("a", encoding="utf-8") as stream:
            stream.write(line)


def remembered_speed(measured_on: str) -> Rates | None:
    """Return a typical one of the last speeds measured on this machine; `None` if there is none."""
    file = cache_directory() / SPEEDS
    return typical([Rates(**speed) for speed in speeds_in(file) if speed.pop("measured_on", None) == measured_on])


def typical(speeds: Sequence[Rates]) -> Rates | None:
    """Return the median of the last speeds, of two the faster: one stalled session must not spoil later estimates."""
    last = sorted(speeds[-NUM_SPEEDS:], key=slowness)
    return last[(len(last) - 1) // 2] if last else None


def slowness(speed: Rates) -> float:
    """Return the seconds for one token read and one generated, or for one of the kind that was measured."""
    return speed.seconds(1, 1) or speed.seconds(1, 0) or 0.0


def speeds_in(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log as plain data, without lines that a kill tore."""
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with suppress(ValueError):
            yield json.loads(line)
