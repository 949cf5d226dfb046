"""Everything that an experiment names, found and checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from backmerge.benchmarks.catalogue import find_benchmark
from backmerge.benchmarks.protocol import Benchmark, Kind
from backmerge.benchmarks.split import Split, split_examples
from backmerge.checkpoints.adapter import open_weights
from backmerge.checkpoints.compare import check_same_shape
from backmerge.checkpoints.locate import locate_model
from backmerge.checkpoints.reader import Checkpoint, Weights
from backmerge.errors import ConfigError, DataError
from backmerge.generation.chat import load_tokenizer
from backmerge.generation.protocol import Generator
from backmerge.judging.protocol import Judge
from backmerge.merging.method import check_parameters, find_method
from backmerge.pipeline.experiment import EvaluateSettings, Experiment
from backmerge.records import Example
from backmerge.registry import ENGINES, JUDGES, resolve
from backmerge.runs import key_of

KINDS: tuple[Kind, ...] = ("utility", "safety", "over_refusal")


@dataclass(frozen=True)
class Prepared:
    """An experiment with what it names, ready to be carried out.

    Attributes:
        experiment: The resolved configuration.
        base: The base's weights.
        tuned: Tuned models that exist already, by name; empty if they are to be made.
        training_examples: What to tune on; empty if nothing is to be tuned.
        benchmarks: All of them.
        judge: Finds refusals and harm.
        allow_plugins: Whether the user's own code may be run.
    """

    experiment: Experiment
    base: Checkpoint
    tuned: Mapping[str, Weights]
    training_examples: Sequence[Example]
    benchmarks: tuple[Benchmark, ...]
    judge: Judge
    allow_plugins: bool

    def of_kind(self, kind: Kind) -> list[str]:
        """Names of the benchmarks of one kind."""
        return [benchmark.name for benchmark in self.benchmarks if benchmark.kind == kind]

    @cached_property
    def splits(self) -> dict[str, dict[Split, list[Example]]]:
        """Benchmark to its two halves, cut to the limit."""
        limit = self.experiment.evaluate.limit
        return {
            benchmark.name: {split: limited(half, limit) for split, half in split_examples(benchmark.examples).items()}
            for benchmark in self.benchmarks
        }


def prepare(experiment: Experiment, *, allow_plugins: bool = False) -> Prepared:
    """Find and check the models, data, benchmarks, methods and judge; writes nothing.

    Raises:
        BackmergeError: the first thing that is wrong.
    """
    for sweep in experiment.merge:
        method = find_method(sweep.method, allow_plugins=allow_plugins)
        check_parameters(method, sweep.method, {**sweep.parameters, "lam": sweep.lam[0]})
    judge = find_judge(experiment.evaluate.judge, allow_plugins=allow_plugins)
    benchmarks = find_benchmarks(experiment.evaluate, allow_plugins=allow_plugins)
    base = Checkpoint(locate_model(experiment.base))
    load_tokenizer(base.directory)
    training_examples: Sequence[Example] = ()
    if experiment.finetune is not None:
        from backmerge.finetuning.datasets import load_examples

        training_examples = load_examples(experiment.finetune.dataset, allow_plugins=allow_plugins)
    prepared = Prepared(
        experiment, base, _tuned(experiment.tuned, base), training_examples, benchmarks, judge, allow_plugins
    )
    _check_splits(prepared)
    return prepared


def find_judge(name: str, *, allow_plugins: bool = False) -> Judge:
    """The judge of that name.

    Raises:
        ConfigError: there is none.
    """
    judge: Judge = resolve(JUDGES, name, allow_plugins=allow_plugins)()
    return judge


def make_engine(settings: EvaluateSettings, *, allow_plugins: bool = False) -> Generator:
    """The engine of that name, on its device.

    Raises:
        BackmergeError: there is none, or its device cannot be used.
    """
    kind: Any = resolve(ENGINES, settings.engine.name, allow_plugins=allow_plugins)
    engine: Generator = kind(settings.engine, allow_plugins=allow_plugins)
    return engine


def find_benchmarks(settings: EvaluateSettings, *, allow_plugins: bool = False) -> tuple[Benchmark, ...]:
    """All benchmarks that are asked for, each once.

    Raises:
        ConfigError: two go by the same name, or one is unknown or of another kind.
        DataError: a file cannot be read.
    """
    found = [
        find_benchmark(name, kind, allow_plugins=allow_plugins) for kind in KINDS for name in getattr(settings, kind)
    ]
    names = [benchmark.name for benchmark in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two benchmarks go by the name '{name}'", remedy="rename one of the files.")
    return tuple(found)


def open_tuned(path: Path, base: Checkpoint) -> Weights:
    """A tuned model, checked to be of the base's shape.

    Raises:
        CheckpointError: it cannot be read.
        MergeError: it does not fit the base.
    """
    weights = open_weights(path, base)
    check_same_shape(base, weights)
    return weights


def limited(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """At most `limit` examples, drawn by a hash of their ids and kept in order."""
    if limit is None or len(examples) <= limit:
        return list(examples)
    drawn = sorted(examples, key=lambda example: key_of(example.id))[:limit]
    kept = {example.id for example in drawn}
    return [example for example in examples if example.id in kept]


def _tuned(names: Sequence[str], base: Checkpoint) -> dict[str, Weights]:
    opened: dict[str, Weights] = {}
    for name in names:
        path = locate_model(name)
        short = name.partition("@")[0].rstrip("/").rpartition("/")[2] or path.name
        unique = short if short not in opened else f"{short}-{len(opened) + 1}"
        opened[unique] = open_tuned(path, base)
    return opened


def _check_splits(prepared: Prepared) -> None:
    for name, halves in prepared.splits.items():
        for split, examples in halves.items():
            if not examples:
                raise DataError(
                    f"'{name}' has too few prompts to keep a {split} half: λ is never reported on the prompts that it "
                    "was chosen on",
                    remedy="give more prompts that are not near-duplicates of each other; where all follow one "
                    "template, a column 'cluster' says which belong together.",
                )
