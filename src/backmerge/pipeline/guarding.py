"""Input statistics for merges by direction: collected once, and stored under what they depend on.

- RUN/inputs/KEY.safetensors: for this run's workers on any host, and for later commands
- CACHE/inputs/KEY.safetensors: for other runs
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backmerge import __version__
from backmerge.benchmarks.guards import Asked, Guard, GuardSettings, TaskSettings, digest_of_prompt, find_guards
from backmerge.checkpoints.adapter import is_adapter, open_weights
from backmerge.checkpoints.locate import locate_model
from backmerge.checkpoints.reader import Checkpoint, Weights
from backmerge.config import Settings
from backmerge.errors import CheckpointError, ConfigError, GenerationError, RunError, remedy_for
from backmerge.generation.cache import cache_directory, tokenizer_identity
from backmerge.generation.protocol import EngineSettings, Generator
from backmerge.merging.inputs import InputStatistics, Provenance, write_statistics
from backmerge.merging.method import INPUTS
from backmerge.merging.recipe import Variant
from backmerge.merging.served import dtype_of
from backmerge.outputs import check_apart, paths_read
from backmerge.planning.prepare import Plan, opened_model
from backmerge.planning.settings import without_folders
from backmerge.progress import bar, say
from backmerge.records import Example, to_json
from backmerge.registry import NOTHING_ALLOWED, Permissions
from backmerge.results import GuardRow
from backmerge.runs import key_of

if TYPE_CHECKING:
    from backmerge.generation.transformers_engine import TransformersEngine

FOLDER = "inputs"


Known = dict[tuple[Asked, str], InputStatistics]  # by the settings and the model's fingerprint


def gathered_statistics(
    guards: Mapping[Asked, Guard],
    base: Weights,
    engine: EngineSettings,
    *,
    tuned: Iterable[Weights] = (),
    run: Path | None = None,
    is_cached: bool = True,
    running: Generator | None = None,
) -> Known:
    """Return the inputs of layers, collected if they are not known: the base's on guards, tuned models' on the task.

    Args:
        guards: The guards with their prompts.
        base: The model for the inputs on guards.
        engine: Device, dtype and batch size; the model is run with transformers, whatever the engine's name.
        tuned: The models for the inputs on the task.
        run: A run directory, in which the statistics are also stored.
        is_cached: Whether those of earlier commands are used, and new ones stored for later commands.
        running: An engine with these settings. If it uses transformers, it is used, and keeps the model for later.

    Raises:
        CheckpointError: a file of statistics belongs to another model.
        GenerationError: a model cannot be run.
    """
    found: Known = {}
    with ExitStack() as held:
        local: TransformersEngine | None = None
        for asked, guard in guards.items():
            for model in tuned if isinstance(asked, TaskSettings) else (base,):
                if guard.statistics is not None:
                    found[asked, model.fingerprint] = of_model(guard.statistics, model)
                    continue
                key = _key(guard, model, base, engine)
                kept = [
                    *([run / FOLDER / f"{key}.safetensors"] if run is not None else []),
                    *([cache_directory() / FOLDER / f"{key}.safetensors"] if is_cached or run is None else []),
                ]
                have = _usable(kept, run, model)
                if have is None:
                    have = kept[0]
                    local = local or held.enter_context(_engine_for(engine, running))
                    try:
                        collect(Variant(base) if model is base else _live(base, model), guard, local, have)
                    except GenerationError as error:
                        without = "Or merge by methods without a guard: restore --guard none."
                        raise GenerationError(
                            f"merges by direction (anchored) need inputs of {model.directory}: {error.message}",
                            remedy=" ".join(filter(None, (error.remedy, without))),
                        ) from error
                for path in kept:
                    if path != have and not path.exists():
                        _copied(have, path)
                found[asked, model.fingerprint] = InputStatistics(kept[0])
    return found


def _usable(kept: Sequence[Path], run: Path | None, model: Weights) -> Path | None:
    """Return the first file that exists; one of the cache that is damaged is removed.

    Raises:
        CheckpointError: a file in the run is damaged: its results were made with what it contained.
    """
    for path in kept:
        if not path.is_file():
            continue
        try:
            of_model(InputStatistics(path), model)
        except CheckpointError as error:
            if run is not None and path.is_relative_to(run):
                raise CheckpointError(
                    error.message, remedy=f"delete {path}: the same command collects the statistics again."
                ) from error
            say(f"The statistics in the cache cannot be used and are collected again: {error.message}.")
            path.unlink(missing_ok=True)
            continue
        return path
    return None


@contextmanager
def _engine_for(settings: EngineSettings, running: Generator | None) -> Iterator[TransformersEngine]:
    """Provide the engine that is running if it can gather inputs, else one with its settings, released at the end."""
    # imported here, since most runs collect nothing
    from backmerge.generation.transformers_engine import TransformersEngine

    if type(running) is TransformersEngine:
        yield running
        return
    local = TransformersEngine(settings.model_copy(update={"name": "transformers", "options": {}}))
    try:
        yield local
    finally:
        local.release()


def with_inputs(plan: Plan, tuned: Mapping[str, Weights], run: Path, running: Generator) -> Plan:
    """Return a plan with the statistics of inputs that its merges need, collected if they are not known.

    Args:
        plan: The plan.
        tuned: The tuned models.
        run: The run directory.
        running: The run's engine; see `gathered_statistics`.

    Raises:
        BackmergeError: see `gathered_statistics`.
    """
    settings = plan.experiment.evaluate
    inputs = gathered_statistics(
        plan.guards,
        plan.base,
        settings.engine,
        tuned=tuned.values(),
        run=run,
        is_cached=settings.cache,
        running=running,
    )
    return replace(plan, inputs=inputs)


def _live(base: Weights, tuned: Weights) -> Variant:
    """Return a tuned model as live weights of its base, unrounded: there, each layer has its own name."""
    return Variant(base, tuned, dtype="F32")


class InputsSettings(Settings):
    """The settings of `backmerge inputs`.

    Attributes:
        model: The base, or the tuned model.
        base: The base of an adapter.
        guard: Its prompts; for a task, its rows.
        is_task: Whether the guard is a file of a task's rows, with given answers.
        engine: Device, dtype and batch size.
    """

    model: str
    base: str | None = None
    guard: GuardSettings
    is_task: bool = False
    engine: EngineSettings = EngineSettings()


def gather(
    settings: InputsSettings, path: Path, permissions: Permissions = NOTHING_ALLOWED, *, replace: bool = False
) -> Provenance:
    """Gather the inputs of a model's layers and write them to a file.

    Raises:
        BackmergeError: the model or the prompts are not available, the file exists and must not be replaced, or see
            `collect`.
    """
    check_apart(path, paths_read(settings))
    if os.path.lexists(path):
        try:
            InputStatistics(path)
        except (CheckpointError, OSError) as error:
            raise RunError(
                f"{path} already exists and is not a complete file of input statistics; it was not changed",
                remedy="give another --out, or remove that file yourself.",
            ) from error
        if not replace:
            raise RunError(
                f"{path} already exists, and was not changed", remedy="give another --out, or --force to replace it."
            )
    variant = _variant_of(settings)
    asked: Asked = settings.guard
    if settings.is_task:
        asked = TaskSettings(**settings.guard.model_dump(include=set(TaskSettings.model_fields)))
    guards, _ = find_guards([asked], (), permissions)
    guard = guards[asked]
    if guard.statistics is not None:
        raise ConfigError(
            f"the guard {guard.statistics.path} already contains input statistics",
            remedy="give prompts: a benchmark or a file.",
        )
    with _engine_for(settings.engine, None) as local:
        return collect(variant, guard, local, path, replace=replace)


def _variant_of(settings: InputsSettings) -> Variant:
    place = locate_model(settings.model)
    if settings.base is None or not is_adapter(place):
        return opened_model(place)
    base = Checkpoint(locate_model(settings.base))
    return _live(base, open_weights(place, base))


def of_model(statistics: InputStatistics, model: Weights) -> InputStatistics:
    """Return the statistics if they belong to this model.

    Raises:
        CheckpointError: they belong to another model.
    """
    if statistics.provenance.model != model.fingerprint:
        raise CheckpointError(
            f"{statistics.path} has the inputs of other weights than those of {model.directory} (fingerprints "
            f"{statistics.provenance.model[:12]} and {model.fingerprint[:12]})",
            remedy="collect them from this model: backmerge inputs.",
        )
    return statistics


def collect(
    variant: Variant, guard: Guard, engine: TransformersEngine, path: Path, *, replace: bool = True
) -> Provenance:
    """Run a model on a guard's prompts and write the second moments of its layers' inputs.

    Args:
        variant: The model.
        guard: Its prompts; if it has none, the model writes them.
        engine: Runs the model.
        path: The file of statistics.
        replace: Whether a file that another process made meanwhile is replaced.

    Raises:
        GenerationError: the model cannot be run, or a conversation is longer than its context.
        CheckpointError: the file cannot be written.
    """
    from backmerge.generation.layer_inputs import answers_to, gather_inputs, own_prompts

    settings = guard.settings
    prompts: Sequence[Example] = guard.prompts
    answers: Sequence[str] | None = guard.answers
    if guard.kind == "own":
        say(f"The base writes {settings.num_prompts} prompts.")
        prompts = own_prompts(engine, variant, settings.num_prompts, settings.seed)
    if answers is None:
        with bar("The base's answers to guard prompts", len(prompts), "prompts") as advance:
            answers = answers_to(engine, variant, prompts, settings.max_new_tokens, advance)
    with bar("Inputs on guard prompts", len(prompts), "prompts") as advance:
        conversations = list(zip(prompts, answers, strict=True))
        layers, num_tokens = gather_inputs(engine, variant, conversations, settings.max_directions, advance)
    weights = variant.tuned_models[0] if variant.tuned_models else variant.base
    provenance = Provenance(
        model=weights.fingerprint,
        kind=guard.kind,
        source=str(settings.seed) if guard.kind == "own" else settings.short.partition(":")[0],
        num_prompts=len(prompts),
        num_tokens=num_tokens,
        max_new_tokens=settings.max_new_tokens,
        dtype=engine.dtype_of(variant.base),
        max_directions=settings.max_directions,
        prompts=(*(digest_of_prompt(prompt) for prompt in prompts), *guard.unused),
    )
    write_statistics(path, provenance, layers, replace=replace)
    return provenance


def guard_rows(
    guards: Mapping[Asked, Guard], known: Mapping[tuple[Asked, str], InputStatistics], run: Path
) -> list[GuardRow]:
    """Return the guards of a run for its results, and its tasks' rows."""
    rows = []
    for (asked, model), statistics in known.items():
        path = statistics.path
        file = str(path.relative_to(run) if path.is_relative_to(run) else path.absolute())
        rows.append(
            GuardRow(
                role=INPUTS[isinstance(asked, TaskSettings)],
                guard=asked.short,
                model=model,
                description=guards[asked].description,
                statistics=file,
                fingerprint=statistics.fingerprint,
                source=asked.full,
            )
        )
    return rows


def statistics_of_run(rows: Iterable[GuardRow], wanted: Mapping[str, Asked], run: Path) -> Known:
    """Return the statistics that a finished run made a merge with.

    Args:
        rows: Rows of its results.
        wanted: The merge's guard and task, by role.
        run: The run directory.

    Raises:
        CheckpointError: a file is missing, damaged, or another one.
    """
    found: Known = {}
    rows = list(rows)
    known = Counter((row.role, row.guard, row.model) for row in rows)
    for row in rows:
        asked = wanted.get(row.role)
        if asked is None or asked.short != row.guard:
            continue
        # the same file may have been given with another path
        if asked.full != row.source and known[row.role, row.guard, row.model] > 1:
            continue
        statistics = InputStatistics(run / row.statistics)
        if statistics.fingerprint != row.fingerprint:
            raise CheckpointError(
                f"{statistics.path} is not the file of input statistics that the run used",
                remedy="run the run's command again to make it.",
            )
        found[asked, row.model] = statistics
    return found


def _key(guard: Guard, model: Weights, base: Weights, engine: EngineSettings) -> str:
    """Return a hash of everything that statistics depend on."""
    depends: dict[str, Any] = {
        "model": model.fingerprint,
        "tokenizer": tokenizer_identity(base.companions),
        "prompts": [to_json(prompt) for prompt in guard.prompts],
        "answers": guard.answers,
        "guard": without_folders(guard.settings),
        "dtype": [engine.dtype, engine.device, dtype_of(base)],
        "thinking": engine.thinking,
        "backmerge": __version__,
        **({"unused": guard.unused} if guard.unused else {}),
    }
    return key_of(depends)[:24]


def _copied(source: Path, target: Path) -> None:
    """Put a file in a second place: a link if the disk allows it, else a copy; whole or not at all."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        temporary.replace(target)
    except OSError as error:
        elsewhere = "set BACKMERGE_CACHE to another folder"
        raise CheckpointError(
            f"cannot write {target}: {error}",
            remedy=remedy_for(error, elsewhere) or f"{elsewhere}.",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
