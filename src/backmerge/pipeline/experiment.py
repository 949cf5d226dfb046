"""The experiment file: what is tuned, merged, measured and chosen. Composed from the settings of the rooms below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from backmerge.benchmarks.catalogue import named
from backmerge.benchmarks.protocol import BenchmarkSettings
from backmerge.config import Settings
from backmerge.execution import ExecutionSettings
from backmerge.finetuning.settings import FinetuneSettings
from backmerge.generation.protocol import Drawing, EngineSettings
from backmerge.judging.protocol import JudgeSettings
from backmerge.selection import ChoiceSettings, SearchSettings

Lam = Annotated[float, Field(gt=0, lt=1)]
DEFAULT_LAMS = (0.2, 0.4, 0.6, 0.8)  # the paper's


class SweepSettings(Settings):
    """One merge method over a grid of λ.

    Attributes:
        method: From the table of methods.
        lam: λs strictly between 0 (the base) and 1 (the tuned model), which are always measured.
        parameters: The method's other parameters.
        seed: For methods that draw random numbers.
    """

    method: str = "linear"
    lam: Annotated[tuple[Lam, ...], Field(min_length=1)] = DEFAULT_LAMS
    parameters: Mapping[str, Any] = Field(default_factory=dict)
    seed: int = 0


JudgeChoice = Annotated[JudgeSettings, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)]
BenchmarkChoice = Annotated[BenchmarkSettings, BeforeValidator(lambda v: named(v) if isinstance(v, str) else v)]


class EvaluateSettings(Settings):
    """What is measured, and how.

    Attributes:
        utility: Benchmarks (names, or .jsonl and .csv files; or settings with more) of what was tuned for.
        safety: Benchmarks of harmful requests.
        over_refusal: Benchmarks of harmless requests that may be refused.
        judge: Finds refusals and harm: a name from the table of judges, or settings with its model and engine.
        second_judge: Another one, whose verdicts are shown beside the first one's; nothing is decided on them.
        limit: At most so many prompts of each split, for a quick try.
        engine: What runs the models.
        sampling: How answers are drawn; a benchmark's own way holds where it has one.
        max_new_tokens: A generation limit for all benchmarks, where it is lower than their own.
        max_unscored: The run fails if more than this share of a benchmark's answers could not be scored.
        cache: Whether answers of earlier runs are taken over, and these kept for later ones.
    """

    utility: tuple[BenchmarkChoice, ...] = ()
    safety: tuple[BenchmarkChoice, ...] = ()
    over_refusal: tuple[BenchmarkChoice, ...] = ()
    judge: JudgeChoice = JudgeSettings()
    second_judge: JudgeChoice | None = None
    limit: Annotated[int, Field(gt=0)] | None = None
    engine: EngineSettings = EngineSettings()
    sampling: Drawing = Drawing()
    max_new_tokens: Annotated[int, Field(gt=0)] | None = None
    max_unscored: Annotated[float, Field(ge=0, le=1)] = 0.02
    cache: bool = True


class ReportSettings(Settings):
    """What the report shows.

    Attributes:
        text: Answers in full, folded behind a click, or not at all.
        num_samples: Prompts whose answers are shown side by side.
    """

    text: Literal["full", "folded", "none"] = "folded"
    num_samples: Annotated[int, Field(ge=0)] = 10


class Experiment(Settings):
    """A whole experiment; `backmerge run FILE` carries it out.

    Attributes:
        name: What the report calls it.
        base: The aligned model: a folder, a hub id, or `demo`.
        tuned: Tuned versions of it that exist already, as folders or hub ids: checkpoints, or LoRA adapters. Several
            are taken for repetitions, such as seeds: λ is one for all, chosen on their mean.
        finetune: Or: make them.
        merge: Methods and λs.
        merged_dtype: Of the merged models; to be given where base and tuned models are of different dtypes.
        evaluate: Benchmarks, judge and engine.
        search: Which λs of the grid are measured.
        choice: The rule for λ.
        report: What is shown.
        execution: Where answers are made; no result depends on it.
    """

    name: str = "experiment"
    base: str
    tuned: tuple[str, ...] = ()
    finetune: FinetuneSettings | None = None
    merge: Annotated[tuple[SweepSettings, ...], Field(min_length=1)] = (SweepSettings(),)
    merged_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    evaluate: EvaluateSettings
    search: SearchSettings = SearchSettings()
    choice: ChoiceSettings = ChoiceSettings()
    report: ReportSettings = ReportSettings()
    execution: ExecutionSettings = ExecutionSettings()

    @model_validator(mode="after")
    def _can_be_carried_out(self) -> Self:
        if bool(self.tuned) == (self.finetune is not None):
            raise ValueError("give either 'tuned' (models that exist) or 'finetune' (make them), and not both")
        if not self.evaluate.utility or not self.evaluate.safety:
            raise ValueError("'evaluate' needs a benchmark under 'utility' and one under 'safety': λ trades the two")
        return self
