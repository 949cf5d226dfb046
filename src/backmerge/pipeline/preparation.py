"""Everything that an experiment names, found and checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from backmerge.benchmarks.catalogue import find_benchmark
from backmerge.benchmarks.guards import Asked, Guard, find_guards
from backmerge.benchmarks.protocol import Benchmark, Kind
from backmerge.benchmarks.split import SPLITS, Source, Split, are_apart, split_benchmarks
from backmerge.checkpoints.adapter import open_weights
from backmerge.checkpoints.compare import check_same_shape
from backmerge.checkpoints.locate import locate_model, short_name
from backmerge.checkpoints.reader import Checkpoint, Weights
from backmerge.errors import ConfigError, DataError, RunError
from backmerge.finetuning.datasets import TrainingData
from backmerge.generation.chat import load_tokenizer
from backmerge.generation.protocol import Generator
from backmerge.judging.protocol import Judge, JudgeSettings
from backmerge.merging.inputs import InputStatistics
from backmerge.merging.method import find_method
from backmerge.pipeline.guarding import gathered_statistics
from backmerge.pipeline.merges_checked import check_recipe, check_snapshots, check_sweep
from backmerge.pipeline.training_data import load_for, with_notes
from backmerge.planning.points import DTYPES, Member, Output, Point, guards_of, members_at, points_of
from backmerge.planning.settings import EvaluateSettings, Experiment
from backmerge.records import Example
from backmerge.registry import ENGINES, JUDGES, NOTHING_ALLOWED, Permissions, resolve
from backmerge.runs import RunDirectory, key_of
from backmerge.selection import check_search

KINDS: tuple[Kind, ...] = ("utility", "safety", "over_refusal")


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


def prepare(experiment: Experiment, permissions: Permissions = NOTHING_ALLOWED) -> Prepared:
    """Find and check the models, data, benchmarks, methods and judge; writes nothing.

    Raises:
        BackmergeError: the first thing that is wrong.
    """
    check_search(experiment.search, experiment.choice)
    num_tuned = len(experiment.tuned) or len(experiment.finetune.seeds if experiment.finetune else ())
    for sweep in experiment.merge:
        check_sweep(sweep, num_tuned, permissions)
    if getattr(resolve(ENGINES, experiment.evaluate.engine.name, permissions), "is_served", False):
        raise ConfigError(
            "a server has its models, and can be given no merged one, which the confirmation of a λ needs",
            remedy="measure what it serves with `backmerge evaluate --lam`, or choose λ on the engine vllm.",
        )
    judge, second = find_judges(experiment.evaluate, permissions)
    benchmarks = find_benchmarks(experiment.evaluate, permissions)
    check_judge(judge, benchmarks)
    wanted = [asked for sweep in experiment.merge for asked in guards_of(sweep).values()]
    guards, benchmarks = find_guards(wanted, benchmarks, permissions)
    base = Checkpoint(locate_model(experiment.base))
    load_tokenizer(base.directory)
    points = tuple(points_of(experiment.merge, permissions))
    for point in points:
        check_recipe(point, base, num_tuned)
    if experiment.layers is not None:
        first = find_method(experiment.merge[0].method, permissions)
        if not first.has_lam:
            raise ConfigError(
                f"'layers' searches for λs, and {first.name}, the first entry of 'merge', has none",
                remedy="put a method with a λ first.",
            )
    training: dict[int, TrainingData] = {}
    if experiment.finetune is not None:
        training = {seed: load_for(base, experiment.finetune, seed, permissions) for seed in experiment.finetune.seeds}
        check_snapshots(experiment, training)
        training = with_notes(training, benchmarks, is_dropped=experiment.finetune.data.drop_overlap)
    prepared = Prepared(
        experiment,
        base,
        _tuned(experiment.tuned, base, is_cast=experiment.merged_dtype is not None),
        training,
        benchmarks,
        judge,
        second,
        points,
        permissions,
        {
            model: open_tuned(locate_model(model), base, is_cast=experiment.merged_dtype is not None)
            for sweep in experiment.merge
            for model in sweep.models.values()
        },
        guards,
    )
    for point in points if prepared.tuned else ():
        prepared.members_at(point, prepared.tuned)  # a form that a recipe cannot have is refused before any work
    _check_splits(prepared)
    _check_tuned_differ(prepared.tuned)
    return prepared


def find_judge(settings: JudgeSettings, permissions: Permissions = NOTHING_ALLOWED) -> Judge:
    """The judge of that name, with its settings.

    Raises:
        ConfigError: there is none.
    """
    judge: Judge = resolve(JUDGES, settings.name, permissions)(settings)
    return judge


def find_judges(settings: EvaluateSettings, permissions: Permissions = NOTHING_ALLOWED) -> tuple[Judge, Judge | None]:
    """The judge, and the second one if there is one; both can be had.

    Raises:
        BackmergeError: there is none of that name, or its model is missing.
    """
    judge = find_judge(settings.judge, permissions)
    second = None
    if settings.second_judge is not None:
        second = find_judge(settings.second_judge, permissions)
    for found in (judge, second):
        # a judge's identity is that of its model too: what is missing is found before hours of answers
        _ = found.identity if found is not None else None
    return judge, second


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
    kind: Any = resolve(ENGINES, settings.engine.name, permissions)
    engine: Generator = kind(settings.engine)
    return engine


def find_benchmarks(settings: EvaluateSettings, permissions: Permissions = NOTHING_ALLOWED) -> tuple[Benchmark, ...]:
    """All benchmarks that are asked for, each once.

    Raises:
        ConfigError: two go by the same name, or one is unknown or of another kind.
        DataError: a file cannot be read.
    """
    found = [find_benchmark(asked, kind, permissions) for kind in KINDS for asked in getattr(settings, kind)]
    names = [benchmark.name for benchmark in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two benchmarks go by the name '{name}'", remedy="rename one of the files.")
    return tuple(found)


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


def limited(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """At most `limit` examples, drawn by a hash of their ids and kept in order."""
    if limit is None or len(examples) <= limit:
        return list(examples)
    drawn = sorted(examples, key=lambda example: key_of(example.id))[:limit]
    kept = {example.id for example in drawn}
    return [example for example in examples if example.id in kept]


def _tuned(names: Sequence[str], base: Checkpoint, *, is_cast: bool = False) -> dict[str, Weights]:
    opened: dict[str, Weights] = {}
    for name in names:
        path = locate_model(name)
        short = unique = short_name(name)
        number = len(opened)
        while unique in opened:
            number += 1
            unique = f"{short}-{number}"
        opened[unique] = open_tuned(path, base, is_cast=is_cast)
    return opened


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
