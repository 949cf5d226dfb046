"""Input statistics for merges by direction: collected once, and kept by what they depend on.

RUN/inputs/KEY.safetensors                    of a run, for its workers on any host, and for later commands
CACHE/inputs/KEY.safetensors                  for other runs
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from backmerge import __version__
from backmerge.benchmarks.guards import Guard, GuardSettings, digest_of_prompt, find_guards, task_rows
from backmerge.checkpoints.adapter import is_adapter, open_weights
from backmerge.checkpoints.locate import locate_model
from backmerge.checkpoints.reader import Checkpoint, Weights
from backmerge.config import Settings
from backmerge.errors import CheckpointError, ConfigError
from backmerge.generation.cache import cache_directory, tokenizer_identity
from backmerge.generation.protocol import EngineSettings
from backmerge.merging.inputs import InputStatistics, Provenance, write_statistics
from backmerge.merging.recipe import Variant
from backmerge.merging.served import dtype_of
from backmerge.progress import bar, say
from backmerge.records import Example, to_json
from backmerge.registry import NOTHING_ALLOWED, Permissions
from backmerge.runs import key_of

FOLDER = "inputs"


def guard_statistics(
    guards: Mapping[GuardSettings, Guard],
    base: Weights,
    engine: EngineSettings,
    *,
    run: Path | None = None,
    is_cached: bool = True,
) -> dict[GuardSettings, InputStatistics]:
    """The inputs of a base's layers on each guard's prompts, collected where they are not known yet.

    Args:
        guards: With their prompts.
        base: The model whose inputs count.
        engine: Device, dtype and batch size; the model is run by transformers, whatever the engine's name.
        run: A run directory, where the statistics are kept as well.
        is_cached: Whether those of earlier commands are used, and these kept for later ones.

    Raises:
        CheckpointError: a file of statistics is of another model.
        GenerationError: the model cannot be run.
    """
    found: dict[GuardSettings, InputStatistics] = {}
    for settings, guard in guards.items():
        if guard.statistics is not None:
            found[settings] = of_model(guard.statistics, base)
            continue
        key = _key(guard, base, engine)
        kept = [
            *([run / FOLDER / f"{key}.safetensors"] if run is not None else []),
            *([cache_directory() / FOLDER / f"{key}.safetensors"] if is_cached or run is None else []),
        ]
        have = next((path for path in kept if path.is_file()), None)
        if have is None:
            collect(Variant(base), guard, engine, kept[0])
            have = kept[0]
        for path in kept:
            if path != have and not path.exists():
                _copied(have, path)
        found[settings] = InputStatistics(kept[0])
    return found


class InputsSettings(Settings):
    """What `backmerge inputs` does.

    Attributes:
        model: The base, or the tuned model.
        base: The base of an adapter.
        guard: Its prompts; of a task, its rows.
        is_task: Whether the guard is a file of a task's rows, whose answers are given.
        engine: Device, dtype and batch size.
    """

    model: str
    base: str | None = None
    guard: GuardSettings
    is_task: bool = False
    engine: EngineSettings = EngineSettings()


def gather(settings: InputsSettings, path: Path, permissions: Permissions = NOTHING_ALLOWED) -> Provenance:
    """Gather the inputs of a model's layers and write them to a file.

    Raises:
        BackmergeError: the model or the prompts cannot be had, or see `collect`.
    """
    variant = _variant_of(settings)
    if settings.is_task:
        rows = task_rows(Path(settings.guard.source))[: settings.guard.num_prompts]
        guard = Guard(settings.guard, "task", tuple(example for example, _ in rows))
        return collect(variant, guard, settings.engine, path, [answer for _, answer in rows])
    guards, _ = find_guards([settings.guard], (), permissions)
    guard = guards[settings.guard]
    if guard.statistics is not None:
        raise ConfigError(
            f"the guard {guard.statistics.path} is such a file already", remedy="give prompts: a benchmark or a file."
        )
    return collect(variant, guard, settings.engine, path)


def _variant_of(settings: InputsSettings) -> Variant:
    place = locate_model(settings.model)
    if not is_adapter(place):
        return Variant(Checkpoint(place))
    if settings.base is None:
        raise ConfigError(
            f"{place} is an adapter, which is no model without its base", remedy="give its base with --base."
        )
    base = Checkpoint(locate_model(settings.base))
    return Variant(base, open_weights(place, base), dtype="F32")  # as live weights, in which each layer has its name


def of_model(statistics: InputStatistics, model: Weights) -> InputStatistics:
    """Statistics, if they are of this model.

    Raises:
        CheckpointError: they are of another.
    """
    if statistics.provenance.model != model.fingerprint:
        raise CheckpointError(
            f"{statistics.path} holds the inputs of other weights than {model.directory} has (fingerprints "
            f"{statistics.provenance.model[:12]} and {model.fingerprint[:12]})",
            remedy="collect them from this model: backmerge inputs.",
        )
    return statistics


def collect(
    variant: Variant,
    guard: Guard,
    engine: EngineSettings,
    path: Path,
    answers: Sequence[str] | None = None,
) -> Provenance:
    """Run a model on a guard's prompts and write the second moments of its layers' inputs.

    Args:
        variant: The model.
        guard: Its prompts; where there are none, the model writes them.
        engine: Device, dtype and batch size.
        path: The file of statistics.
        answers: To the prompts; the model's own greedy ones if not given.

    Raises:
        GenerationError: the model cannot be run, or a conversation is longer than its context.
        CheckpointError: the file cannot be written.
    """
    # imported here: most runs gather nothing
    from backmerge.generation.layer_inputs import answers_to, gather_inputs, own_prompts
    from backmerge.generation.transformers_engine import TransformersEngine

    settings = guard.settings
    local = TransformersEngine(engine.model_copy(update={"name": "transformers", "options": {}}))
    prompts: Sequence[Example] = guard.prompts
    if guard.kind == "own":
        say(f"The base writes {settings.num_prompts} prompts of its own.")
        prompts = own_prompts(local, variant, settings.num_prompts, settings.seed)
    if answers is None:
        with bar("The base's answers to guard prompts", len(prompts), "prompts") as advance:
            answers = answers_to(local, variant, prompts, settings.max_new_tokens, advance)
    with bar("Inputs on guard prompts", len(prompts), "prompts") as advance:
        conversations = list(zip(prompts, answers, strict=True))
        layers, num_tokens = gather_inputs(local, variant, conversations, settings.max_directions, advance)
    weights = variant.tuned_models[0] if variant.tuned_models else variant.base
    provenance = Provenance(
        model=weights.fingerprint,
        kind=guard.kind,
        source=str(settings.seed) if guard.kind == "own" else settings.short.partition(":")[0],
        num_prompts=len(prompts),
        num_tokens=num_tokens,
        max_new_tokens=settings.max_new_tokens,
        dtype=local.dtype_of(variant.base),
        max_directions=settings.max_directions,
        prompts=tuple(digest_of_prompt(prompt) for prompt in prompts),
    )
    local.release()
    write_statistics(path, provenance, layers)
    return provenance


class GuardRow(NamedTuple):
    """A guard as results name it.

    Attributes:
        guard: What it is called, in a point's parameters as well.
        told: Its prompts in words.
        statistics: The file of the base's inputs, within the run directory or by its path.
        fingerprint: Of that file.
    """

    guard: str
    told: str
    statistics: str
    fingerprint: str


def guard_rows(
    guards: Mapping[GuardSettings, Guard], inputs: Mapping[GuardSettings, InputStatistics], run: Path
) -> list[GuardRow]:
    """The guards of a run for its results."""
    rows = []
    for settings, statistics in inputs.items():
        path = statistics.path
        file = str(path.relative_to(run) if path.is_relative_to(run) else path.absolute())
        rows.append(GuardRow(settings.short, guards[settings].told, file, statistics.fingerprint))
    return rows


def statistics_of_run(
    rows: Iterable[Mapping[str, Any]], settings: GuardSettings, run: Path
) -> dict[GuardSettings, InputStatistics]:
    """The statistics that a finished run made a merge with.

    Raises:
        CheckpointError: the file is gone, damaged, or another one.
    """
    row = next(row for row in rows if row["guard"] == settings.short)
    path = run / row["statistics"]
    found = InputStatistics(path)
    if found.fingerprint != row["fingerprint"]:
        raise CheckpointError(
            f"{path} is not the file of input statistics that the run used",
            remedy="give the run's command again: it makes it anew.",
        )
    return {settings: found}


def _key(guard: Guard, base: Weights, engine: EngineSettings) -> str:
    """A hash of all that statistics depend on."""
    depends: dict[str, Any] = {
        "base": base.fingerprint,
        "tokenizer": tokenizer_identity(base.companions),
        "prompts": [to_json(prompt) for prompt in guard.prompts],
        "guard": guard.settings.model_dump(mode="json"),
        "dtype": [engine.dtype, engine.device, dtype_of(base)],
        "thinking": engine.thinking,
        "backmerge": __version__,
    }
    return key_of(depends)[:24]


def _copied(source: Path, target: Path) -> None:
    """A file in a second place: the same bytes by a link where the disk allows it, else a copy; whole or not at all."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        temporary.replace(target)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error}", remedy="free the disk, or set BACKMERGE_CACHE to another folder."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
