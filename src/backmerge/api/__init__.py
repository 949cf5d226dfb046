"""The Python interface: `finetune`, `merge`, `restore`, `evaluate`, `check`, `diff` and `load_results`.

Each is also the function behind the command of the same name. Data may be names, files or rows in memory; judges and
metrics may be functions; models may be folders, hub ids or loaded `transformers` and `peft` models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from backmerge.api.calls import (
    ARGUMENTS,
    CHECKED,
    FINETUNED,
    MEASURED,
    RESTORED,
    Call,
    Checking,
    Evaluating,
    Finetuning,
    Measuring,
    Merging,
    Restoring,
    arguments_of,
    called,
    document_of,
    nested,
    resolved,
    spelled_out,
)
from backmerge.api.given import Data, Inputs, Judging, Metric, Model
from backmerge.config import Document
from backmerge.errors import BackmergeError, ConfigError, RunError
from backmerge.registry import Permissions

if TYPE_CHECKING:
    from backmerge.benchmarks.protocol import Benchmark
    from backmerge.merging.method import Method
    from backmerge.pipeline.checking import CheckSettings
    from backmerge.pipeline.single import SingleEvaluation
    from backmerge.planning.settings import Experiment
    from backmerge.reporting.diff import Diff
    from backmerge.results import CheckResults, EvaluateResults, RestoreResults, Results

__all__ = [
    "Data",
    "Judging",
    "Metric",
    "Model",
    "check",
    "diff",
    "evaluate",
    "finetune",
    "load_results",
    "merge",
    "restore",
]

LAMS = (0.2, 0.4, 0.6, 0.8)  # the paper's
LAMS_WITH_TASK = (0.03, 0.1, 0.25, 0.5)  # with task inputs, small λs already keep the task
NO_GUARD = "none"
DEFAULT_JUDGE = "refusal-phrases"


@spelled_out(Restoring, Measuring)
def restore(base: Model, tuned: Model | Sequence[Model], **options: Unpack[Restoring]) -> RestoreResults:
    """Choose λ for merges of a base and its tuned versions, confirm it on other prompts, write the merged models.

    Args:
        base: The aligned model.
        tuned: Its tuned version, or several, such as seeds.
        **options: See `Restoring`.

    Raises:
        BackmergeError: a user error; finished work is kept.
    """
    from backmerge.pipeline.stages import run_experiment

    call = restoring(base, tuned, **options)
    return run_experiment(call.settings, call.out, call.permissions, document=call.document).results


def restoring(base: Model, tuned: Model | Sequence[Model], **options: Unpack[Restoring]) -> Call[Experiment]:
    """Return the experiment that `restore` runs for these arguments.

    Raises:
        ConfigError: an argument is wrong.
    """
    from backmerge.benchmarks.guards import OWN
    from backmerge.checkpoints.locate import short_name
    from backmerge.merging.method import find_method
    from backmerge.planning.settings import Experiment

    inputs = _inputs("runs/restore", options)
    several = tuned if isinstance(tuned, Sequence) and not isinstance(tuned, str) else [tuned]
    names = [inputs.model(one, f"tuned-{number}") for number, one in enumerate(several, start=1)]
    guard, asked, lam = options.get("guard"), options.get("method"), options.get("lam")
    task = options.get("task_inputs")
    asked = asked or ("linear" if guard == NO_GUARD else "linear,anchored")
    methods = [name.strip() for name in (asked.split(",") if isinstance(asked, str) else asked)]
    found = {name: find_method(name, inputs.permissions) for name in methods}
    by_direction = [name for name, method in found.items() if method.inputs]
    if guard == NO_GUARD and by_direction:
        raise ConfigError(
            f"{', '.join(by_direction)} merges by direction and needs a guard, but the guard is 'none'",
            remedy=f"give a guard, such as {OWN}, or only methods that need none, such as linear.",
        )
    for name, given in (("a guard is", guard not in (None, NO_GUARD)), ("task inputs are", task is not None)):
        if given and not by_direction:
            raise ConfigError(
                f"{name} for merges by direction, but {', '.join(methods)} does not merge that way",
                remedy="use the methods linear,anchored.",
            )
    _check_lam_has_use(found, lam)
    inputs_of_layers = {"guard": {"source": guard or OWN}} | ({} if task is None else {"task": {"source": str(task)}})
    values = nested(options, MEASURED | RESTORED)
    values |= {
        "name": short_name(names[0]) if names else "restore",
        "base": inputs.model(base, "base", options.get("tokenizer")),
        "tuned": names,
        "merge": [
            {"method": name, "lam": list(lam or (LAMS_WITH_TASK if task and method.inputs else LAMS))}
            | ({} if method.has_lam else {"lam": None})
            | ({**inputs_of_layers, "label": name} if method.inputs else {})
            for name, method in found.items()
        ],
    }
    values["evaluate"] = _evaluate_values(values, inputs, options, has_second=True)
    values["evaluate"]["keep"] = inputs.benchmarks("keep", options.get("keep") or ())
    values["choice"] = {**values.get("choice", {}), "compare": len(methods) > 1}
    document = document_of("restore", values, options.get("settings") or {}, ARGUMENTS)
    _check_margin_has_use(document, options.get("margin"), "choice.margin", "choice.keep_margin")
    return resolved(Experiment, document, inputs.out, inputs.permissions)


@spelled_out(Evaluating, Measuring)
def evaluate(model: Model, **options: Unpack[Evaluating]) -> EvaluateResults:
    """Measure a model, an adapter on its base, or merges of the two at several λs.

    Args:
        model: The model; an adapter needs its base.
        **options: See `Evaluating`.

    Raises:
        BackmergeError: a user error; finished work is kept.
    """
    from backmerge.pipeline.single import evaluate_model

    call = evaluating(model, **options)
    return evaluate_model(call.settings, call.out, call.permissions, document=call.document)


def evaluating(model: Model, **options: Unpack[Evaluating]) -> Call[SingleEvaluation]:
    """Return the evaluation that `evaluate` runs for these arguments.

    Raises:
        ConfigError: an argument is wrong.
    """
    from backmerge.pipeline.single import SingleEvaluation

    inputs = _inputs("runs/evaluate", options)
    base, tokenizer, guard = options.get("base"), options.get("tokenizer"), options.get("guard")
    values = nested(options, MEASURED | {"method": "method"})
    values |= {
        "model": inputs.model(model, "model", tokenizer if base is None else None),
        "base": None if base is None else inputs.model(base, "base", tokenizer),
        "lam": list(options.get("lam") or ()),
        "guard": None if guard is None else {"source": guard},
    }
    values["evaluate"] = _evaluate_values(values, inputs, options, has_second=False)
    document = document_of("evaluate", values, options.get("settings") or {}, ARGUMENTS)
    call = resolved(SingleEvaluation, document, inputs.out, inputs.permissions)
    measured = call.settings.evaluate
    if not (measured.utility or measured.safety or measured.over_refusal):
        names = [called(document, f"evaluate.{kind}") for kind in ("utility", "safety", "over_refusal")]
        raise ConfigError("nothing to measure", remedy=f"give {names[0]}, {names[1]} or {names[2]}.")
    return call


@spelled_out(Checking, Measuring)
def check(model: Model, against: Model | None = None, **options: Unpack[Checking]) -> CheckResults:
    """Measure whether a model is as safe as its base and has kept its abilities, on the same prompts.

    Args:
        model: The model, or an adapter on `against`.
        against: The base.
        **options: See `Checking`.

    Raises:
        BackmergeError: a user error; finished work is kept.
    """
    from backmerge.pipeline.checking import check_model

    call = checking(model, against, **options)
    return check_model(call.settings, call.out, call.permissions, document=call.document)


def checking(model: Model, against: Model | None = None, **options: Unpack[Checking]) -> Call[CheckSettings]:
    """Return the check that `check` runs for these arguments.

    Raises:
        ConfigError: an argument is wrong.
    """
    from backmerge.pipeline.checking import CheckSettings

    inputs = _inputs("runs/check", options)
    tokenizer, earlier = options.get("tokenizer"), options.get("against_run")
    values = nested(options, MEASURED | CHECKED)
    values |= {
        "model": inputs.model(model, "model", tokenizer),
        "against": None if against is None else inputs.model(against, "base", tokenizer),
        "against_run": None if earlier is None else str(earlier),
    }
    values["evaluate"] = _evaluate_values(values, inputs, options, has_second=True)
    values["evaluate"]["keep"] = inputs.benchmarks("keep", options.get("keep") or ())
    settings = options.get("settings") or {}
    if earlier is not None:
        own = document_of("check", values, settings, ARGUMENTS)
        values["evaluate"] = _as_earlier(Path(earlier), own, has_judge=options.get("judge") is not None)
    document = document_of("check", values, settings, ARGUMENTS)
    if against is None and earlier is None:
        name = called(document, "against")
        raise ConfigError("there is no base to compare the model with", remedy=f"give {name}, or {name}-run.")
    if not (document.values["evaluate"].get("safety") or document.values["evaluate"].get("keep")):
        safety, keep = (called(document, f"evaluate.{kind}") for kind in ("safety", "keep"))
        raise ConfigError(
            "there is nothing to check",
            remedy=f"give {safety}, such as advbench, or {keep} to check abilities that the model should have kept.",
        )
    _check_margin_has_use(document, options.get("margin"), "margin", "keep_margin")
    return resolved(CheckSettings, document, inputs.out, inputs.permissions)


@spelled_out(Finetuning)
def finetune(base: Model, data: Data | None = None, **options: Unpack[Finetuning]) -> list[Path]:
    """Fine-tune a chat model, with the paper's settings by default.

    Args:
        base: The aligned model.
        data: Rows with messages, with prompt and completion, or with instruction, input and output; or a file or hub id
            with such rows.
        **options: See `Finetuning`.

    Returns:
        The folder of each seed's model: a peft adapter, or a checkpoint if all weights were trained.

    Raises:
        BackmergeError: a user error; finished work is kept.
    """
    from backmerge.checkpoints.locate import locate_model
    from backmerge.checkpoints.reader import Checkpoint
    from backmerge.config import validated
    from backmerge.finetuning.overlap import load_for, with_notes
    from backmerge.finetuning.settings import FinetuneSettings
    from backmerge.finetuning.trainer import is_of_key, training_key
    from backmerge.outputs import check_apart, is_to_write, paths_read
    from backmerge.pipeline.tuning import tune_seeds

    inputs = Inputs(Path(options.get("out") or "tuned"), Permissions(options.get("allow_plugins") or False))
    task, replace = options.get("task"), options.get("replace") or False
    if task is None and data is None:
        raise ConfigError("no data to tune on", remedy="give data, such as a file, or one of the paper's tasks.")
    lora = {"dora": options.get("dora"), "quantize": "nf4" if options.get("qlora") else None}
    if options.get("full") and (any(lora.values()) or options.get("rank") or options.get("alpha")):
        raise ConfigError("full training has no adapter", remedy="remove rank, alpha, dora and qlora.")
    rows = None if data is None else inputs.rows("data", data)
    values = nested(options, FINETUNED)
    values |= {
        "dataset": task or rows,
        "data": values.get("data", {}) | ({"file": rows} if task else {}),
        "seeds": list(options.get("seeds") or (42,)),
        "mode": "full" if options.get("full") else "lora",
        "lora": values.get("lora", {}) | {name: value for name, value in lora.items() if value},
    }
    document = document_of("finetune", values, options.get("settings") or {}, _TUNING_ARGUMENTS)
    settings = validated(FinetuneSettings, document)
    name = inputs.model(base, "base", options.get("tokenizer"))
    weights = Checkpoint(locate_model(name))
    places = {seed: inputs.out if len(settings.seeds) == 1 else inputs.out / f"seed-{seed}" for seed in settings.seeds}
    safety = options.get("safety")
    asked = None if safety is None else [one for one in inputs.benchmarks("safety", safety) if one["name"] != "none"]
    for place in places.values():
        check_apart(place, [weights.directory, *paths_read(settings), *(Path(one["name"]) for one in asked or ())])
    training = {seed: load_for(weights, settings, seed, inputs.permissions) for seed in settings.seeds}
    compared = _compared_with(asked, inputs.permissions)
    training = with_notes(training, compared, is_dropped=settings.data.drop_overlap)
    for seed, place in places.items():
        key = training_key(weights, training[seed], settings, seed)
        is_to_write(place, lambda place=place, key=key: is_of_key(place, key), force=replace)  # type: ignore[misc]
    tune_seeds(weights, name, settings, training, places, replace=replace)
    return list(places.values())


@spelled_out(Merging)
def merge(base: Model, tuned: Model | Sequence[Model], out: str | Path, **options: Unpack[Merging]) -> Path:
    """Write the merge of a base and its tuned version: (1 - λ)·base + λ·tuned for `linear`.

    Args:
        base: The aligned model.
        tuned: Its tuned version: a checkpoint or a LoRA adapter. Several are merged one by one, each into `OUT/NAME`,
            or all together by methods that take several.
        out: A new folder.
        **options: See `Merging`.

    Returns:
        `out`; with several λs or tuned models, it has a folder for each.

    Raises:
        BackmergeError: a model cannot be read, the models do not fit together, or something else is at `out`.
    """
    merges(base, tuned, out, **options)
    return Path(out)


def merges(
    base: Model | None, tuned: Model | Sequence[Model], out: str | Path, **options: Unpack[Merging]
) -> list[Path]:
    """Write merges as `merge` does, and return the folder of each."""
    from backmerge.checkpoints.files import MERGED_DTYPES
    from backmerge.merging.method import find_method
    from backmerge.outputs import check_reachable
    from backmerge.pipeline.merges import (
        SHARD_BYTES,
        Writing,
        from_mergekit,
        lams_of,
        outputs_of,
        recipes_of,
        with_inputs,
        write_outputs,
    )

    inputs = Inputs(Path(out), Permissions(options.get("allow_plugins") or False))
    check_reachable(inputs.out)  # before a guard's statistics are collected
    dtype, lam, config = options.get("dtype"), options.get("lam"), options.get("mergekit")
    if dtype is not None and dtype not in MERGED_DTYPES:
        raise ConfigError(f"dtype {dtype}: unknown", remedy=f"it is one of: {', '.join(MERGED_DTYPES)}.")
    fixed: dict[str, Any] = {name: options[name] for name in ("config_from", "tokenizer_from") if options.get(name)}
    fixed |= {
        "rounding": options.get("rounding") or "nearest",
        "dtype": None if dtype is None else MERGED_DTYPES[dtype],
        "seed": options.get("seed") or 0,
    }
    given = (options.get("guard"), options.get("task_inputs"), inputs.permissions)
    if config is not None:
        recipe = with_inputs({"": from_mergekit(config, fixed)}, *given)
        groups = [{inputs.out: recipe[""]}]
    else:
        assert base is not None
        method = find_method(options.get("method") or "linear", inputs.permissions)
        several = tuned if isinstance(tuned, Sequence) and not isinstance(tuned, str) else [tuned]
        recipes = recipes_of(
            inputs.model(base, "base", options.get("tokenizer")),
            [inputs.model(one, f"tuned-{number}") for number, one in enumerate(several, start=1)],
            method,
            {name: str(place) for name, place in (options.get("models") or {}).items()},
            options.get("extra_rows") or "error",
        )
        lams = lams_of(method, [lam] if isinstance(lam, int | float) else lam)
        fixed["parameters"] = dict(options.get("parameters") or {})
        groups = outputs_of(with_inputs(recipes, *given), inputs.out, lams, options.get("where") or {}, fixed)
    writing = Writing(
        form=options.get("form") or "auto",
        rank=options.get("rank"),
        max_shard_bytes=options.get("max_shard_bytes") or SHARD_BYTES,
        sha256=options.get("sha256") or False,
        allow_unrelated=options.get("allow_unrelated") or False,
        verify=options.get("verify", True),
        replace=options.get("replace") or False,
    )
    return write_outputs(groups, writing, () if config is None else (config,))


def diff(
    base: Model,
    tuned: Model,
    *,
    out: str | Path | None = None,
    lam: Sequence[float] = LAMS,
    dtype: Literal["float32", "bfloat16", "float16"] | str | None = None,
    sample: float = 1.0,
) -> Diff:
    """Compare a tuned model with its base: whether it was tuned from it, what changed and where, what a merge keeps.

    Args:
        base: The aligned model.
        tuned: Its tuned version: a checkpoint or a LoRA adapter.
        out: A folder for diff.json, diff.png and diff.html; loaded models are written to `OUT-inputs`.
        lam: λs at which the cost of rounding is measured, in (0, 1].
        dtype: Dtype of the merged model: `float32`, `bfloat16` or `float16`; by default the base's.
        sample: Share of the elements to read; 0.01 takes seconds, and gives no rank.

    Raises:
        BackmergeError: a model cannot be read.
    """
    from backmerge.checkpoints.adapter import open_weights
    from backmerge.checkpoints.compare import GrownBase
    from backmerge.checkpoints.files import MERGED_DTYPES
    from backmerge.checkpoints.locate import locate_model
    from backmerge.checkpoints.reader import Checkpoint
    from backmerge.merging.survey import measurable, survey
    from backmerge.outputs import check_apart
    from backmerge.pipeline.merges import places_of
    from backmerge.progress import bar
    from backmerge.reporting.diff import diff_of

    if not all(0 < value <= 1 for value in lam):
        raise ConfigError(f"lam {list(lam)}: λ must be in (0, 1] here", remedy="for example 0.2 and 0.8.")
    if not 0 < sample <= 1:
        raise ConfigError(f"sample {sample}: expected a share in (0, 1]", remedy="for example 0.01, or 1 for all.")
    if dtype is not None and dtype not in MERGED_DTYPES:
        raise ConfigError(f"dtype {dtype}: unknown", remedy=f"it is one of: {', '.join(MERGED_DTYPES)}.")
    inputs = Inputs(Path(out or "diff"), Permissions())
    names = inputs.model(base, "base"), inputs.model(tuned, "tuned")
    ours = Checkpoint(locate_model(names[0]))
    theirs = open_weights(locate_model(names[1]), ours)
    if out is not None:
        check_apart(inputs.out, [*places_of(ours), *places_of(theirs)])
    rounded_to = None if dtype is None else MERGED_DTYPES[dtype]
    seen = GrownBase(ours, theirs) if isinstance(theirs, Checkpoint) else ours
    total = sum(seen.infos[name].num_elements for name in measurable(seen, theirs))
    with bar("Comparing", total) as advance:
        changes = survey(seen, theirs, lams=list(lam), dtype=rounded_to, sample=sample, advance=advance)
    found = diff_of(names, ours, theirs, changes, lams=lam, dtype=rounded_to, sample=sample)
    if out is not None:
        found.write(inputs.out)
    return found


def load_results(path: str | Path) -> Results:
    """Return the results of a finished run of any kind.

    Args:
        path: A run directory, or its `results.json`.

    Raises:
        RunError: there are no results, or they are damaged or of another version.
    """
    from backmerge.results import Results

    return Results.read(path)


_TUNING_ARGUMENTS = arguments_of(FINETUNED, {"seeds": "seeds", "data": "dataset"})
SAFETY = ("advbench",)  # tuning rows are compared with these by default


def _compared_with(asked: Sequence[Mapping[str, Any]] | None, permissions: Permissions) -> list[Benchmark]:
    """Return the safety benchmarks to compare rows with; default ones that are unavailable are skipped."""
    from backmerge.benchmarks.catalogue import find_benchmark
    from backmerge.benchmarks.protocol import BenchmarkSettings
    from backmerge.progress import say

    if asked is not None:
        return [find_benchmark(BenchmarkSettings(**one), "safety", permissions) for one in asked]
    found = []
    for name in SAFETY:
        try:
            found.append(find_benchmark(name, "safety"))
        except BackmergeError as error:
            say(f"The rows are not compared with {name}: {error.message}. --safety FILE compares them with your copy.")
    return found


def _inputs(default: str, options: Measuring) -> Inputs:
    permissions = Permissions(options.get("allow_plugins") or False, options.get("allow_code_execution") or False)
    return Inputs(Path(options.get("out") or default), permissions)


def _evaluate_values(
    values: Mapping[str, Any], inputs: Inputs, options: Measuring, *, has_second: bool
) -> dict[str, Any]:
    """Return the settings under `evaluate`.

    Args:
        values: Settings of the plain arguments.
        inputs: Writes rows, functions and loaded models.
        options: The arguments.
        has_second: Whether a published judge gets a second one by default.
    """
    from backmerge.judging.model_judge import default_second
    from backmerge.progress import say

    judge, second = options.get("judge") or DEFAULT_JUDGE, options.get("second_judge")
    if second is None and has_second and isinstance(judge, str):
        second = default_second(judge)
        if second is not None:
            say(f"Second judge: {second}, since its weights are here; 'none' as the second judge uses only {judge}.")
    elif second == "none":
        second = None
    return {
        **values.get("evaluate", {}),
        "utility": inputs.benchmarks("utility", options.get("utility") or (), options.get("metric")),
        "safety": inputs.benchmarks("safety", options.get("safety") or ()),
        "over_refusal": inputs.benchmarks("over_refusal", options.get("over_refusal") or ()),
        "judge": inputs.judge(judge),
        "second_judge": None if second is None else inputs.judge(second),
    }


def _check_lam_has_use(methods: Mapping[str, Method], lam: Sequence[float] | None) -> None:
    """Print which methods given λs do not apply to.

    Raises:
        ConfigError: they apply to none.
    """
    from backmerge.progress import say

    without = [name for name, method in methods.items() if not method.has_lam]
    if not lam or not without:
        return
    if len(without) == len(methods):
        raise ConfigError(f"{', '.join(without)} has no λ: it computes its own ratio", remedy="remove λ.")
    say(f"Note: λ does not apply to {', '.join(without)}: it computes its own ratio and is measured once.")


def _check_margin_has_use(document: Document, margin: float | None, key: str, keep_key: str) -> None:
    """Check that a margin for the attack success rate comes with harmful requests.

    Raises:
        ConfigError: there are no harmful requests.
    """
    evaluate = document.values["evaluate"]
    if margin is not None and evaluate.get("keep") and not evaluate.get("safety"):
        raise ConfigError(
            f"{called(document, key)} is for the attack success rate, but there are no harmful requests",
            remedy=f"give {called(document, 'evaluate.safety')}, or {called(document, keep_key)} for lost abilities.",
        )


def _as_earlier(run: Path, document: Document, *, has_judge: bool) -> dict[str, Any]:
    """Return the benchmarks of an earlier run with its settings, so that both answer the same questions.

    Raises:
        ConfigError: the call gives benchmarks too.
        RunError: the run has none.
    """
    from backmerge.planning.settings import settings_left

    asked = document.values["evaluate"]
    for key in ("safety", "over_refusal", "utility", "keep", "max_new_tokens"):
        if asked.get(key):
            name = called(document, f"evaluate.{key}")
            raise ConfigError(
                f"{run} defines the prompts, so {name} cannot be given",
                remedy=f"remove {name}, or give {called(document, 'against')}.",
            )
    earlier = settings_left(run).get("evaluate")
    if not isinstance(earlier, dict):
        raise RunError(
            f"{run} is not a run that measured a model", remedy="give one of `backmerge check`, evaluate or restore."
        )
    taken = {
        key: asked[key]
        for key in ("engine", "limit", "cache", "second_judge", *(["judge"] * has_judge))
        if key in asked
    }
    # here both splits are measured as one
    return {**earlier, "split": "halves", **taken}
