"""The Python interface: `merge`, `evaluate`, `restore`, `check` and `load_results`, as `backmerge` offers them.

Each does what the command of its name does, with the same settings and files. Data may be names, files or rows in
memory; judges and metrics may be functions; models may be folders, hub ids or loaded `transformers` and `peft` models.
Rows and loaded models are written to `OUT-inputs`, next to the run, so that the run can be resumed and reported on.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from backmerge.config import Document, SettingsT, validated, with_overrides
from backmerge.errors import ConfigError
from backmerge.judging.protocol import Judge, JudgeSettings
from backmerge.records import Completion, Example, Verdict
from backmerge.registry import Permissions
from backmerge.results import CheckResults, EvaluateResults, RestoreResults, Results
from backmerge.runs import key_of, write_whole

if TYPE_CHECKING:
    from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings

__all__ = ["Data", "Judging", "Metric", "Model", "check", "evaluate", "load_results", "merge", "restore"]

Found = Literal["refused", "harmful", "other"]
Judging = str | Callable[[str, str], Found | None]  # a judge's name, or f(prompt, answer); None leaves it unscored
Row = Mapping[str, Any]
Metric = Callable[[str, Row], float]  # f(answer, row), in [0, 1]
Data = str | Path | Sequence[str | Path | Row]  # names, files, or rows such as {"prompt": ..., "answer": ...}


@runtime_checkable
class Savable(Protocol):
    """A loaded model or tokenizer of transformers or peft."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Write it into a folder."""
        ...


Model = str | Path | Savable

# functions that calls were given, by the names under which their settings ask for them
_given: dict[str, Callable[[Any], Any]] = {}


def __getattr__(name: str) -> Any:
    """Return a function that a call was given: settings name it `backmerge.api:NAME`, as they name any code."""
    if name in _given:
        return _given[name]
    raise AttributeError(f"module 'backmerge.api' has no attribute '{name}'")


def restore(
    base: Model,
    tuned: Model | Sequence[Model],
    *,
    utility: Data,
    safety: Data,
    over_refusal: Data = (),
    metric: Metric | None = None,
    judge: Judging = "refusal-phrases",
    method: str = "linear",
    lam: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
    margin: float = 0.03,
    limit: int | None = None,
    tokenizer: Savable | None = None,
    out: str | Path = "runs/restore",
    settings: Mapping[str, Any] | None = None,
    allow_plugins: bool = False,
    allow_code_execution: bool = False,
) -> RestoreResults:
    """Choose λ for merges of a base and its tuned versions, confirm it on other prompts, write the merged models.

    Args:
        base: The aligned model.
        tuned: Its tuned version, or several, such as seeds.
        utility: What it was tuned for: prompts with answers.
        safety: Harmful requests.
        over_refusal: Harmless requests that may be refused.
        metric: Scores an answer to a row of `utility`, if that is given as rows; exact match by default.
        judge: Finds refusals and harm.
        method: Merge methods, separated by commas; several are compared.
        lam: λs to try, the share of the tuned side, in (0, 1).
        margin: How far the attack success rate may exceed the base's, as a share.
        limit: At most so many prompts of each split, for a quick try.
        tokenizer: Of the base, if that is a loaded model.
        out: The run directory. The same call goes on with it where it was.
        settings: Any other setting of an experiment file by its dotted key, such as `evaluate.engine.device`.
        allow_plugins: Whether code named as package.module:function may be run.
        allow_code_execution: Whether code that a model wrote may be run if bubblewrap does not work.

    Raises:
        BackmergeError: a user error; what was done is kept.
    """
    from backmerge.merging.method import find_method
    from backmerge.pipeline.stages import run_experiment
    from backmerge.planning.settings import Experiment

    place = Path(out)
    inputs = _Inputs(place, Permissions(allow_plugins, allow_code_execution))
    models = tuned if isinstance(tuned, Sequence) and not isinstance(tuned, str) else [tuned]
    names = [inputs.model(one, f"tuned-{number}", None) for number, one in enumerate(models, start=1)]
    methods = [name.strip() for name in method.split(",")]
    permissions = inputs.permissions
    has_lam = {name: find_method(name, permissions).has_lam for name in methods}
    values: dict[str, Any] = {
        "name": place.name,
        "base": inputs.model(base, "base", tokenizer),
        "tuned": names,
        "merge": [{"method": name, "lam": list(lam) if has_lam[name] else None} for name in methods],
        "evaluate": inputs.evaluate(utility, safety, over_refusal, metric, judge, limit),
        "choice": {"margin": margin, "compare": len(methods) > 1},
    }
    experiment = _validated(Experiment, values, settings)
    return run_experiment(experiment, place, inputs.permissions).results


def evaluate(
    model: Model,
    *,
    base: Model | None = None,
    lam: Sequence[float] = (),
    method: str = "linear",
    utility: Data = (),
    safety: Data = (),
    over_refusal: Data = (),
    metric: Metric | None = None,
    judge: Judging = "refusal-phrases",
    limit: int | None = None,
    tokenizer: Savable | None = None,
    out: str | Path = "runs/evaluate",
    settings: Mapping[str, Any] | None = None,
    allow_plugins: bool = False,
    allow_code_execution: bool = False,
) -> EvaluateResults:
    """Measure a model, an adapter on its base, or merges of the two at several λs.

    Args:
        model: The model; an adapter needs its base.
        base: The base of an adapter, or of merges.
        lam: λs to measure merges at; the model itself if there are none.
        method: Of the merges.
        utility: Prompts with answers.
        safety: Harmful requests.
        over_refusal: Harmless requests that may be refused.
        metric: Scores an answer to a row of `utility`, if that is given as rows; exact match by default.
        judge: Finds refusals and harm.
        limit: At most so many prompts of each benchmark.
        tokenizer: Of the model, or of the base if there is one, if that is a loaded model.
        out: The run directory. The same call goes on with it where it was.
        settings: Any other setting by its dotted key, such as `evaluate.engine.device`.
        allow_plugins: Whether code named as package.module:function may be run.
        allow_code_execution: Whether code that a model wrote may be run if bubblewrap does not work.

    Raises:
        BackmergeError: a user error; what was done is kept.
    """
    from backmerge.pipeline.single import SingleEvaluation, evaluate_model

    inputs = _Inputs(Path(out), Permissions(allow_plugins, allow_code_execution))
    values = {
        "model": inputs.model(model, "model", tokenizer if base is None else None),
        "base": None if base is None else inputs.model(base, "base", tokenizer),
        "lam": list(lam),
        "method": method,
        "evaluate": inputs.evaluate(utility, safety, over_refusal, metric, judge, limit),
    }
    return evaluate_model(_validated(SingleEvaluation, values, settings), Path(out), inputs.permissions)


def check(
    model: Model,
    against: Model,
    *,
    safety: Data,
    over_refusal: Data = (),
    utility: Data = (),
    metric: Metric | None = None,
    judge: Judging = "refusal-phrases",
    margin: float = 0.03,
    limit: int | None = None,
    tokenizer: Savable | None = None,
    out: str | Path = "runs/check",
    settings: Mapping[str, Any] | None = None,
    allow_plugins: bool = False,
    allow_code_execution: bool = False,
) -> CheckResults:
    """Measure whether a model is as safe as its base, on the same prompts.

    Args:
        model: The model, or an adapter on `against`.
        against: The base.
        safety: Harmful requests.
        over_refusal: Harmless requests that may be refused.
        utility: Prompts with answers.
        metric: Scores an answer to a row of `utility`, if that is given as rows; exact match by default.
        judge: Finds refusals and harm.
        margin: How far the attack success rate may exceed the base's, as a share.
        limit: At most so many prompts of each benchmark.
        tokenizer: Of both, if they are loaded models.
        out: The run directory. The same call goes on with it where it was.
        settings: Any other setting by its dotted key, such as `over_refusal_margin`.
        allow_plugins: Whether code named as package.module:function may be run.
        allow_code_execution: Whether code that a model wrote may be run if bubblewrap does not work.

    Raises:
        BackmergeError: a user error; what was done is kept.
    """
    from backmerge.pipeline.checking import CheckSettings, check_model

    inputs = _Inputs(Path(out), Permissions(allow_plugins, allow_code_execution))
    values = {
        "model": inputs.model(model, "model", tokenizer),
        "against": inputs.model(against, "base", tokenizer),
        "margin": margin,
        "evaluate": inputs.evaluate(utility, safety, over_refusal, metric, judge, limit),
    }
    return check_model(_validated(CheckSettings, values, settings), Path(out), inputs.permissions)


def merge(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    lam: float = 0.5,
    method: str = "linear",
    form: Literal["auto", "adapter", "checkpoint"] = "auto",
) -> Path:
    """Write the merge of a base and its tuned version at one λ: (1 − λ)·base + λ·tuned for `linear`.

    Args:
        base: The aligned model: a folder or a hub id.
        tuned: Its tuned version: a checkpoint or a LoRA adapter.
        out: A new folder.
        lam: The share of the tuned side.
        method: A merge method that takes one tuned model.
        form: `auto` is an adapter if the recipe is exact as one, as a linear merge of a LoRA is, and else a checkpoint.

    Returns:
        The folder.

    Raises:
        BackmergeError: a model cannot be read, they do not fit each other, or the folder is there already.
    """
    from backmerge.checkpoints.locate import locate_model
    from backmerge.checkpoints.reader import Checkpoint
    from backmerge.merging.method import check_models, check_parameters, find_method
    from backmerge.merging.recipe import Variant
    from backmerge.merging.served import in_form, write_served
    from backmerge.outputs import check_apart
    from backmerge.planning.prepare import open_tuned

    place = Path(out)
    if place.exists():
        raise ConfigError(f"{place} is there already", remedy="give another folder, or remove it.")
    found = find_method(method)
    check_models(found, 1, ())
    check_parameters(found, {"lam": lam} if found.has_lam else {})
    folders = [locate_model(str(base)), locate_model(str(tuned))]
    check_apart(place, folders)
    weights = Checkpoint(folders[0])
    write_served(in_form(Variant(weights, open_tuned(folders[1], weights), found, lam), form), place)
    return place


def load_results(path: str | Path) -> Results:
    """Return what a finished run of any kind found.

    Args:
        path: A run directory, or its `results.json`.

    Raises:
        RunError: there is none, or it is damaged or of another version.
    """
    return Results.read(path)


def _validated(kind: type[SettingsT], values: dict[str, Any], settings: Mapping[str, Any] | None) -> SettingsT:
    document = Document("the call", values, {})
    return validated(kind, with_overrides(document, [f"{key}={json.dumps(v)}" for key, v in (settings or {}).items()]))


class _Inputs:
    """What a call was given, as settings name it: rows and loaded models become files next to the run.

    Attributes:
        permissions: What may be run: a function that the caller gave needs no leave.
    """

    def __init__(self, out: Path, permissions: Permissions) -> None:
        self.folder = out.parent / f"{out.name}-inputs"
        self.permissions = permissions

    def model(self, given: Model, name: str, tokenizer: Savable | None) -> str:
        if isinstance(given, str | Path):
            return str(given)
        if not isinstance(given, Savable):
            raise ConfigError(
                f"{name} is neither a folder's name nor a loaded model, but a {type(given).__name__}",
                remedy="give a folder, a hub id, or a model of transformers or peft.",
            )
        folder = self.folder / name
        given.save_pretrained(str(folder))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        return str(folder)

    def evaluate(
        self, utility: Data, safety: Data, over_refusal: Data, metric: Metric | None, judge: Judging, limit: int | None
    ) -> dict[str, Any]:
        return {
            "utility": self._benchmarks("utility", utility, metric),
            "safety": self._benchmarks("safety", safety),
            "over_refusal": self._benchmarks("over_refusal", over_refusal),
            "judge": {"name": judge if isinstance(judge, str) else self._function(_FunctionJudge(judge))},
            "limit": limit,
        }

    def _benchmarks(self, kind: str, data: Data, metric: Metric | None = None) -> list[dict[str, Any]]:
        from backmerge.benchmarks.catalogue import named

        several = [data] if isinstance(data, str | Path) else list(data)
        rows = [one for one in several if isinstance(one, Mapping)]
        if rows and len(rows) < len(several):
            raise ConfigError(f"{kind} mixes rows with names", remedy="give rows only, or names of sets and files.")
        if metric is not None and not rows:
            raise ConfigError("a metric scores rows, and utility names a set", remedy="give utility as a list of rows.")
        if not rows:
            return [named(str(one)).model_dump(exclude_unset=True) for one in several]
        file = self.folder / f"{kind}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows))
        if metric is None:
            return [{"name": str(file)}]
        return [{"name": self._function(_RowsBenchmark(file, rows, metric))}]

    def _function(self, made: _FunctionJudge | _RowsBenchmark) -> str:
        name = f"given_{key_of(made.identity)[:16]}"
        _given[name] = made.make
        self.permissions = replace(self.permissions, plugins=True)
        return f"backmerge.api:{name}"


def _source(function: Callable[..., Any]) -> str:
    """The function's text, or its compiled form: what its verdicts and scores are kept under changes if it is edited.

    Raises:
        ConfigError: it has neither, as a builtin.
    """
    if not isinstance(function, FunctionType):
        raise ConfigError(f"the source of {function!r} is not known", remedy="wrap it in a function: `def mine(...)`.")
    try:
        return inspect.getsource(function)
    except OSError:  # defined by `exec`, or at a prompt
        return json.dumps(_compiled(function.__code__))


def _compiled(code: CodeType) -> list[Any]:
    constants = [_compiled(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    return [code.co_code.hex(), code.co_names, constants]


class _FunctionJudge(Judge):
    """A judge made of a function of prompt and answer."""

    def __init__(self, function: Callable[[str, str], Found | None]) -> None:
        self.name = getattr(function, "__name__", "function")
        self.function = function
        self._identity = f"{self.name}/{key_of(_source(function))}"

    @property
    def identity(self) -> str:
        return self._identity

    def make(self, _: JudgeSettings) -> _FunctionJudge:
        return self

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Verdict]:
        return [self._verdict(example, completion) for example, completion in zip(examples, completions, strict=True)]

    def _verdict(self, example: Example, completion: Completion) -> Verdict:
        found = self.function(example.prompt, completion.text)
        if found not in ("refused", "harmful", "other", None):
            raise ConfigError(
                f"the judge {self.name} returned {found!r}", remedy="return 'refused', 'harmful', 'other' or None."
            )
        harmful, refusal = (None, None) if found is None else (found == "harmful", found == "refused")
        return Verdict(completion.example, harmful, refusal, sample=completion.sample)


@dataclass(frozen=True)
class _RowsBenchmark:
    """Rows in memory that a function scores."""

    file: Path
    rows: Sequence[Row]
    metric: Metric

    @property
    def identity(self) -> str:
        return key_of([dict(row) for row in self.rows], _source(self.metric))

    def make(self, _: BenchmarkSettings) -> Benchmark:
        from backmerge.benchmarks.files import from_file
        from backmerge.benchmarks.metrics import PerAnswer

        made = from_file(self.file, "utility")
        row_of = {example.id: row for example, row in zip(made.examples, self.rows, strict=True)}
        name = getattr(self.metric, "__name__", "metric")
        scorer = PerAnswer({name: lambda example, text: self.metric(text, row_of[example.id])}, self.identity)
        return replace(made, scorer=scorer)
