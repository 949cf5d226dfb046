"""What a benchmark is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from backmerge.config import Settings
from backmerge.errors import ConfigError
from backmerge.generation.protocol import Drawing, LogLikelihood, Sampling
from backmerge.records import Example
from backmerge.registry import closest

Kind = Literal["utility", "safety", "over_refusal", "keep"]
KINDS: tuple[Kind, ...] = ("utility", "safety", "over_refusal", "keep")
Metric = Callable[[Example, str], float]
ScoreTable = dict[str, list[float | None]]  # metric to a value in [0, 1] for each example, or None where unscored


class BenchmarkSettings(Settings):
    """Which benchmark, and how it differs from its defaults.

    Attributes:
        name: From the table of benchmarks, lm-eval:TASK, a .jsonl or .csv file, or package.module:function.
        data: Your own copy of its data: a file, or a folder of files.
        system: System prompt instead of its own; `""` for none.
        prefill: The beginning of each answer, put into the model's mouth: safety that is only a few tokens deep does
            not withstand it.
        num_samples: Answers to each prompt.
        temperature: Of the sampling; 0 is greedy.
        top_p: Nucleus.
        top_k: Only the k most likely tokens; 0 for all.
        repetition_penalty: Divides the odds of tokens that occur in prompt or answer; 1 for none.
        max_new_tokens: Generation limit, in tokens.
        metrics: Of your own file: exact_match, contains_reference, json_equal, final_number, call_match,
            pattern_match, bertscore, graded (by a chat model, `options.judge`). λ is chosen on the first.
        options: The benchmark's own; its module says which.
    """

    name: str
    data: str | None = None
    system: str | None = None
    prefill: str = ""
    num_samples: Annotated[int, Field(gt=0)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    max_new_tokens: Annotated[int, Field(gt=0)] | None = None
    metrics: tuple[str, ...] = ()
    options: Mapping[str, Any] = Field(default_factory=dict)


class Scorer(Protocol):
    """Finds the values of answers, all at once.

    Attributes:
        metrics: Names; decisions are taken on the first.
        identity: Changes whenever the values may; part of the key under which they are kept.
    """

    @property
    def metrics(self) -> tuple[str, ...]: ...  # noqa: D102 - described above

    @property
    def identity(self) -> str: ...  # noqa: D102

    def __call__(
        self, examples: Sequence[Example], answers: Sequence[Sequence[str]], advance: Callable[[int], None]
    ) -> ScoreTable:
        """A value for each example and metric; `answers[i]` are the samples that answer `examples[i]`."""
        ...


class Choices(Protocol):
    """A benchmark that is scored by how likely given answers are, and not by what is generated."""

    def pairs(self, tokenizer: Any, examples: Sequence[Example]) -> list[tuple[str, str]]:
        """Contexts and continuations, all examples' in a row."""
        ...

    def score(self, examples: Sequence[Example], found: Sequence[LogLikelihood]) -> ScoreTable:
        """A value for each example and metric, from the likelihoods of its pairs."""
        ...


@dataclass(frozen=True)
class Benchmark:
    """Prompts, and how answers to them are scored. Made by a function that `backmerge.registry` names.

    Attributes:
        name: As in the table of benchmarks, or the file's name.
        kind: `utility` is scored by `scorer`, and so is `keep`, which tuning should not cost; `safety` and
            `over_refusal` by a judge (as ASR, and as the share of harmless prompts refused).
        examples: Every prompt, in a fixed order.
        max_new_tokens: The generation limit.
        scorer: For `utility`.
        sampling: How answers are drawn, where the benchmark says so, by the names of `Sampling`.
        choices: For `utility` by likelihood; answers are not generated then, and `scorer` only names the metrics.
        is_gated: Its authors give it to whom they know: its texts are in no report unless asked for.
    """

    name: str
    kind: Kind
    examples: tuple[Example, ...]
    max_new_tokens: int
    scorer: Scorer | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    choices: Choices | None = None
    is_gated: bool = False

    @property
    def is_judged(self) -> bool:
        """Whether a judge reads the answers, rather than a scorer."""
        return self.kind in ("safety", "over_refusal")

    def sampling_as(self, drawing: Drawing, max_new_tokens: int | None) -> Sampling:
        """Return how answers are drawn: as the benchmark says, else as the settings do; the lower limit holds."""
        limit = self.max_new_tokens if max_new_tokens is None else min(self.max_new_tokens, max_new_tokens)
        return Sampling(**{**drawing.model_dump(), **self.sampling, "max_new_tokens": limit})


def options_of(settings: BenchmarkSettings, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A benchmark's options, with its defaults.

    Raises:
        ConfigError: one is unknown.
    """
    unknown = sorted(set(settings.options) - set(defaults))
    if unknown:
        raise ConfigError(
            f"{settings.name} has no option '{unknown[0]}'{closest(unknown[0], defaults)}",
            remedy=f"known: {', '.join(defaults) or 'none'}.",
        )
    return {**defaults, **settings.options}
