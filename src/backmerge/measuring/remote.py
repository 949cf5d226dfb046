"""Answer in other processes: the workers, a request as plain data, and the function with which a worker answers it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from backmerge.checkpoints.adapter import open_weights
from backmerge.checkpoints.reader import Checkpoint, Weights
from backmerge.execution import ExecutionSettings, Executor, executor_of
from backmerge.generation.protocol import EngineSettings, Generator, Request, Sampling, made_engine
from backmerge.merging.inputs import InputStatistics
from backmerge.merging.method import find_method
from backmerge.merging.recipe import Variant
from backmerge.progress import Advance
from backmerge.records import Completion, Example, from_dict
from backmerge.registry import Permissions, is_plugin
from backmerge.runs import RunDirectory


class RemoteWorkers(NamedTuple):
    """Other processes, on this machine or others, that generate answers.

    Attributes:
        executor: Runs them.
        engine: The engine that each of them runs.
        permissions: What may be run.
    """

    executor: Executor
    engine: EngineSettings
    permissions: Permissions

    def spec_of(self, request: Request) -> dict[str, Any]:
        """Return a request as plain data."""
        return spec_of(request, self.engine, self.permissions)


@contextmanager
def remote_workers(
    settings: ExecutionSettings, engine: EngineSettings, permissions: Permissions, run: RunDirectory
) -> Iterator[RemoteWorkers | None]:
    """Provide the processes that make the answers, if it is not this one; they are kept until the block ends."""
    if settings.executor == "in-process":
        yield None
        return
    plugins = [engine.name] if is_plugin(engine.name) else []
    with executor_of(answer, settings, shared=run.path.absolute(), plugins=plugins) as executor:
        yield RemoteWorkers(executor, engine, permissions)


def spec_of(request: Request, engine: EngineSettings, permissions: Permissions) -> dict[str, Any]:
    """Return everything that a worker needs, as plain data; folders must be visible on all machines."""
    variant = request.variant
    assert variant is not None
    return {
        "engine": engine.model_dump(mode="json"),
        "permissions": dataclasses.asdict(permissions),
        "base": str(variant.base.directory.absolute()),
        "tuned": [str(tuned.directory.absolute()) for tuned in variant.tuned_models],
        "extra": {name: str(model.directory.absolute()) for name, model in variant.extra.items()},
        "inputs": {name: str(statistics.path.absolute()) for name, statistics in variant.inputs.items()},
        "recipe": {
            "method": variant.method.name,
            "lam": variant.lam,
            "parameters": dict(variant.parameters),
            "seed": variant.seed,
            "dtype": variant.dtype,
            "rounding": variant.rounding,
            "served_as": variant.served_as,
            "config_from": variant.config_from,
            "tokenizer_from": variant.tokenizer_from,
        },
        "sampling": request.sampling.model_dump(mode="json"),
        "examples": [dataclasses.asdict(example) for example in request.examples],
    }


def answer(spec: Mapping[str, Any], advance: Advance) -> list[dict[str, Any]]:
    """Answer a request in a worker, whose engine is kept for the next one.

    Raises:
        BackmergeError: any error of an engine.
    """
    permissions = Permissions(**spec["permissions"])
    engine = _engine(json.dumps(spec["engine"], sort_keys=True), permissions)
    base = _base(spec["base"])
    tuned = tuple(_tuned(folder, spec["base"]) for folder in spec["tuned"])
    extra = {name: _tuned(folder, spec["base"]) for name, folder in spec["extra"].items()}
    inputs = {name: _statistics(path) for name, path in spec["inputs"].items()}
    one_or_more = (tuned[0] if len(tuned) == 1 else tuned) or None
    recipe = {**spec["recipe"], "method": find_method(spec["recipe"]["method"], permissions)}
    variant = Variant(base, one_or_more, extra=extra, inputs=inputs, **recipe)
    examples = [from_dict(Example, values) for values in spec["examples"]]
    made = engine.generate(variant, examples, Sampling(**spec["sampling"]), advance)
    return [dataclasses.asdict(completion) for completion in made]


def completions_of(result: Any) -> list[Completion]:
    """Return a worker's result as completions."""
    return [from_dict(Completion, values) for values in result]


@cache
def _engine(settings: str, permissions: Permissions) -> Generator:
    parsed = EngineSettings.model_validate_json(settings)
    return made_engine(parsed, permissions)


@cache
def _base(folder: str) -> Checkpoint:
    return Checkpoint(Path(folder))


@cache
def _statistics(path: str) -> InputStatistics:
    return InputStatistics(Path(path))


@cache
def _tuned(folder: str, base: str) -> Weights:
    return open_weights(Path(folder), _base(base))
