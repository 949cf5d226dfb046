"""Accept rows in memory, functions and loaded models, next to names and files.

Rows and loaded models are written to `OUT-inputs`, next to the run, so that the run can be resumed and reported on. A
function gets a name that settings use, like the name of any other code.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from backmerge.errors import ConfigError
from backmerge.judging.protocol import Judge, JudgeSettings
from backmerge.records import Completion, Example, Verdict
from backmerge.registry import Permissions
from backmerge.runs import key_of, write_whole

if TYPE_CHECKING:
    from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings

Found = Literal["refused", "harmful", "other"]
Judging = str | Callable[[str, str], Found | None]  # a judge's name, or f(prompt, answer); None leaves it unscored
Row = Mapping[str, Any]
Metric = Callable[[str, Row], float]  # f(answer, row), in [0, 1]
Data = str | Path | Sequence[str | Path | Row]  # names, files, or rows such as {"prompt": ..., "answer": ...}


@runtime_checkable
class Savable(Protocol):
    """A loaded model or tokenizer of transformers or peft."""

    def save_pretrained(self, save_directory: str, **options: Any) -> Any:
        """Write the object into a folder."""
        ...


Model = str | Path | Savable

# functions passed to calls, by the names that settings use for them
_given: dict[str, Callable[[Any], Any]] = {}


def __getattr__(name: str) -> Any:
    """Return a function that was passed to a call: settings name it `backmerge.api.given:NAME`."""
    if name in _given:
        return _given[name]
    raise AttributeError(f"module 'backmerge.api.given' has no attribute '{name}'")


class Inputs:
    """The inputs of a call, by the names that settings use: rows and loaded models become files next to the run.

    Attributes:
        out: The run directory.
        permissions: What may run: a function that the caller passed needs no permission.
    """

    def __init__(self, out: Path, permissions: Permissions) -> None:
        self.out = out
        self.folder = out.parent / f"{out.name}-inputs"
        self.permissions = permissions

    def model(self, given: Model, name: str, tokenizer: Savable | None = None) -> str:
        """Return the folder or hub id of a model; a loaded one is written.

        Raises:
            ConfigError: it is neither.
        """
        if isinstance(given, str | Path):
            return str(given)
        if not isinstance(given, Savable):
            raise ConfigError(
                f"{name} is neither the name of a folder nor a loaded model, but a {type(given).__name__}",
                remedy="give a folder, a hub id, or a model of transformers or peft.",
            )
        folder = self.folder / name
        given.save_pretrained(str(folder), **_without_adapters(given))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        return str(folder)

    def benchmarks(self, kind: str, data: Data, metric: Metric | None = None) -> list[dict[str, Any]]:
        """Return the settings of benchmarks to measure.

        Args:
            kind: Name for the file of rows.
            data: Names, files or rows.
            metric: Scores the answers to rows.

        Raises:
            ConfigError: rows are mixed with names, or a metric is given without rows.
        """
        from backmerge.benchmarks.catalogue import named

        several, rows = _told_apart(kind, data)
        if metric is not None and not rows:
            raise ConfigError("a metric scores rows, but utility names a set", remedy="give utility as a list of rows.")
        if not rows:
            return [named(str(one)).model_dump(exclude_unset=True) for one in several]
        file = self._written(kind, rows)
        if metric is None:
            return [{"name": str(file)}]
        return [{"name": self._function(_RowsBenchmark(file, rows, metric))}]

    def rows(self, kind: str, data: Data) -> str:
        """Return the name of the one file or data set of rows; rows in memory are written.

        Raises:
            ConfigError: there are several, or rows are mixed with names.
        """
        several, rows = _told_apart(kind, data)
        if not rows and len(several) != 1:
            raise ConfigError(f"{kind} names {len(several)} files", remedy="give one file, or rows.")
        return str(self._written(kind, rows)) if rows else str(several[0])

    def _written(self, kind: str, rows: Sequence[Row]) -> Path:
        file = self.folder / f"{kind}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows))
        return file

    def judge(self, given: Judging) -> dict[str, Any]:
        """Return the settings of a judge: a name or a function."""
        return {"name": given if isinstance(given, str) else self._function(_FunctionJudge(given))}

    def _function(self, made: _FunctionJudge | _RowsBenchmark) -> str:
        name = f"given_{key_of(made.identity)[:16]}"
        _given[name] = made.make
        self.permissions = replace(self.permissions, plugins=True)
        return f"backmerge.api.given:{name}"


def _without_adapters(given: Savable) -> dict[str, Any]:
    """Return options to save a base that a peft model has changed: with its own weights, under their own names.

    Empty for a peft model, which saves its adapter, and for a model without peft's layers.
    """
    if "peft" not in sys.modules:
        return {}
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper
    from torch.nn import Module

    if not isinstance(given, Module) or isinstance(given, PeftModel):
        return {}
    parts = {BaseTunerLayer: "base_layer.", AuxiliaryTrainingWrapper: "original_module."}
    state = dict(given.state_dict())
    wrapped = False
    for name, module in given.named_modules():
        for kind, own in parts.items():
            if isinstance(module, kind):
                wrapped = True
                for key in [key for key in state if key.startswith(f"{name}.")]:
                    value, rest = state.pop(key), key.removeprefix(f"{name}.")
                    if rest.startswith(own):
                        state[f"{name}.{rest.removeprefix(own)}"] = value
    return {"state_dict": state} if wrapped else {}


def _told_apart(kind: str, data: Data) -> tuple[list[str | Path | Row], list[Row]]:
    several: list[str | Path | Row] = [data] if isinstance(data, str | Path) else list(data)
    rows = [one for one in several if isinstance(one, Mapping)]
    if rows and len(rows) < len(several):
        raise ConfigError(f"{kind} mixes rows with names", remedy="give rows only, or names of sets and files.")
    return several, rows


def _source(function: Callable[..., Any]) -> str:
    """Return the function's source, or its compiled form: stored verdicts and scores depend on it.

    Raises:
        ConfigError: it has neither, as for a builtin.
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
    """A judge made from a function of prompt and answer."""

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
