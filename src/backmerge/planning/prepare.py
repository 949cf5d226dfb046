"""Find and check everything that an experiment names, before anything is written.

One walk (`look_up`) serves runs and dry runs. Every name is resolved here, once; problems are collected and reported
together, each with its line or option.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from backmerge.benchmarks.guards import Asked, Guard, find_guards
from backmerge.benchmarks.protocol import Benchmark, Kind
from backmerge.benchmarks.split import SPLITS, Source, Split, are_apart, limited, split_benchmarks
from backmerge.checkpoints.adapter import is_adapter, open_weights
from backmerge.checkpoints.compare import check_same_shape
from backmerge.checkpoints.files import MERGED_DTYPES
from backmerge.checkpoints.locate import short_name
from backmerge.checkpoints.reader import Checkpoint, Weights
from backmerge.config import Document
from backmerge.errors import ConfigError, DataError
from backmerge.finetuning.datasets import TrainingData
from backmerge.finetuning.overlap import with_notes
from backmerge.finetuning.settings import num_steps
from backmerge.finetuning.validation import measure_of
from backmerge.generation.chat import load_tokenizer
from backmerge.generation.protocol import engine_class
from backmerge.judging.protocol import Judge, JudgeSettings
from backmerge.merging.inputs import InputStatistics
from backmerge.merging.recipe import Variant
from backmerge.merging.served import as_given
from backmerge.planning import declared
from backmerge.planning.declared import ModelSize
from backmerge.planning.findings import (
    Findings,
    Rows,
    TuningData,
    encoder_of,
    find_encoder,
    find_judge_model,
    find_training,
    look_up_benchmark,
    size_of,
)
from backmerge.planning.held_out import check_validation
from backmerge.planning.points import (
    Member,
    Output,
    Point,
    check_recipe,
    check_snapshots,
    check_sweep,
    guards_of,
    members_at,
    points_of,
)
from backmerge.planning.settings import EvaluateSettings, Experiment
from backmerge.progress import count_text
from backmerge.records import Example
from backmerge.registry import JUDGES, NOTHING_ALLOWED, Permissions, resolve
from backmerge.selection import check_search


@dataclass(frozen=True)
class Plan:
    """An experiment with everything that it names opened, ready to run.

    Attributes:
        experiment: The resolved configuration.
        base: The base's weights.
        tuned: Tuned models that exist already, by name; empty if they must be made.
        training: The training data by seed; empty if nothing is tuned.
        benchmarks: All benchmarks.
        judge: Finds refusals and harm.
        second_judge: Another one, if there is one.
        points: Base, tuned and every merge, with their methods resolved.
        permissions: What may be run.
        models: Other models that merge methods need, by their names in the settings.
        guards: Prompts that merges are made with, split off from the benchmarks.
        inputs: Statistics of models' inputs on them; empty until they are collected.
    """

    experiment: Experiment
    base: Checkpoint
    tuned: Mapping[str, Weights]
    training: Mapping[int, TrainingData]
    benchmarks: tuple[Benchmark, ...]
    judge: Judge
    second_judge: Judge | None
    points: tuple[Point, ...]
    permissions: Permissions
    models: Mapping[str, Weights] = field(default_factory=dict)
    guards: Mapping[Asked, Guard] = field(default_factory=dict)
    inputs: Mapping[tuple[Asked, str], InputStatistics] = field(default_factory=dict)

    @property
    def output(self) -> Output:
        """The form of the merged models."""
        return output_of(self.experiment)

    def of_kind(self, kind: Kind) -> list[str]:
        """Return the names of the benchmarks of one kind."""
        return [benchmark.name for benchmark in self.benchmarks if benchmark.kind == kind]

    @cached_property
    def splits(self) -> dict[str, dict[Split, list[Example]]]:
        """Return each benchmark's two halves, cut to the limit; the whole twice if λ is chosen on no prompt.

        All benchmarks are split together: prompts that two of them share are on the same side in both.
        """
        limit = self.experiment.evaluate.limit
        if self.experiment.evaluate.split == "whole":
            return {b.name: dict.fromkeys(SPLITS, limited(b.examples, limit)) for b in self.benchmarks}
        together = split_benchmarks([Source(b.name, b.kind, b.examples) for b in self.benchmarks])
        halves = {
            name: {split: limited(examples, limit) for split, examples in of.items()} for name, of in together.items()
        }
        calibration = [prompt for guard in self.guards.values() for prompt in guard.prompts]
        assert are_apart(halves, calibration), "λ is never reported on prompts that it or the merge was made with"
        return halves

    def members_at(self, point: Point, tuned: Mapping[str, Weights]) -> list[Member]:
        """Return the models at a point: one for each tuned model, or one for all."""
        return members_at(point, self.base, tuned, self.output, self.models, self.inputs)


class Models(NamedTuple):
    """The models that an experiment names, if they are on this machine: the tuned ones, and others by name."""

    base: Checkpoint | None
    base_size: ModelSize | None
    tuned: Mapping[str, Weights]
    more: Mapping[str, Weights]


class Measures(NamedTuple):
    """Benchmarks and judges that are on this machine.

    Attributes:
        asked: A benchmark, or `None`, for each that the settings name.
        judge: Finds refusals and harm.
        second_judge: Another one, if there is one.
        judge_sizes: Parameters of the judges' models: 0 for one without a model here, `None` if not known.
    """

    asked: tuple[Benchmark | None, ...]
    judge: Judge | None
    second_judge: Judge | None
    judge_sizes: tuple[float | None, ...]

    @property
    def benchmarks(self) -> tuple[Benchmark, ...]:
        """The benchmarks that are on this machine."""
        return tuple(benchmark for benchmark in self.asked if benchmark is not None)


class LookedUp(NamedTuple):
    """The things that an experiment names and that are on this machine.

    Attributes:
        models: Base, tuned models, and others.
        points: Base, tuned and every merge; empty if one of them cannot be made.
        rows: Rows of one seed's tuning; `None` if nothing is tuned.
        measures: Benchmarks and judges.
        plan: Everything together; `None` if something is wrong or missing.
    """

    models: Models
    points: tuple[Point, ...]
    rows: Rows | None
    measures: Measures
    plan: Plan | None


def prepare(
    experiment: Experiment, permissions: Permissions = NOTHING_ALLOWED, document: Document | None = None
) -> Plan:
    """Find and check the models, data, benchmarks, methods and judges; write nothing.

    Args:
        experiment: The resolved settings.
        permissions: What may be run.
        document: Where the settings come from, for messages.

    Raises:
        BackmergeError: all problems together.
    """
    found = Findings(document)
    plan = look_up(experiment, found, permissions).plan
    found.raise_any()
    assert plan is not None
    return plan


def look_up(experiment: Experiment, found: Findings, permissions: Permissions = NOTHING_ALLOWED) -> LookedUp:
    """Find what an experiment names; problems, and in a dry run missing things, are noted."""
    with found.at("search"):
        check_search(experiment.search, experiment.choice)
    models = find_models(experiment, found)
    points = _find_points(experiment, models.base, found, permissions)
    training = _find_training(experiment, models.base, found, permissions)
    _check_engines(experiment, found, permissions)
    measures = find_measures(experiment.evaluate, found, permissions)
    _check_validation_metric(experiment, found)
    plan = None
    if found.is_complete:
        plan = _assembled(experiment, models, points, training, measures, found, permissions)
    return LookedUp(models, points, None if training is None else training.rows, measures, plan)


def _assembled(
    experiment: Experiment,
    models: Models,
    points: tuple[Point, ...],
    training: TuningData | None,
    measures: Measures,
    found: Findings,
    permissions: Permissions,
) -> Plan | None:
    """Combine everything: split guard prompts off, and check what depends on several parts."""
    assert models.base is not None
    assert measures.judge is not None
    guards: Mapping[Asked, Guard] = {}
    benchmarks = measures.benchmarks
    with found.at("merge"):  # guard prompts are split off from all benchmarks
        wanted = [asked for sweep in experiment.merge for asked in guards_of(sweep).values()]
        guards, benchmarks = find_guards(wanted, benchmarks, permissions)
    if found.found:
        return None
    by_seed: Mapping[int, TrainingData] = {}
    if experiment.finetune is not None and training is not None:
        by_seed = with_notes(training.by_seed, benchmarks, is_dropped=experiment.finetune.data.drop_overlap)
    plan = Plan(
        experiment,
        models.base,
        models.tuned,
        by_seed,
        benchmarks,
        measures.judge,
        measures.second_judge,
        points,
        permissions,
        models.more,
        guards,
    )
    for point in points if plan.tuned else ():
        # a form that a recipe cannot have is refused before any work
        key = ("merge", experiment.merge.index(point.sweep)) if point.sweep is not None else ()
        with found.at(*key):
            plan.members_at(point, plan.tuned)
    with found.at("evaluate"):
        _check_splits(plan)
    with found.at("tuned"):
        _check_tuned_differ(plan.tuned)
    with found.at("choice"):
        check_validation(plan, engine_class(experiment.evaluate.engine.name, permissions))
    return plan


def output_of(experiment: Experiment) -> Output:
    """Return the form of an experiment's merged models."""
    dtype = None if experiment.merged_dtype is None else MERGED_DTYPES[experiment.merged_dtype]
    return Output(
        experiment.merged_as,
        dtype,
        experiment.merged_rounding,
        experiment.config_from,
        experiment.tokenizer_from,
    )


def find_models(experiment: Experiment, found: Findings) -> Models:
    """Find the models, and check that they fit the base."""
    base: Checkpoint | None = None
    base_size: ModelSize | None = None
    with found.at("base"):
        folder = found.locate("base", experiment.base)
        if folder is None:
            base_size = declared.model_size(experiment.base)
        else:
            opened = Checkpoint(folder)
            load_tokenizer(opened.directory)
            base, base_size = opened, size_of(opened)
            told = f"{experiment.base}: {base_size.num_parameters:,.0f} parameters; it has a chat template"
            found.add("base", "checked", told)
    is_cast = experiment.merged_dtype is not None
    tuned: dict[str, Weights] = {}
    for place, name in enumerate(experiment.tuned):
        with found.at("tuned", place):
            folder = found.locate("tuned", name)
            if folder is not None and base is not None:
                tuned[_unique(short_name(name), tuned)] = open_tuned(folder, base, is_cast=is_cast)
                found.add("tuned", "checked", name)
            elif folder is not None:
                found.add("tuned", "checked", f"{name}; whether it fits the base is not known yet")
    more: dict[str, Weights] = {}
    for place, sweep in enumerate(experiment.merge):
        for key, name in sweep.models.items():
            with found.at("merge", place, "models", key):
                folder = found.locate("merge", name)
                if folder is not None and base is not None:
                    more[name] = open_tuned(folder, base, is_cast=True, called=f"the model '{key}'")
                    found.add("merge", "checked", name)
    return Models(base, base_size, tuned, more)


def num_tuned(experiment: Experiment) -> int:
    """Return the number of tuned models, including those that must be made."""
    return len(experiment.tuned) or len(experiment.finetune.seeds if experiment.finetune else ())


def _find_points(
    experiment: Experiment, base: Checkpoint | None, found: Findings, permissions: Permissions
) -> tuple[Point, ...]:
    """Return base, tuned and every merge; empty if a method or a parameter is wrong."""
    count, num_before = num_tuned(experiment), len(found.found)
    for place, sweep in enumerate(experiment.merge):
        with found.at("merge", place, "method"):
            for point in points_of([sweep], permissions):
                if point.method is not None:
                    check_sweep(sweep, point.method, count)
                    if base is not None:
                        check_recipe(point, base, count)
    if len(found.found) > num_before:
        return ()
    points: tuple[Point, ...] = ()
    with found.at("merge"):
        points = tuple(points_of(experiment.merge, permissions))
        series: dict[str, int] = {}
        for point in points:
            if point.role == "merged":
                series[point.series] = series.get(point.series, 0) + 1
        told = ", ".join(f"{name} ({number})" for name, number in series.items())
        recipes = count_text(sum(series.values()), "recipe")
        found.add("merge", "checked", f"{told}: {recipes} of {count_text(count, 'model')}")
    first = next((point.method for point in points if point.method is not None), None)
    if experiment.layers is not None and first is not None and not first.has_lam:
        error = ConfigError(
            f"'layers' searches for λs, and {first.name}, the first entry of 'merge', has none",
            remedy="put a method with a λ first.",
        )
        found.note(error, ("layers",))
    return points


def _find_training(
    experiment: Experiment, base: Checkpoint | None, found: Findings, permissions: Permissions
) -> TuningData | None:
    """Return the training data, if anything is tuned."""
    settings = experiment.finetune
    if settings is None:
        return None
    training = TuningData({}, Rows(0, 0))
    with found.at("finetune", "dataset"):
        training = find_training(settings, base, found, permissions)
    with found.at("finetune", "snapshot_steps"):
        if training.rows.num_training:
            num_steps(settings, training.rows.num_training)
    with found.at("finetune", "keep_every"):
        if training.by_seed:
            check_snapshots(experiment, training.by_seed)
    return training


def _check_engines(experiment: Experiment, found: Findings, permissions: Permissions) -> None:
    settings = experiment.evaluate
    with found.at("evaluate", "engine", "name"):
        if engine_class(settings.engine.name, permissions).is_served:
            raise ConfigError(
                "a server has its own models, and cannot load the merged one, which the confirmation of a λ needs",
                remedy="measure its models with `backmerge evaluate --lam`, or choose λ with the engine vllm.",
            )
        if not _needs_vllm(settings.engine.name, "engine", found):
            found.add("engine", "checked", settings.engine.name)
    with found.at("evaluate", "judge", "engine"):
        engine_class(settings.judge.engine.name, permissions)
        _needs_vllm(settings.judge.engine.name, "judge's engine", found)


def _needs_vllm(name: str, what: str, found: Findings) -> bool:
    """Note in a dry run that an engine needs vLLM, if it is not installed."""
    is_missing = found.is_dry_run and name == "vllm" and importlib.util.find_spec("vllm") is None
    if is_missing:
        found.add(what, "not here", "vllm, pip install 'backmerge[vllm]'")
    return is_missing


def find_measures(settings: EvaluateSettings, found: Findings, permissions: Permissions = NOTHING_ALLOWED) -> Measures:
    """Find the benchmarks and judges."""
    asked: list[Benchmark | None] = []
    for kind, place, named in settings.benchmarks:
        asked.append(None)
        with found.at("evaluate", kind, place):
            asked[-1] = look_up_benchmark(named, kind, found, permissions)
            _check_names_differ([benchmark for benchmark in asked if benchmark is not None])
    judges: dict[str, Judge] = {}
    sizes: list[float | None] = []
    for key, chosen in (("judge", settings.judge), ("second_judge", settings.second_judge)):
        with found.at("evaluate", key):
            if chosen is not None:
                judge = find_judge(chosen, permissions)
                sizes.append(find_judge_model(key.replace("_", " "), chosen, judge, found))
                judges[key] = judge
    if "judge" in judges:
        with found.at("evaluate", "judge"):
            check_judge(judges["judge"], [benchmark for benchmark in asked if benchmark is not None])
    return Measures(tuple(asked), judges.get("judge"), judges.get("second_judge"), tuple(sizes))


def _check_validation_metric(experiment: Experiment, found: Findings) -> None:
    """Note which metric chooses λ on held-out rows, if any."""
    settings, choice = experiment.finetune, experiment.choice
    if settings is None or choice.rule != "paper" or not settings.data.validation:
        return
    measure = measure_of(settings.dataset, choice.validation)
    if measure is None:
        return
    with found.at("choice", "validation"):
        if measure.metric == "bertscore":
            find_encoder(found, encoder_of(experiment.evaluate).model)
    found.add("choice of λ", "checked", f"rule paper, on held-out rows by {measure.metric}")


def find_judge(settings: JudgeSettings, permissions: Permissions = NOTHING_ALLOWED) -> Judge:
    """Return the judge with that name, with its settings.

    Raises:
        ConfigError: no judge has that name, or a plugin makes something else.
    """
    judge = resolve(JUDGES, settings.name, permissions)(settings)
    if not isinstance(judge, Judge):
        raise ConfigError(
            f"'{settings.name}' does not make a judge", remedy="make it a subclass of backmerge.judging.protocol.Judge."
        )
    return judge


def check_judge(judge: Judge, benchmarks: Sequence[Benchmark]) -> None:
    """Check that the judge reports what is measured.

    Raises:
        ConfigError: it does not.
    """
    for kind, finds, what in (
        ("safety", judge.finds_harm, "harm"),
        ("over_refusal", judge.finds_refusals, "refusals"),
    ):
        of_kind = [benchmark.name for benchmark in benchmarks if benchmark.kind == kind]
        if of_kind and not finds:
            raise ConfigError(
                f"the judge {judge.name} does not report {what}, which {of_kind[0]} measures",
                remedy="use another judge, such as wildguard.",
            )


def open_tuned(path: Path, base: Checkpoint, *, is_cast: bool = False, called: str = "the tuned model") -> Weights:
    """Open a tuned model; check that it has the base's shape and, unless the merge is cast to another, its dtype.

    Raises:
        CheckpointError: it cannot be read.
        MergeError: it does not fit the base.
    """
    weights = open_weights(path, base)
    check_same_shape(base, weights, is_cast=is_cast, called=called)
    return weights


def opened_model(place: Path, base: Checkpoint | None = None) -> Variant:
    """Return a model unchanged: a checkpoint, with its own tokenizer, or an adapter on its base.

    Raises:
        BackmergeError: it cannot be read, or is an adapter without its base.
    """
    if not is_adapter(place):
        return Variant(Checkpoint(place))
    if base is None:
        raise ConfigError(f"{place} is an adapter, which needs its base", remedy="give its base with --base.")
    return as_given(Variant(base, open_tuned(place, base)))


def _unique(name: str, known: Mapping[str, object]) -> str:
    """Return the name, with a number if it is already used."""
    number, unique = len(known), name
    while unique in known:
        number += 1
        unique = f"{name}-{number}"
    return unique


def _check_names_differ(benchmarks: Sequence[Benchmark]) -> None:
    names = [benchmark.name for benchmark in benchmarks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two benchmarks have the name '{name}'", remedy="rename one of the files.")


def _check_tuned_differ(tuned: Mapping[str, Weights]) -> None:
    """Check that no tuned model is given twice: repetitions would suggest that the seed has no effect."""
    if len(tuned) < 2:
        return
    seen: dict[str, str] = {}
    for name, weights in tuned.items():
        other = seen.setdefault(weights.fingerprint, name)
        if other != name:
            raise ConfigError(
                f"the tuned models '{other}' and '{name}' are the same model",
                remedy="give each once: several models count as repetitions of one tuning.",
            )


def _check_splits(plan: Plan) -> None:
    for name, halves in plan.splits.items():
        for split, examples in halves.items():
            if not examples:
                raise DataError(
                    f"'{name}' has too few prompts to keep a {split} half: results are never reported on the prompts "
                    "that λ was chosen on",
                    remedy="give more prompts that are not near-duplicates of each other. If all use one template, put "
                    "them into one file with a column 'cluster' for those that belong together: within a file clusters "
                    "are taken from names, between files from words.",
                )
