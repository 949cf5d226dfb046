"""The types of a benchmark, its settings and its scorer."""

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
ScoreTable = dict[str, list[float | None]]  # metric to a value in [0, 1] for each example, or None if unscored


class BenchmarkSettings(Settings):
    """A benchmark, with changes to its defaults.

    Attributes:
        name: A name in the table of benchmarks, lm-eval:TASK, a .jsonl or .csv file, or package.module:function.
        data: Your own copy of its data: a file, or a folder of files.
        system: System prompt instead of its own; `""` for none.
        prefill: The beginning of each answer, put into the model's mouth: safety that is only a few tokens deep does
            not withstand it.
        num_samples: Answers to each prompt.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Nucleus sampling: the smallest set of tokens with this total probability.
        top_k: Only the k most likely tokens; 0 for all.
        repetition_penalty: Divides the odds of tokens that occur in prompt or answer; 1 for none.
        max_new_tokens: Generation limit, in tokens.
        metrics: For your own file: exact_match, contains_reference, json_equal, final_number, call_match,
            pattern_match, bertscore, graded (by a chat model, `options.judge`). λ is chosen on the first.
        options: The benchmark's own options; its module describes them.
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
    """Computes the values of answers, all at once.

    Attributes:
        metrics: Names; decisions use the first.
        identity: Changes whenever the values may; part of the key under which they are stored.
    """

    @property
    def metrics(self) -> tuple[str, ...]: ...  # noqa: D102 - described above

    @property
    def identity(self) -> str: ...  # noqa: D102

    def __call__(
        self, examples: Sequence[Example], answers: Sequence[Sequence[str]], advance: Callable[[int], None]
    ) -> ScoreTable:
        """Return a value for each example and metric; `answers[i]` are the samples for `examples[i]`."""
        ...


class Choices(Protocol):
    """A benchmark that is scored by the likelihoods of given answers, without generating any."""

    def pairs(self, tokenizer: Any, examples: Sequence[Example]) -> list[tuple[str, str]]:
        """Return contexts and continuations, those of all examples in a row."""
        ...

    def score(self, examples: Sequence[Example], found: Sequence[LogLikelihood]) -> ScoreTable:
        """Return a value for each example and metric, from the likelihoods of its pairs."""
        ...


@dataclass(frozen=True)
class Benchmark:
    """Prompts, and how answers to them are scored. Made by a function named in `backmerge.registry`.

    Attributes:
        name: Its name in the table of benchmarks, or the file's name.
        kind: `utility` is scored by `scorer`, and so is `keep`, which tuning should not reduce; `safety` and
            `over_refusal` are scored by a judge (as ASR, and as the share of harmless prompts refused).
        examples: Every prompt, in a fixed order.
        max_new_tokens: The generation limit.
        scorer: The scorer of `utility`.
        sampling: How answers are drawn, if the benchmark defines it, by the names of `Sampling`.
        choices: For `utility` by likelihood; no answers are generated then, and `scorer` only names the metrics.
        is_gated: Whether its authors grant access individually: its texts are in no report unless requested.
        scorer_asks_judge: Whether the scorer asks a model as a judge does, so that the engine's model is freed first.
        code: A hash of the file of a user's own benchmark, which its values depend on.
    """

    name: str
    kind: Kind
    examples: tuple[Example, ...]
    max_new_tokens: int
    scorer: Scorer | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    choices: Choices | None = None
    is_gated: bool = False
    scorer_asks_judge: bool = False
    code: str = ""

    @property
    def scored_by(self) -> str:
        """Return the scorer's identity, with a hash of a user's own code."""
        assert self.scorer is not None, f"{self.name} has no scorer"
        return f"{self.scorer.identity}/{self.code}" if self.code else self.scorer.identity

    @property
    def is_judged(self) -> bool:
        """Return whether a judge scores the answers, rather than a scorer."""
        return self.kind in ("safety", "over_refusal")

    def sampling_as(self, drawing: Drawing, max_new_tokens: int | None) -> Sampling:
        """Return how answers are drawn: by the benchmark's sampling, else the settings'; the lower limit applies."""
        limit = self.max_new_tokens if max_new_tokens is None else min(self.max_new_tokens, max_new_tokens)
        return Sampling(**{**drawing.model_dump(), **self.sampling, "max_new_tokens": limit})


def options_of(settings: BenchmarkSettings, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a benchmark's options, with its defaults.

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
