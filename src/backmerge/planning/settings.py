"""The experiment file: what is tuned, merged, measured and chosen; made from the settings of lower layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, Field, model_validator

from backmerge.benchmarks.catalogue import named
from backmerge.benchmarks.guards import GuardChoice, TaskChoice
from backmerge.benchmarks.protocol import BenchmarkSettings, Kind
from backmerge.checkpoints.companions import Side
from backmerge.checkpoints.locate import folder_named
from backmerge.config import NOT_YAML, Settings
from backmerge.errors import RunError
from backmerge.execution import ExecutionSettings
from backmerge.finetuning.settings import FinetuneSettings
from backmerge.generation.protocol import Drawing, EngineSettings
from backmerge.judging.protocol import JudgeSettings
from backmerge.registry import BENCHMARKS, DATASETS, JUDGES, MODELS
from backmerge.selection import ChoiceSettings, LayersSettings, SearchSettings

Lam = Annotated[float, Field(gt=0, lt=1)]
Schedule = list[Annotated[float, Field(ge=0, le=1)]] | dict[str, Any]  # in the form of merging.schedule
# where settings name files and folders: always, or if the text is no name of a table
PATH_KEYS = frozenset({"base", "model", "against", "against_run", "data", "file", "answers"})
NAMED_KEYS = frozenset({"source", "guard", "task", "dataset", "benchmark", "judge", "second_judge"})
MEASURED = frozenset({"utility", "safety", "over_refusal", "keep", "judge", "second_judge"})  # with a `name`
TABLE_NAMES = frozenset({*BENCHMARKS.entries, *JUDGES.entries, *DATASETS.entries, "own", "none"})
DEFAULT_LAMS = (0.2, 0.4, 0.6, 0.8)  # the paper's


class SweepSettings(Settings):
    """One merge method, over a grid of λ if it has one.

    Attributes:
        method: A name in the table of methods.
        label: Its name in tables, plots and the report; by default the method with its parameters.
        lam: λs strictly between 0 (the base) and 1 (the tuned model), which are always measured; the paper's four if
            neither these nor `schedules` are given. Not for methods without λ, such as `model_stock`.
        schedules: λs that differ from tensor to tensor: a list rises or falls over the layers, a table goes by module
            (`{attention: 0.3, rest: 0.6}`). Each is its own recipe.
        parameters: The method's other parameters.
        seed: For methods that draw random numbers.
        tuned: `each`: one merge for each tuned model. `all`: all of them in one merge, as for `model_stock` or a soup
            of seeds (`task_arithmetic` with `normalize: true`). By default as the method requires.
        models: Other models that the method needs, by the names that it gives them, such as `unaligned`.
        guard: The prompts on which a merge by direction (`anchored`) should act like the base: a benchmark's name, a
            file, `own` for prompts that the base writes, or settings with more. They are never measured on.
        task: Rows of the task, a file of prompts with answers that is not measured on: the merge keeps the directions
            that the tuned model uses on them (RegMean). Each tuned model has its own statistics.
    """

    method: str = "linear"
    label: Annotated[str, Field(pattern=r"^[^@/\n]{1,60}$")] | None = None
    lam: tuple[Lam, ...] | None = None
    schedules: tuple[Schedule, ...] = ()
    parameters: Mapping[str, Any] = Field(default_factory=dict)
    seed: int = 0
    tuned: Literal["each", "all"] | None = None
    models: Mapping[str, str] = Field(default_factory=dict)
    guard: GuardChoice | None = None
    task: TaskChoice | None = None

    @model_validator(mode="after")
    def _has_a_lam(self) -> Self:
        if self.lam == () and not self.schedules:
            raise ValueError("'lam' is empty: remove it to use the paper's four, or give at least one")
        return self


class PathSettings(Settings):
    """The path of the tuning itself, as an alternative to merging: needs `finetune.keep_every`.

    Attributes:
        snapshots: Whether snapshots of the tuning are measured.
        ema: Also measure their moving averages, with this decay from one snapshot to the next.
    """

    snapshots: bool = True
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None


JudgeChoice = Annotated[JudgeSettings, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)]
BenchmarkChoice = Annotated[BenchmarkSettings, BeforeValidator(lambda v: named(v) if isinstance(v, str) else v)]


class EvaluateSettings(Settings):
    """What is measured, and how.

    Attributes:
        utility: Benchmarks (names, or .jsonl and .csv files; or settings with more) of what was tuned for.
        safety: Benchmarks of harmful requests. They may be left out if there are any under `keep`.
        over_refusal: Benchmarks of harmless requests that may be refused.
        keep: Benchmarks of what tuning should not reduce, such as general knowledge or another language: the merged
            model may lose `choice.keep_margin` on each.
        judge: Finds refusals and harm: a name from the table of judges, or settings with its model and engine.
        second_judge: Another judge, whose verdicts are shown next to the first one's. If the two put the merged model
            on different sides of the margin, the verdict is `not shown`.
        split: `halves`: λ is chosen on one half of the prompts, and confirmed on the other. `whole`: if λ is chosen on
            the tuning data's held-out rows, by rule `paper`, all prompts are measured at every λ, and again on the
            weights as written.
        limit: Largest number of prompts of each split, for a quick try.
        engine: The engine that runs the models.
        sampling: How answers are drawn, unless a benchmark defines its own sampling.
        max_new_tokens: A generation limit for all benchmarks, if it is lower than their own.
        max_unscored: The run fails if more than this share of a benchmark's answers could not be scored.
        cache: Whether answers of earlier runs are reused, and new ones stored for later runs.
    """

    utility: tuple[BenchmarkChoice, ...] = ()
    safety: tuple[BenchmarkChoice, ...] = ()
    over_refusal: tuple[BenchmarkChoice, ...] = ()
    keep: tuple[BenchmarkChoice, ...] = ()
    judge: JudgeChoice = JudgeSettings()
    second_judge: JudgeChoice | None = None
    split: Literal["halves", "whole"] = "halves"
    limit: Annotated[int, Field(gt=0)] | None = None
    engine: EngineSettings = EngineSettings()
    sampling: Drawing = Drawing()
    max_new_tokens: Annotated[int, Field(gt=0)] | None = None
    max_unscored: Annotated[float, Field(ge=0, le=1)] = 0.02
    cache: bool = True

    @property
    def benchmarks(self) -> Iterator[tuple[Kind, int, BenchmarkSettings]]:
        """Yield each requested benchmark, with its kind and its place in the list of that kind."""
        lists: dict[Kind, tuple[BenchmarkSettings, ...]] = {
            "utility": self.utility,
            "safety": self.safety,
            "over_refusal": self.over_refusal,
            "keep": self.keep,
        }
        for kind, asked in lists.items():
            for place, benchmark in enumerate(asked):
                yield kind, place, benchmark


class ReportSettings(Settings):
    """The settings of the report.

    Attributes:
        text: Answers in full, folded behind a click, or not at all.
        num_samples: Prompts whose answers are shown side by side.
    """

    text: Literal["full", "folded", "none"] = "folded"
    num_samples: Annotated[int, Field(ge=0)] = 10


class Experiment(Settings):
    """A whole experiment; `backmerge run FILE` runs it.

    Attributes:
        name: Its name in the report.
        base: The aligned model: a folder, a hub id, or `demo`.
        tuned: Tuned versions of it that exist already, as folders or hub ids: checkpoints, or LoRA adapters. Several
            count as repetitions, such as seeds: one λ is chosen for all, on their mean.
        finetune: Or: settings to make them.
        merge: Methods and λs.
        path: Snapshots of the tuning, in addition.
        layers: A search for a λ for each layer, starting from the best single λ.
        merged_as: The form in which merged models are measured and written: `adapter`, `checkpoint`, or `auto`, which
            is an adapter if that represents the recipe exactly (LoRAs, merged linearly), and otherwise a checkpoint.
        merged_dtype: Dtype of the merged models' tensors: for a checkpoint by default the base's, for an adapter
            float32. Required if base and tuned models have different dtypes.
        merged_rounding: How values are rounded to that dtype: to the nearest value, or `stochastic`, which is unbiased.
        merged_verified: Whether the merge of adapters is compared with transformers and peft before it is confirmed.
        config_from: The side that the merged models' config.json and generation_config.json come from, if it has them.
        tokenizer_from: The side that their tokenizer, chat templates and processors come from, if it has them.
        evaluate: Benchmarks, judge and engine.
        search: Which λs of the grid are measured.
        choice: The rule for λ.
        report: The settings of the report.
        execution: Where answers are generated; no result depends on it.
    """

    name: str = "experiment"
    base: str
    tuned: tuple[str, ...] = ()
    finetune: FinetuneSettings | None = None
    merge: Annotated[tuple[SweepSettings, ...], Field(min_length=1)] = (SweepSettings(),)
    path: PathSettings | None = None
    layers: LayersSettings | None = None
    merged_as: Literal["auto", "adapter", "checkpoint"] = "auto"
    merged_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    merged_rounding: Literal["nearest", "stochastic"] = "nearest"
    merged_verified: bool = True
    config_from: Side = "tuned"
    tokenizer_from: Side = "tuned"
    evaluate: EvaluateSettings
    search: SearchSettings = SearchSettings()
    choice: ChoiceSettings = ChoiceSettings()
    report: ReportSettings = ReportSettings()
    execution: ExecutionSettings = ExecutionSettings()

    def _check_without_safety(self) -> None:
        """Check that what is chosen by needs no attack success rate."""
        if self.choice.rule not in ("safe", "paper"):
            raise ValueError(
                f"rule '{self.choice.rule}' uses the attack success rate, but there is no benchmark under "
                "'evaluate.safety': add one, or use rule 'safe', which then limits the losses on the benchmarks under "
                "'evaluate.keep'"
            )
        if self.layers is not None:
            raise ValueError("'layers' searches by utility and safety: give a benchmark under 'evaluate.safety'")
        if self.choice.keep_against == "tuned":
            raise ValueError(
                "without a benchmark under 'evaluate.safety', 'choice.keep_against: tuned' has no effect: the tuned "
                "model loses nothing against itself, so λ = 1 always passes; use 'base'"
            )

    @property
    def searched_by(self) -> Literal["grid", "race"]:
        """The search, with `auto` resolved."""
        if self.search.name != "auto":
            return self.search.name
        is_raced = self.choice.rule == "safe" and self.layers is None and not self.evaluate.keep
        return "race" if is_raced else "grid"

    @property
    def num_refined(self) -> int:
        """λs beyond the grid that may be measured in each series; only rule `safe` may use them."""
        return self.search.refine if self.choice.rule == "safe" else 0

    @model_validator(mode="after")
    def _can_be_carried_out(self) -> Self:
        if bool(self.tuned) == (self.finetune is not None):
            raise ValueError("give either 'tuned' (models that exist) or 'finetune' (make them), and not both")
        if not self.evaluate.utility or not (self.evaluate.safety or self.evaluate.keep):
            raise ValueError(
                "'evaluate' needs a benchmark under 'utility', and one under 'safety' or 'keep': λ trades one against "
                "the other"
            )
        if not self.evaluate.safety:
            self._check_without_safety()
        if self.path is not None and (self.finetune is None or self.finetune.keep_every is None):
            raise ValueError("'path' measures snapshots of the tuning: give 'finetune' with 'keep_every'")
        if self.layers is not None and self.choice.rule == "paper":
            raise ValueError(
                "'layers' picks one of many recipes by utility and safety on the selection prompts, which rule 'paper' "
                "does not use: use rule 'safe'"
            )
        if self.layers is not None and self.search.name == "race":
            raise ValueError("'layers' starts from a λ that is fully measured: use search 'grid'")
        if self.evaluate.keep and self.search.name == "race":
            raise ValueError(
                "'evaluate.keep' is fully measured at every λ, which a race does not do: use search 'grid'"
            )
        if self.path is not None and not (self.path.snapshots or self.path.ema):
            raise ValueError("'path' has neither snapshots nor their averages: remove it")
        validates = self.finetune is not None and self.finetune.data.validation and self.choice.validation != "none"
        if self.evaluate.split == "whole" and not (self.choice.rule == "paper" and validates):
            raise ValueError(
                "'evaluate.split: whole' needs 'choice.rule: paper' and 'finetune', which choose λ on held-out rows of "
                "the tuning data: any other rule would choose λ on the prompts that are reported"
            )
        return self


def _with_paths(values: Any, change: Callable[[str, bool], str], key: str = "", above: str = "") -> Any:
    """Return plain settings in which every text that may be a path has been changed.

    Args:
        values: The settings, or a part of them.
        change: Gets a text, and whether it may be a folder, which the name of a benchmark or data set may not.
        key: The key of the part.
        above: The key of the mapping or list that contains it.
    """
    if isinstance(values, Mapping):
        return {name: _with_paths(inner, change, str(name), key) for name, inner in values.items()}
    if isinstance(values, (list, tuple)):
        return [_with_paths(inner, change, key, key) for inner in values]
    if not isinstance(values, str):
        return values
    is_option = above == "options" and ("/" in values or Path(values).suffix != "")
    if key in PATH_KEYS or above in ("tuned", "models") or is_option:
        return change(values, True)
    if key in NAMED_KEYS or (key == "name" and above in MEASURED):
        name, _, data = values.partition("=")
        known = f"{name}={change(data, True)}" if data else values
        return known if name in TABLE_NAMES else change(values, False)
    return values


def absolute_paths(settings: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as plain data with absolute paths of local files and folders, to be read in any folder."""

    def absolute(text: str, may_be_folder: bool) -> str:
        path = _existing(folder_named(text), may_be_folder)
        return text if path is None else str(path)

    found: dict[str, Any] = _with_paths(_plain(settings), absolute)
    return found


def without_folders(settings: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as plain data with the last names of local paths, which are the same from every folder.

    For hashes of settings: the contents of models and data are hashed separately.
    """

    def last_name(text: str, may_be_folder: bool) -> str:
        path = _existing(folder_named(text), may_be_folder)
        return text if path is None else path.name

    found: dict[str, Any] = _with_paths(_plain(settings), last_name)
    return found


def as_stored(settings: BaseModel | Mapping[str, Any]) -> str:
    """Return every setting as the YAML of a run directory, with absolute paths."""
    return yaml.safe_dump(absolute_paths(settings), sort_keys=False, allow_unicode=True)


def _plain(settings: BaseModel | Mapping[str, Any]) -> Any:
    return settings.model_dump(mode="json") if isinstance(settings, BaseModel) else settings


def _existing(path: Path, may_be_folder: bool) -> Path | None:
    """Return an existing path as an absolute one with its own name, also if it is a link; `None` if there is none."""
    try:
        if not (path.is_file() or (may_be_folder and path.is_dir())):
            return None
        return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name
    except (OSError, ValueError):  # too long for a path, or a loop of links
        return None


def settings_left(run: Path) -> dict[str, Any]:
    """Return the settings that the last command left in a run directory; empty if there are none.

    Earlier versions stored relative paths as they were typed. Most runs are in the folder where their command was
    given, so that these paths are taken as relative to the folder that contains the run, if they exist there.

    Raises:
        RunError: `experiment.yaml` is damaged.
    """
    file = run / "experiment.yaml"
    if not file.exists():
        return {}
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except NOT_YAML as error:
        raise RunError(f"{file} is damaged: {error}", remedy="delete that file; finished work is kept.") from error
    if not isinstance(values, dict):
        raise RunError(f"{file} has no settings", remedy="delete that file; finished work is kept.")

    def above(text: str, may_be_folder: bool) -> str:
        is_elsewhere = text in MODELS.entries or Path(text).is_absolute() or text.startswith("~")
        path = None if is_elsewhere else _existing(run.absolute().parent / text, may_be_folder)
        return text if path is None else str(path)

    found: dict[str, Any] = _with_paths(values, above)
    return found


def kind_of_run(settings: Mapping[str, Any]) -> str:
    """Return what a run directory has, by its settings: `experiment`, `evaluation`, `check`, `answers` or nothing."""
    if not settings:
        return ""
    if settings.keys() & {"against", "against_run"}:
        return "check"
    return "answers" if "answers" in settings else "evaluation" if "model" in settings else "experiment"


def check_kind(run: Path, kind: str) -> dict[str, Any]:
    """Return the settings in a run directory, if it is of this kind or new.

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
            f"{run} contains {what[found]}, not {what[kind].partition(' (')[0]}",
            remedy="give another --out; nothing was changed.",
        )
    return settings
