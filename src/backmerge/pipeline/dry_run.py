"""An experiment looked through without the hub and without writing: what is sound, what is still to be had, the cost.

What is here is read and checked as a run would: models, templates, data columns. What is not is named, with what its
own pages say of its size. A fault that a run would end with is a fault here; what only has to be fetched is none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

from backmerge.benchmarks.bertscore import DEFAULT_MODEL
from backmerge.benchmarks.protocol import Benchmark
from backmerge.benchmarks.split import Split
from backmerge.checkpoints.locate import locate_model
from backmerge.checkpoints.reader import Checkpoint
from backmerge.config import Document, Problems
from backmerge.errors import BackmergeError
from backmerge.finetuning.schedule import num_steps
from backmerge.finetuning.validation import measure_of
from backmerge.generation.chat import load_tokenizer
from backmerge.generation.protocol import engine_class
from backmerge.judging.model_judge import ModelJudge
from backmerge.measuring.usage import remembered_speed, speed_key
from backmerge.pipeline.looked_up import (
    Finding,
    Findings,
    NamedModel,
    Rows,
    bytes_of,
    encoder_of,
    find_encoder,
    find_model,
    find_rows,
    judge_model,
    load_of,
    look_up_benchmark,
    offline,
    size_of,
)
from backmerge.pipeline.merges_checked import check_sweep
from backmerge.pipeline.preparation import KINDS, check_judge, find_judge, make_engine, open_tuned, prepare
from backmerge.pipeline.workload import (
    Load,
    Stage,
    answering_stage,
    confirmed_points,
    num_models,
    num_searched,
    training_stage,
    validation_stage,
)
from backmerge.planning.points import Point, points_of
from backmerge.planning.settings import Experiment
from backmerge.progress import Rates, count_text
from backmerge.registry import NOTHING_ALLOWED, Permissions
from backmerge.selection import check_search


class DryRun(NamedTuple):
    """What was found of an experiment.

    Attributes:
        findings: Of each thing that it names.
        stages: What there is to do; none where there is a fault.
        num_bytes_to_fetch: Of models that are not here; 0 where nothing is known of them.
        num_bytes_to_write: Of adapters, and of merged models that are handed over.
        is_at_most: Whether a search may leave some of it out.
        rates: Of this machine, if an earlier run measured this engine on such a model.
    """

    findings: tuple[Finding, ...]
    stages: tuple[Stage, ...]
    num_bytes_to_fetch: float
    num_bytes_to_write: float
    is_at_most: bool
    rates: Rates | None = None

    @property
    def seconds(self) -> float | None:
        """Of all answers on this machine; `None` where its speed was not measured yet."""
        answering = [stage for stage in self.stages if stage.num_answers]
        if self.rates is None or not answering:
            return None
        return self.rates.seconds(
            sum(stage.input_tokens for stage in answering), sum(stage.output_tokens for stage in answering)
        )

    @property
    def faults(self) -> list[Finding]:
        """What a run would end with."""
        return [finding for finding in self.findings if finding.state == "fault"]

    @property
    def gpu_hours(self) -> float | None:
        """Of all stages; `None` where a model's size is not known."""
        hours = [stage.gpu_hours for stage in self.stages]
        return None if None in hours else sum(hour for hour in hours if hour is not None)


def dry_run(
    experiment: Experiment, permissions: Permissions = NOTHING_ALLOWED, document: Document | None = None
) -> DryRun:
    """Look an experiment through; writes nothing, and asks no hub.

    Args:
        experiment: The resolved settings.
        permissions: What may be run.
        document: Where the settings come from, for the places of faults.
    """
    found = Findings(document=document)
    with offline():
        stages, written = _look_through(experiment, found, permissions)
        rates = _rates(experiment, permissions) if stages else None
    is_at_most = experiment.searched_by != "grid"
    return DryRun(tuple(found.all), tuple(stages), found.num_bytes_to_fetch, written, is_at_most, rates)


def _rates(experiment: Experiment, permissions: Permissions) -> Rates | None:
    """What earlier runs on this machine measured of the engine and such a base."""
    try:
        engine = make_engine(experiment.evaluate, permissions)
        return remembered_speed(speed_key(engine.identity, Checkpoint(locate_model(experiment.base))))
    except BackmergeError:  # one of the two is not here, which is among the findings
        return None


def _look_through(experiment: Experiment, found: Findings, permissions: Permissions) -> tuple[list[Stage], float]:
    """The stages, and the bytes that they write."""
    finetune = experiment.finetune
    found.key = ("base",)
    base = _base(experiment, found)
    num_tuned = len(experiment.tuned) or len(finetune.seeds if finetune else ())
    found.key = ("finetune", "dataset")
    data = Rows(0, 0) if finetune is None else find_rows(finetune, base, found, permissions)
    for place, name in enumerate(experiment.tuned):
        found.key = ("tuned", place)
        _tuned(name, base, found, is_cast=experiment.merged_dtype is not None)
    points = _points(experiment, num_tuned, data, found, permissions)
    loads, benchmarks = _loads(experiment, found, permissions)
    judges = _judges(experiment, benchmarks, found, permissions)
    _engines(experiment, found, permissions)
    generates = _validation(experiment, found)
    if all(finding.state == "checked" for finding in found.all):
        loads = _prepared_loads(experiment, found, loads, permissions)
    if found.of_state("fault"):
        return [], 0
    parameters = base.size.num_parameters if base.size else None
    sizes = [judge.size.num_parameters if judge.size else None for judge in judges]
    stages: list[Stage] = []
    if finetune is not None:
        stages.append(training_stage(finetune, data.num_training, parameters))
        if generates is not None and data.num_validation:
            rows = min(data.num_validation, experiment.evaluate.limit or data.num_validation)
            stages.append(validation_stage(points, num_tuned, rows, parameters, generates=generates))
    confirmed = confirmed_points(points, compares=experiment.choice.compare)
    asked: list[tuple[str, int, Split]] = [
        ("answers to choose λ", num_searched(experiment, points, num_tuned), "selection"),
        ("answers to confirm it", num_models(confirmed, num_tuned), "confirmation"),
    ]
    stages += [answering_stage(name, models, split, loads, parameters, sizes) for name, models, split in asked]
    return stages, _written(experiment, base, num_tuned)


def _base(experiment: Experiment, found: Findings) -> NamedModel:
    model = find_model(found, "base", experiment.base)
    if model.folder is None:
        return model
    try:
        checkpoint = Checkpoint(model.folder)
        load_tokenizer(model.folder)
    except BackmergeError as error:
        found.fault("base", error)
        return model
    size = size_of(checkpoint)
    told = f"{experiment.base}: {size.num_parameters:,.0f} parameters; it has a chat template"
    found.add("base", "checked", told)
    return model._replace(size=size)


def _tuned(name: str, base: NamedModel, found: Findings, *, is_cast: bool) -> None:
    model = find_model(found, "tuned", name)
    if model.folder is None:
        return
    if base.folder is None:
        found.add("tuned", "checked", f"{name}; whether it fits the base is not known yet")
        return
    try:
        open_tuned(model.folder, Checkpoint(base.folder), is_cast=is_cast)
    except BackmergeError as error:
        found.fault("tuned", error)
        return
    found.add("tuned", "checked", name)


def _points(
    experiment: Experiment, num_tuned: int, data: Rows, found: Findings, permissions: Permissions
) -> list[Point]:
    """Base, tuned, merges, and snapshots on the way."""
    num_faults = len(found.of_state("fault"))
    for place, sweep in enumerate(experiment.merge):
        found.key = ("merge", place, "method")
        try:
            check_sweep(sweep, num_tuned, permissions)
        except BackmergeError as error:
            found.fault("merge", error)
        for key, name in sweep.models.items():
            found.key = ("merge", place, "models", key)
            if find_model(found, f"merge ({sweep.method})", name).folder is not None:
                found.add(f"merge ({sweep.method})", "checked", name)
    found.key = ("merge",)
    try:
        path = _path_points(experiment, data)
        check_search(experiment.search, experiment.choice)
        if len(found.of_state("fault")) > num_faults:
            return []
        points = points_of(experiment.merge, permissions)
    except BackmergeError as error:
        found.fault("merge", error)
        return []
    series: dict[str, int] = {}
    for point in points:
        if point.role == "merged":
            series[point.series] = series.get(point.series, 0) + 1
    told = ", ".join(f"{name} ({count})" for name, count in series.items())
    found.add(
        "merge", "checked", f"{told}: {count_text(sum(series.values()), 'recipe')} of {count_text(num_tuned, 'model')}"
    )
    return [*points, *path]


def _path_points(experiment: Experiment, data: Rows) -> list[Point]:
    path, settings = experiment.path, experiment.finetune
    if settings is None or not data.num_training:
        return []
    steps = num_steps(settings, data.num_training)  # also where no path is asked for: a snapshot must lie on it
    if path is None or settings.keep_every is None:
        return []
    kinds = [None] * path.snapshots + [path.ema] * (path.ema is not None)
    return [
        Point(f"snapshots({ema})@{number}", "merged", f"snapshots({ema})", None, step=number, ema=ema)
        for ema in kinds
        for number in range(1, steps // settings.keep_every + 1)
    ]


def _loads(experiment: Experiment, found: Findings, permissions: Permissions) -> tuple[list[Load], list[Benchmark]]:
    loads: list[Load] = []
    benchmarks: list[Benchmark] = []
    for kind in KINDS:
        for place, asked in enumerate(getattr(experiment.evaluate, kind)):
            found.key = ("evaluate", kind, place)
            benchmark = look_up_benchmark(asked, kind, found, permissions)
            if benchmark is not None:
                benchmarks.append(benchmark)
            loads.append(load_of(asked, kind, benchmark, experiment.evaluate))
            encoder = encoder_of(asked, benchmark)
            if encoder is not None:
                find_encoder(found, encoder)
    return loads, benchmarks


def _judges(
    experiment: Experiment, benchmarks: Sequence[Benchmark], found: Findings, permissions: Permissions
) -> list[NamedModel]:
    settings = experiment.evaluate
    models: list[NamedModel] = []
    for what, asked in (("judge", settings.judge), ("second judge", settings.second_judge)):
        found.key = ("evaluate", what.replace(" ", "_"))
        if asked is None:
            continue
        try:
            judge = find_judge(asked, permissions)
            if what == "judge":
                check_judge(judge, benchmarks)
            model = judge_model(asked) if isinstance(judge, ModelJudge) else None
        except BackmergeError as error:
            found.fault(what, error)
            continue
        if model is None:
            found.add(what, "checked", f"{asked.name}{'' if judge.is_weak is False else ', weak'}")
            continue
        models.append(find_model(found, what, model))
        if models[-1].folder is not None:
            size = size_of(Checkpoint(models[-1].folder))
            models[-1] = models[-1]._replace(size=size)
            found.add(what, "checked", f"{asked.name}: {model}")
    return models


def _engines(experiment: Experiment, found: Findings, permissions: Permissions) -> None:
    for what, settings in (
        ("engine", experiment.evaluate.engine),
        ("judge's engine", experiment.evaluate.judge.engine),
    ):
        found.key = ("evaluate", "engine", "name") if what == "engine" else ("evaluate", "judge", "engine")
        try:
            kind = engine_class(settings.name, permissions)
        except BackmergeError as error:
            found.fault(what, error)
            continue
        if what == "engine" and kind.is_served:
            told = "a server has its models, and can be given no merged one: measure what it serves with `evaluate`"
            found.add(what, "fault", told)
        elif settings.name == "vllm" and importlib.util.find_spec("vllm") is None:
            found.add(what, "not here", "vllm, pip install 'backmerge[vllm]'")
        elif what == "engine":
            found.add(what, "checked", settings.name)


def _validation(experiment: Experiment, found: Findings) -> bool | None:
    """Whether the held-out rows are answered (or only read); nothing where λ is not chosen on them."""
    settings, choice = experiment.finetune, experiment.choice
    if settings is None or choice.rule != "paper" or not settings.data.validation:
        return None
    measure = measure_of(settings.dataset, choice.validation)
    if measure is None:
        return None
    if measure.metric == "bertscore":
        named = (one.options for one in experiment.evaluate.utility if "model" in one.options)
        find_encoder(found, str(next(named, {}).get("model", DEFAULT_MODEL)))
    found.add("choice of λ", "checked", f"rule paper, on held-out rows by {measure.metric}")
    return measure.metric != "loss"


def _prepared_loads(
    experiment: Experiment, found: Findings, loads: Sequence[Load], permissions: Permissions
) -> list[Load]:
    """All of it is here: what a run checks before it begins, and its own split of the prompts."""
    try:
        prepared = prepare(experiment, permissions, Problems(found.document))
    except BackmergeError as error:
        found.key = ()  # the message has the places
        found.fault("preparation", error)
        return list(loads)
    return [
        load._replace(
            num_answers={
                split: len(examples) * load.num_samples for split, examples in prepared.splits[benchmark.name].items()
            }
        )
        for load, benchmark in zip(loads, prepared.benchmarks, strict=True)
    ]


def _written(experiment: Experiment, base: NamedModel, num_tuned: int) -> float:
    """Bytes of adapters (float32) or tuned checkpoints, and of one merged model for each tuned one."""
    if base.size is None:
        return 0
    whole = bytes_of(base)
    settings = experiment.finetune
    tuned = 0.0
    if settings is not None:
        tuned = whole if settings.mode == "full" else 4.0 * settings.lora.r * base.size.lora_dims
    return num_tuned * (tuned + whole)
