"""What all shards of a run must have in common: the first writes it down, and each finds whether it is so for itself.

    RUN/experiment.yaml              the settings
    RUN/shards/measured-on.json      models, data, judge, engine: all that a unit's name is made of

Where they differed, each shard would leave units that the others, and whoever finishes the run, never find.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from backmerge.config import as_yaml
from backmerge.errors import RunError
from backmerge.generation.protocol import Generator
from backmerge.planning.prepare import Plan
from backmerge.planning.settings import check_kind
from backmerge.progress import say
from backmerge.records import to_json
from backmerge.runs import SHARDS, RunDirectory, key_of, write_once

MEASURED_ON = "measured-on.json"
FREE = "execution"  # the settings that shards may differ in
Difference = tuple[str, Any, Any]  # dotted key, there, here


def measured_on(prepared: Plan, engine: Mapping[str, str]) -> dict[str, Any]:
    """All that answers, verdicts and values rest on beside the settings, as names and hashes."""
    return {
        "base": prepared.base.fingerprint,
        "tuned": {name: weights.fingerprint for name, weights in prepared.tuned.items()},
        "training": {
            str(seed): key_of([[to_json(e) for e in part] for part in (data.training, data.validation)])
            for seed, data in prepared.training.items()
        },
        "benchmarks": {b.name: key_of([to_json(example) for example in b.examples]) for b in prepared.benchmarks},
        "models": {name: weights.fingerprint for name, weights in prepared.models.items()},
        "guards": {
            settings.short: key_of([to_json(prompt) for prompt in guard.prompts])
            for settings, guard in prepared.guards.items()
        },
        "judge": prepared.judge.identity,
        "second_judge": None if prepared.second_judge is None else prepared.second_judge.identity,
        "engine": dict(engine),
    }


def agree(run: RunDirectory, prepared: Plan, engine: Generator) -> None:
    """Write down what all shards must have in common, or find that it is so.

    Raises:
        RunError: it is not; names the first difference.
    """
    check_kind(run.path, "experiment")
    file = run.path / "experiment.yaml"
    write_once(file, as_yaml(prepared.experiment))
    theirs = {key: value for key, value in check_kind(run.path, "experiment").items() if key != FREE}
    ours = prepared.experiment.model_dump(mode="json", exclude={FREE})
    _check_same(run, theirs, ours, file, "give all shards the same settings")
    measured = measured_on(prepared, engine.identity)
    file = run.path / SHARDS / MEASURED_ON
    write_once(file, json.dumps(measured, indent=2) + "\n")
    _check_same(
        run, _read(file), measured, file, "give all shards the same data and versions, and the same kind of GPU"
    )


def tell_of_shards(run: RunDirectory, prepared: Plan, engine: Generator) -> None:
    """Say so where shards measured on something else than this process does: their answers will not be found."""
    file = run.path / SHARDS / MEASURED_ON
    if file.exists():
        difference = _first_difference(_read(file), measured_on(prepared, engine.identity))
        if difference is not None:
            key, theirs, ours = difference
            say(
                f"The shards of {run.path} answered with {key} {theirs}, and this process has {ours}: what they did is "
                "not of this experiment as it is here, and is done again."
            )


def _check_same(run: RunDirectory, theirs: Mapping[str, Any], ours: Mapping[str, Any], file: Path, remedy: str) -> None:
    difference = _first_difference(theirs, ours)
    if difference is None:
        return
    key, there, here = difference
    raise RunError(
        f"in {run.path} the first shard has '{key}' {there}, and this one {here}",
        remedy=f"{remedy}; to go on with what this one has, delete {file} while none is at work: what is done is kept.",
    )


def _first_difference(theirs: Any, ours: Any, key: str = "") -> Difference | None:
    """The first place at which plain data differ."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        names: Iterable[Any] = {**theirs, **ours}
        pairs = [(name, theirs.get(name), ours.get(name)) for name in names]
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = [(place, *both) for place, both in enumerate(zip(theirs, ours, strict=True))]
    else:
        return None if theirs == ours else (key, theirs, ours)
    found = (_first_difference(there, here, f"{key}.{name}" if key else str(name)) for name, there, here in pairs)
    return next(filter(None, found), None)


def _read(file: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{file} is damaged: {error}", remedy="delete that file; what is done is kept.") from error
    return values
