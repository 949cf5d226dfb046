"""Define the arguments of the functions: typed dictionaries, so that each argument is described once.

A function takes `**options: Unpack[GROUP]`. `spelled_out` writes the group's arguments into its signature and
docstring, so that `help`, notebooks and editors show each of them.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypedDict, TypeVar

from backmerge.api.given import Data, Judging, Metric, Savable
from backmerge.config import CommandLine, Document, KeyPath, SettingsT, validated, with_overrides
from backmerge.registry import Permissions

Function = TypeVar("Function", bound=Callable[..., Any])
REMEDY = "correct these; `help(backmerge.{name})` describes each argument."


class Measuring(TypedDict, total=False):
    """The arguments that `restore`, `evaluate` and `check` share.

    Attributes:
        utility: The task that the model was tuned for: prompts with answers.
        safety: Harmful requests.
        over_refusal: Harmless requests, to measure how many are refused.
        metric: Scores an answer to a row of `utility`, if that is a list of rows; exact match by default.
        judge: Decides whether answers are refusals or harmful; by default `refusal-phrases`, which is weak.
        second_judge: Another judge, shown with the agreement of the two. With a published judge, by default another
            published judge whose weights are on this machine; `none` for only one judge.
        limit: Largest number of prompts of each split, for a quick try.
        max_new_tokens: Limit on the length of answers, in tokens; a benchmark's own limit applies if it is lower.
        engine: The engine that runs the models: `transformers`, `vllm` or `openai`.
        engine_options: The engine's own options.
        device: `auto`, `cpu`, `cuda`, `mps`.
        dtype: Dtype of the computation: `auto`, `float32`, `bfloat16` or `float16`.
        batch_size: Prompts per batch.
        thinking: Whether a reasoning model thinks before it answers; by default its chat template decides.
        cache: Whether answers of earlier runs are used, and new ones stored; true by default.
        executor: Where answers are generated: `in-process`, `pool` or `ray`.
        num_workers: Number of processes in the pool.
        ray_address: Address of the Ray cluster.
        tokenizer: The tokenizer of a loaded model.
        out: The run directory. The same call continues an interrupted run; results of other settings are moved to its
            folder `earlier`.
        settings: Any other setting by its dotted key, such as `evaluate.max_unscored`.
        allow_plugins: Whether code named as package.module:function may run.
        allow_code_execution: Whether code that a model wrote may run if bubblewrap does not work.
    """

    utility: Data
    safety: Data
    over_refusal: Data
    metric: Metric | None
    judge: Judging | None
    second_judge: Judging | None
    limit: int | None
    max_new_tokens: int | None
    engine: str | None
    engine_options: Mapping[str, Any]
    device: str | None
    dtype: str | None
    batch_size: int | None
    thinking: bool | None
    cache: bool | None
    executor: str | None
    num_workers: int | None
    ray_address: str | None
    tokenizer: Savable | None
    out: str | Path
    settings: Mapping[str, Any] | CommandLine
    allow_plugins: bool
    allow_code_execution: bool


class Restoring(Measuring, total=False):
    """The arguments of `restore`; it needs `utility`, and `safety` or `keep`.

    Attributes:
        keep: Abilities that tuning should not reduce, such as general knowledge or another language: prompts with
            answers. Without `safety`, λ is chosen and confirmed by these alone.
        method: Merge methods; several are compared. Linear and `anchored` by default.
        guard: For `anchored`: the prompts on which the merge should act like the base, a benchmark's name, a file, or
            `own` (the default) for prompts that the base writes. `none` leaves `anchored` out.
        task_inputs: For `anchored`: prompts of the task with answers, such as the training rows, on which the merge
            should act like the tuned model; these rows are not used for measuring. Or a file from `backmerge inputs
            --task`.
        lam: λs to try, the share of the tuned side, in (0, 1); by default 0.2, 0.4, 0.6 and 0.8, and with
            `task_inputs` 0.03, 0.1, 0.25 and 0.5 for `anchored`.
        margin: How far the attack success rate may exceed the base's, as a share; 0.03 by default.
        keep_margin: Largest accepted loss on each of `keep`, as a share; 0.05 by default.
        rule: How λ is chosen: `safe` by default, `target`, `weighted`, `pareto`, `paper`.
    """

    keep: Data
    method: str | Sequence[str] | None
    guard: str | None
    task_inputs: str | Path | None
    lam: Sequence[float]
    margin: float | None
    keep_margin: float | None
    rule: str | None


class Evaluating(Measuring, total=False):
    """The arguments of `evaluate`; it needs something to measure.

    Attributes:
        base: The base of an adapter or of merges.
        lam: λs of merges to measure, in [0, 1]; by default only the model is measured.
        method: Merge method.
        guard: For `anchored`: the prompts on which the merge should act like the base.
    """

    base: Any  # a model
    lam: Sequence[float]
    method: str | None
    guard: str | None


class Checking(Measuring, total=False):
    """The arguments of `check`; it needs the base with `safety` or `keep`, or an earlier run.

    Attributes:
        against_run: Instead of the base: an earlier run that measured it. Its prompts and judge are used.
        keep: Abilities that the model should have kept, such as general knowledge: prompts with answers.
        margin: How far the attack success rate may exceed the base's, as a share; 0.03 by default.
        over_refusal_margin: The same for over-refusal, which is reported but not part of the verdict.
        keep_margin: Largest accepted loss on each of `keep`, as a share; 0.05 by default.
    """

    against_run: str | Path | None
    keep: Data
    margin: float | None
    over_refusal_margin: float | None
    keep_margin: float | None


class Finetuning(TypedDict, total=False):
    """The arguments of `finetune`.

    Attributes:
        out: Folder of the tuned model; `OUT/seed-N` with several seeds.
        task: A task of the paper: `reasoning`, `medical`, `code`, `tools`; or another one from `backmerge list tasks`.
            `data` is then your own copy of its data.
        columns: Your column names, if they differ, such as `{"prompt": "question"}`.
        num_examples: Largest number of rows; they are sampled.
        validation: Share of the rows to hold out; 0.1 by default.
        system: The system prompt, instead of the task's; empty for none.
        seeds: One model is trained per seed; 42 by default.
        epochs: Passes over the data; 3 by default.
        steps: Optimiser steps, instead of epochs.
        snapshot_steps: Stop after this many steps, in the middle of the full schedule.
        keep_every: Also keep a snapshot every `keep_every` steps.
        batch_size: Examples per step, over all devices together; 8 by default.
        micro_batch_size: Examples per forward pass, to save memory.
        learning_rate: Peak learning rate; 1e-4 by default.
        cutoff: Longest example, in tokens; 1024 by default.
        rank: Rank of the LoRA; 8 by default.
        alpha: Alpha of the LoRA, whose delta is scaled by alpha / rank; 16 by default.
        full: Whether all weights are trained instead of a LoRA.
        dora: Whether to train the magnitude of each row separately (DoRA).
        qlora: Whether to train on the base in 4 bits; needs bitsandbytes.
        ema: Write the moving average of the weights with this decay.
        safety: Safety benchmarks that the rows are compared with; advbench by default, none for no comparison.
        drop_overlap: Whether rows whose prompts are in a safety benchmark are dropped.
        device: `auto` or `cpu`.
        report_to: Also send losses to `tensorboard`, `wandb`, `mlflow` or `trackio`.
        replace: Whether a model that backmerge wrote at `out` is replaced.
        tokenizer: The tokenizer of a loaded base.
        settings: Any other setting by its dotted key, such as `lora.dropout`.
        allow_plugins: Whether code named as package.module:function may run.
    """

    out: str | Path
    task: str | None
    columns: Mapping[str, str]
    num_examples: int | None
    validation: float | None
    system: str | None
    seeds: Sequence[int]
    epochs: float | None
    steps: int | None
    snapshot_steps: int | None
    keep_every: int | None
    batch_size: int | None
    micro_batch_size: int | None
    learning_rate: float | None
    cutoff: int | None
    rank: int | None
    alpha: float | None
    full: bool
    dora: bool
    qlora: bool
    ema: float | None
    safety: Data | None
    drop_overlap: bool | None
    device: str | None
    report_to: Sequence[str]
    replace: bool
    tokenizer: Savable | None
    settings: Mapping[str, Any] | CommandLine
    allow_plugins: bool


class Merging(TypedDict, total=False):
    """The arguments of `merge`.

    Attributes:
        lam: λ, the share of the tuned side; by default the method's own default, or 0.5. Several give `OUT/lam-0.2` and
            so on.
        method: Linear by default; `backmerge methods` describes each.
        where: Another λ for some tensors: maps `attention`, `mlp`, `norms`, `embeddings` or a pattern of names to a λ,
            or to several, which rise over the layers. The first match counts.
        parameters: The method's other parameters.
        models: Other models that the method needs, by the method's names for them.
        guard: For `anchored`: the prompts on which the merge should act like the base.
        task_inputs: For `anchored`: a file of `backmerge inputs --task`.
        mergekit: A mergekit YAML file, which replaces models and method.
        seed: Seed of random methods and stochastic rounding.
        form: `auto`, the default: an adapter if that represents the merge exactly, else a checkpoint; or `adapter` or
            `checkpoint`.
        rank: Compress the adapter to this rank.
        dtype: Dtype of the result: `float32`, `bfloat16` or `float16`; by default the base's.
        rounding: `nearest` by default; `stochastic` is unbiased.
        extra_rows: Rows that tuning added to the vocabulary: `error` by default, or `tuned` to keep them.
        config_from: The model that the configuration comes from: `tuned` by default, or `base`.
        tokenizer_from: The same for tokenizer, chat templates and processors.
        allow_unrelated: Whether to merge models that do not look related.
        max_shard_bytes: Largest size of a file of a checkpoint; 5 GB by default.
        sha256: Whether to record the files' SHA-256.
        verify: Whether to compare an adapter's merge with transformers and peft before it is kept; true by default.
        replace: Whether a model that backmerge wrote at `out` is replaced.
        tokenizer: The tokenizer of a loaded base.
        allow_plugins: Whether code named as package.module:function may run.
    """

    lam: float | Sequence[float] | None
    method: str
    where: Mapping[str, float | Sequence[float]]
    parameters: Mapping[str, Any]
    models: Mapping[str, str | Path]
    guard: str | None
    task_inputs: Path | None
    mergekit: Path | None
    seed: int
    form: str
    rank: int | None
    dtype: str | None
    rounding: str
    extra_rows: str
    config_from: str
    tokenizer_from: str
    allow_unrelated: bool
    max_shard_bytes: int
    sha256: bool
    verify: bool
    replace: bool
    tokenizer: Savable | None
    allow_plugins: bool


# the setting of each plain argument
FINETUNED = {
    "columns": "data.columns",
    "num_examples": "data.num_examples",
    "validation": "data.validation",
    "system": "data.system",
    "drop_overlap": "data.drop_overlap",
    "rank": "lora.r",
    "alpha": "lora.alpha",
    **{
        name: name
        for name in (
            "epochs",
            "steps",
            "snapshot_steps",
            "keep_every",
            "batch_size",
            "micro_batch_size",
            "learning_rate",
            "cutoff",
            "ema",
            "device",
            "report_to",
        )
    },
}
MEASURED = {
    "limit": "evaluate.limit",
    "max_new_tokens": "evaluate.max_new_tokens",
    "engine": "evaluate.engine.name",
    "engine_options": "evaluate.engine.options",
    "device": "evaluate.engine.device",
    "dtype": "evaluate.engine.dtype",
    "batch_size": "evaluate.engine.batch_size",
    "thinking": "evaluate.engine.thinking",
    "cache": "evaluate.cache",
    "executor": "execution.executor",
    "num_workers": "execution.num_workers",
    "ray_address": "execution.ray_address",
}
RESTORED = {"margin": "choice.margin", "keep_margin": "choice.keep_margin", "rule": "choice.rule"}
CHECKED = {name: name for name in ("margin", "over_refusal_margin", "keep_margin")}
NAMED = {
    "model": "model",
    "base": "base",
    "tuned": "tuned",
    "against": "against",
    "against_run": "against_run",
    "lam": "lam",
    "method": "method",
    "merge.lam": "lam",
    "merge.method": "method",
    "merge.guard": "guard",
    "merge.task": "task_inputs",
    "guard": "guard",
    "evaluate.utility": "utility",
    "evaluate.safety": "safety",
    "evaluate.over_refusal": "over_refusal",
    "evaluate.keep": "keep",
    "evaluate.judge": "judge",
    "evaluate.second_judge": "second_judge",
}


def arguments_of(*tables: Mapping[str, str]) -> dict[KeyPath, str]:
    """Return the argument that gives each setting, from tables of arguments and their settings."""
    return {tuple(path.split(".")): name for table in tables for name, path in table.items()}


ARGUMENTS = arguments_of(MEASURED, RESTORED, CHECKED) | {tuple(path.split(".")): name for path, name in NAMED.items()}


class Call(NamedTuple, Generic[SettingsT]):
    """A call whose arguments are resolved.

    Attributes:
        settings: The settings of the call.
        out: The run directory.
        permissions: What may run.
        document: Where the settings come from, for messages.
    """

    settings: SettingsT
    out: Path
    permissions: Permissions
    document: Document


def document_of(
    name: str, values: Mapping[str, Any], settings: Mapping[str, Any] | CommandLine, options: Mapping[KeyPath, str]
) -> Document:
    """Return a call's settings as a document.

    Args:
        name: The function.
        values: The settings of its arguments.
        settings: Settings that override them.
        options: The argument that gives each setting, for messages.
    """
    if isinstance(settings, CommandLine):
        return with_overrides(settings.document.laid_under(values), settings.overrides)
    document = Document(f"the call of {name}", dict(values), {}, options=options, remedy=REMEDY.format(name=name))
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    return with_overrides(document, overrides, "settings")


def called(document: Document, key: str) -> str:
    """Return the caller's name for a setting: an argument, or a command's option."""
    return document.option(tuple(key.split("."))) or key


def nested(arguments: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of plain arguments; `None` gives no setting."""
    values: dict[str, Any] = {}
    for name, path in paths.items():
        if arguments.get(name) is not None:
            *groups, key = path.split(".")
            inner = values
            for group in groups:
                inner = inner.setdefault(group, {})
            inner[key] = arguments[name]
    return values


def resolved(kind: type[SettingsT], document: Document, out: Path, permissions: Permissions) -> Call[SettingsT]:
    """Return the call that a document describes.

    Raises:
        ConfigError: the settings are wrong.
    """
    return Call(validated(kind, document), out, permissions, document)


def spelled_out(*groups: type[Any]) -> Callable[[Function], Function]:
    """Return a decorator that shows these groups' arguments instead of `**options`, in signature and docstring."""

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        *own, _ = signature.parameters.values()
        whole = groups[0].__annotations__  # including inherited ones
        arguments = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation.__forward_arg__)
            for name, annotation in whole.items()
        ]
        function.__signature__ = signature.replace(parameters=[*own, *arguments])  # type: ignore[attr-defined]
        if function.__doc__ is not None:  # not under python -OO
            described = "".join(_attributes(group) for group in groups)
            function.__doc__ = _OPTIONS.sub(lambda _: described, function.__doc__)
        return function

    return decorate


_OPTIONS = re.compile(r"^ +\*\*options:.*\n", re.MULTILINE)


def _attributes(group: type[Any]) -> str:
    """Return the attributes in a group's docstring, indented like a function's arguments."""
    _, _, text = (group.__doc__ or "").partition("Attributes:\n")
    return f"{text.rstrip()}\n"
