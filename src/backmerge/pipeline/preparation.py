"""Everything that an experiment names, found and checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from backmerge.benchmarks.catalogue import find_benchmark
from backmerge.benchmarks.guards import Asked, Guard, find_guards
from backmerge.benchmarks.protocol import Benchmark, Kind
from backmerge.benchmarks.split import SPLITS, Source, Split, are_apart, limited, split_benchmarks
from backmerge.checkpoints.adapter import open_weights
from backmerge.checkpoints.compare import check_same_shape
from backmerge.checkpoints.locate import locate_model, short_name
from backmerge.checkpoints.reader import Checkpoint, Weights
from backmerge.config import Problems
from backmerge.errors import ConfigError, DataError, RunError
from backmerge.finetuning.datasets import TrainingData
from backmerge.generation.chat import load_tokenizer
from backmerge.generation.protocol import Generator, engine_class, made_engine
from backmerge.judging.protocol import Judge, JudgeSettings
from backmerge.merging.inputs import InputStatistics
from backmerge.merging.method import find_method
from backmerge.pipeline.guarding import gathered_statistics
from backmerge.pipeline.merges_checked import check_recipe, check_snapshots, check_sweep
from backmerge.pipeline.training_data import load_for, with_notes
from backmerge.planning.points import DTYPES, Member, Output, Point, guards_of, members_at, points_of
from backmerge.planning.settings import EvaluateSettings, Experiment
from backmerge.records import Example
from backmerge.registry import JUDGES, NOTHING_ALLOWED, Permissions, resolve
from backmerge.runs import RunDirectory
from backmerge.selection import check_search

KINDS: tuple[Kind, ...] = ("utility", "safety", "over_refusal", "keep")


@dataclass(frozen=True)
class Prepared:
    """An experiment with what it names, ready to be carried out.

    Attributes:
        experiment: The resolved configuration.
        base: The base's weights.
        tuned: Tuned models that exist already, by name; empty if they are to be made.
        training: Seed to what it is tuned on; empty if nothing is to be tuned.
        benchmarks: All of them.
        judge: Finds refusals and harm.
        second_judge: Another one, if there is one.
        points: Base, tuned and every merge, their methods resolved.
        permissions: What may be run.
        models: More models that merge methods ask for, by what the settings call them.
        guards: Prompts that merges are made with, split off from the benchmarks.
        inputs: Statistics of models' inputs on them; none until they are collected (`with_inputs`).
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
        """Names of the benchmarks of one kind."""
        return [benchmark.name for benchmark in self.benchmarks if benchmark.kind == kind]

    @cached_property
    def splits(self) -> dict[str, dict[Split, list[Example]]]:
        """Benchmark to its two halves, cut to the limit; to the whole twice, where no prompt is chosen on.

        All benchmarks are split as one: what two of them share is on the same side in both.
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
        """The models at a point: one for each tuned model, or one of all."""
        found = (self.output, self.models, self.inputs)
        return members_at(point, self.base, tuned, *found)


def with_inputs(prepared: Prepared, tuned: Mapping[str, Weights], run: Path) -> Prepared:
    """The same with statistics of inputs on each guard's prompts and task's rows, collected where they are not known.

    Raises:
        BackmergeError: see `gathered_statistics`.
    """
    settings = prepared.experiment.evaluate
    inputs = gathered_statistics(
        prepared.guards, prepared.base, settings.engine, tuned=tuned.values(), run=run, is_cached=settings.cache
    )
    return replace(prepared, inputs=inputs)


def output_of(experiment: Experiment) -> Output:
    """The form of an experiment's merged models."""
    dtype = None if experiment.merged_dtype is None else DTYPES[experiment.merged_dtype]
    return Output(
        experiment.merged_as,
        dtype,
        experiment.merged_rounding,
        experiment.config_from,
        experiment.tokenizer_from,
    )


def prepare(
    experiment: Experiment, permissions: Permissions = NOTHING_ALLOWED, problems: Problems | None = None
) -> Prepared:
    """Find and check the models, data, benchmarks, methods and judge; writes nothing.

    Args:
        experiment: The resolved settings.
        permissions: What may be run.
        problems: To which all that is wrong is added, with the keys that it is about.

    Raises:
        BackmergeError: all that is wrong, together.
    """
    found = Problems() if problems is None else problems
    with found.at("search"):
        check_search(experiment.search, experiment.choice)
    with found.at("evaluate", "engine", "name"):
        _check_takes_merges(experiment, permissions)
    measures = find_measures(experiment.evaluate, found, permissions)
    models = find_models(experiment, found)
    points = _find_points(experiment, models.base, found, permissions)
    guards: Mapping[Asked, Guard] = {}
    benchmarks = measures.benchmarks
    with found.at("merge"):
        wanted = [asked for sweep in experiment.merge for asked in guards_of(sweep).values()]
        if not found.found:  # their prompts are split off from all benchmarks
            guards, benchmarks = find_guards(wanted, benchmarks, permissions)
    training: dict[int, TrainingData] = {}
    if experiment.finetune is not None and models.base is not None:
        with found.at("finetune", "dataset"):
            training = {
                seed: load_for(models.base, experiment.finetune, seed, permissions)
                for seed in experiment.finetune.seeds
            }
        with found.at("finetune", "keep_every"):
            if training:
                check_snapshots(experiment, training)
    found.raise_any()
    assert models.base is not None
    assert measures.judge is not None
    if experiment.finetune is not None:
        training = with_notes(training, benchmarks, is_dropped=experiment.finetune.data.drop_overlap)
    prepared = Prepared(
        experiment,
        models.base,
        models.tuned,
        training,
        benchmarks,
        measures.judge,
        measures.second_judge,
        points,
        permissions,
        models.more,
        guards,
    )
    for point in points if prepared.tuned else ():
        # a form that a recipe cannot have is refused before any work
        key = ("merge", experiment.merge.index(point.sweep)) if point.sweep is not None else ()
        with found.at(*key):
            prepared.members_at(point, prepared.tuned)
    with found.at("evaluate"):
        _check_splits(prepared)
    with found.at("tuned"):
        _check_tuned_differ(prepared.tuned)
    found.raise_any()
    return prepared


class Measures(NamedTuple):
    """What models are measured with, as far as it can be had."""

    benchmarks: tuple[Benchmark, ...]
    judge: Judge | None
    second_judge: Judge | None


def find_measures(
    settings: EvaluateSettings, problems: Problems, permissions: Permissions = NOTHING_ALLOWED
) -> Measures:
    """Find the benchmarks and judges; what is wrong with them is noted."""
    judges: dict[str, Judge] = {}
    for key, asked in (("judge", settings.judge), ("second_judge", settings.second_judge)):
        with problems.at("evaluate", key):
            if asked is not None:
                judges[key] = find_judge(asked, permissions)
                # its identity is that of its model too: what is missing is found before hours of answers
                _ = judges[key].identity
    benchmarks: list[Benchmark] = []
    for kind in KINDS:
        for place, named in enumerate(getattr(settings, kind)):
            with problems.at("evaluate", kind, place):
                benchmarks.append(find_benchmark(named, kind, permissions))
                check_names_differ(benchmarks)
    if "judge" in judges:
        with problems.at("evaluate", "judge"):
            check_judge(judges["judge"], benchmarks)
    return Measures(tuple(benchmarks), judges.get("judge"), judges.get("second_judge"))


class Models(NamedTuple):
    """The models that an experiment names, as far as they can be had: the tuned ones, and more by their names."""

    base: Checkpoint | None
    tuned: Mapping[str, Weights]
    more: Mapping[str, Weights]


def find_models(experiment: Experiment, problems: Problems) -> Models:
    """Find the models, and check that they fit the base; what is wrong with them is noted."""
    base: Checkpoint | None = None
    with problems.at("base"):
        base = Checkpoint(locate_model(experiment.base))
        load_tokenizer(base.directory)
    is_cast = experiment.merged_dtype is not None
    tuned: dict[str, Weights] = {}
    for place, name in enumerate(experiment.tuned):
        with problems.at("tuned", place):
            path = locate_model(name)
            if base is not None:
                tuned[_unique(short_name(name), tuned)] = open_tuned(path, base, is_cast=is_cast)
    more: dict[str, Weights] = {}
    for place, sweep in enumerate(experiment.merge):
        for key, name in sweep.models.items():
            with problems.at("merge", place, "models", key):
                path = locate_model(name)
                if base is not None:
                    more[name] = open_tuned(path, base, is_cast=is_cast)
    return Models(base, tuned, more)


def _find_points(
    experiment: Experiment, base: Checkpoint | None, problems: Problems, permissions: Permissions
) -> tuple[Point, ...]:
    """Base, tuned and every merge; what is wrong with their methods and parameters is noted."""
    num_tuned = len(experiment.tuned) or len(experiment.finetune.seeds if experiment.finetune else ())
    num_before = len(problems.found)
    for place, sweep in enumerate(experiment.merge):
        with problems.at("merge", place, "method"):
            check_sweep(sweep, num_tuned, permissions)
            if base is not None:
                for point in points_of([sweep], permissions):
                    check_recipe(point, base, num_tuned)
    if len(problems.found) > num_before:
        return ()
    points: tuple[Point, ...] = ()
    with problems.at("merge"):
        points = tuple(points_of(experiment.merge, permissions))
    first = find_method(experiment.merge[0].method, permissions)
    if experiment.layers is not None and not first.has_lam:
        error = ConfigError(
            f"'layers' searches for λs, and {first.name}, the first entry of 'merge', has none",
            remedy="put a method with a λ first.",
        )
        problems.note(error, ("layers",))
    return points


def _check_takes_merges(experiment: Experiment, permissions: Permissions) -> None:
    if engine_class(experiment.evaluate.engine.name, permissions).is_served:
        raise ConfigError(
            "a server has its models, and can be given no merged one, which the confirmation of a λ needs",
            remedy="measure what it serves with `backmerge evaluate --lam`, or choose λ on the engine vllm.",
        )


def _unique(name: str, known: Mapping[str, object]) -> str:
    """The name, with a number if it is taken."""
    number, unique = len(known), name
    while unique in known:
        number += 1
        unique = f"{name}-{number}"
    return unique


def find_judge(settings: JudgeSettings, permissions: Permissions = NOTHING_ALLOWED) -> Judge:
    """The judge of that name, with its settings.

    Raises:
        ConfigError: there is none, or a plugin makes something else.
    """
    judge = resolve(JUDGES, settings.name, permissions)(settings)
    if not isinstance(judge, Judge):
        raise ConfigError(
            f"'{settings.name}' makes no judge", remedy="make it a subclass of backmerge.judging.protocol.Judge."
        )
    return judge


def check_judge(judge: Judge, benchmarks: Sequence[Benchmark]) -> None:
    """Whether the judge finds what is measured.

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
                f"the judge {judge.name} says nothing about {what}, which {of_kind[0]} measures",
                remedy="take another judge, such as wildguard.",
            )


def make_engine(settings: EvaluateSettings, permissions: Permissions = NOTHING_ALLOWED) -> Generator:
    """The engine of that name, on its device.

    Raises:
        BackmergeError: there is none, or its device cannot be used.
    """
    return made_engine(settings.engine, permissions)


def find_benchmarks(settings: EvaluateSettings, permissions: Permissions = NOTHING_ALLOWED) -> tuple[Benchmark, ...]:
    """All benchmarks that are asked for, each once.

    Raises:
        ConfigError: two go by the same name, or one is unknown or of another kind.
        DataError: a file cannot be read.
    """
    found = tuple(find_benchmark(asked, kind, permissions) for kind in KINDS for asked in getattr(settings, kind))
    check_names_differ(found)
    return found


def check_names_differ(benchmarks: Sequence[Benchmark]) -> None:
    """Check that no two benchmarks have one name.

    Raises:
        ConfigError: two have.
    """
    names = [benchmark.name for benchmark in benchmarks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two benchmarks go by the name '{name}'", remedy="rename one of the files.")


def open_tuned(path: Path, base: Checkpoint, *, is_cast: bool = False) -> Weights:
    """A tuned model, checked to be of the base's shape and, unless the merge is cast to another, of its dtype.

    Raises:
        CheckpointError: it cannot be read.
        MergeError: it does not fit the base.
    """
    weights = open_weights(path, base)
    check_same_shape(base, weights, is_cast=is_cast)
    return weights


def settings_left(run: RunDirectory) -> dict[str, Any]:
    """The settings that the last command left in a run directory; empty if there are none.

    Raises:
        RunError: `experiment.yaml` is damaged.
    """
    file = run.path / "experiment.yaml"
    if not file.exists():
        return {}
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise RunError(f"{file} is damaged: {error}", remedy="delete that file; what is done is kept.") from error
    if not isinstance(values, dict):
        raise RunError(f"{file} holds no settings", remedy="delete that file; what is done is kept.")
    return values


def kind_of_run(settings: Mapping[str, Any]) -> str:
    """What a run directory holds, by its settings: `experiment`, `evaluation`, `check`, scored `answers` or nothing."""
    if not settings:
        return ""
    if settings.keys() & {"against", "against_run"}:
        return "check"
    return "answers" if "answers" in settings else "evaluation" if "model" in settings else "experiment"


def check_kind(run: RunDirectory, kind: str) -> dict[str, Any]:
    """The settings that are left in a run directory, if it is of this kind or new.

    Raises:
        RunError: it is of another kind, or damaged.
    """
    settings = settings_left(run)
    found = kind_of_run(settings)
    if found not in ("", kind):
        what = {
            "experiment": "an experiment",
            "evaluation": "the evaluation of one model (`backmerge evaluate`)",
            "answers": "scored answers (`backmerge score`)",
            "check": "a check (`backmerge check`)",
        }
        raise RunError(
            f"{run.path} holds {what[found]}, not {what[kind].partition(' (')[0]}",
            remedy="give another --out; nothing was touched.",
        )
    return settings


def _check_tuned_differ(tuned: Mapping[str, Weights]) -> None:
    """Repetitions show how much the seed decides; a model given twice would show that it decides nothing."""
    if len(tuned) < 2:
        return
    seen: dict[str, str] = {}
    for name, weights in tuned.items():
        other = seen.setdefault(weights.fingerprint, name)
        if other != name:
            raise ConfigError(
                f"the tuned models '{other}' and '{name}' are one and the same",
                remedy="give each once: several are taken for repetitions of one tuning.",
            )


def _check_splits(prepared: Prepared) -> None:
    for name, halves in prepared.splits.items():
        for split, examples in halves.items():
            if not examples:
                raise DataError(
                    f"'{name}' has too few prompts to keep a {split} half: λ is never reported on the prompts that it "
                    "was chosen on",
                    remedy="give more prompts that are not near-duplicates of each other. If all follow one template, "
                    "put them into one file whose column 'cluster' says which belong together: names are trusted "
                    "within a file, not between files.",
                )
