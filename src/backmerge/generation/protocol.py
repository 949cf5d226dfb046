"""The base class of generators, and their settings and requests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from backmerge.checkpoints.reader import Weights
from backmerge.config import Settings
from backmerge.errors import ConfigError
from backmerge.merging.recipe import Variant
from backmerge.merging.served import Realisation, served_dtype
from backmerge.records import Completion, Example
from backmerge.registry import ENGINES, NOTHING_ALLOWED, Permissions, resolve


class Drawing(Settings):
    """How the next token is drawn. The default is greedy.

    Attributes:
        temperature: 0 is greedy.
        top_p: Nucleus sampling: the smallest set of tokens with this total probability.
        top_k: Only the k most likely tokens; 0 for all.
        repetition_penalty: Divides the odds of tokens that occur in prompt or answer; 1 for none.
        seed: Seed of the random draws.
    """

    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class Sampling(Drawing):
    """How answers are drawn, and when they end.

    Attributes:
        max_new_tokens: Generation limit, in tokens.
        num_samples: Answers to each prompt; more than one makes sense above temperature 0 only.
        stop: Texts that end an answer; they and the text after them are cut off.
    """

    max_new_tokens: Annotated[int, Field(gt=0)] = 512
    num_samples: Annotated[int, Field(gt=0)] = 1
    stop: tuple[str, ...] = ()


class EngineSettings(Settings):
    """The settings of the engine that runs the models.

    Attributes:
        name: A name in the table of engines, or package.module:Class.
        device: The device: `auto` is a GPU if there is one.
        dtype: Dtype of the computation: `auto` is float32 on a CPU and the checkpoint's own elsewhere.
        batch_size: Prompts at once; halved automatically if the device's memory is too small.
        thinking: Whether a reasoning model thinks before it answers, by its chat template's own switch; the template
            decides if it is not given.
        options: The engine's own options; its module describes them.
    """

    name: str = "transformers"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: Annotated[int, Field(gt=0)] = 64
    thinking: bool | None = None
    options: Mapping[str, Any] = Field(default_factory=dict)


def thinking_identity(settings: EngineSettings) -> dict[str, str]:
    """Return the part of an engine's identity for the thinking switch: empty if the template decides."""
    return {} if settings.thinking is None else {"thinking": "on" if settings.thinking else "off"}


class Request(NamedTuple):
    """Prompts for one variant; `None` as variant means the model that a server has."""

    variant: Variant | None
    examples: Sequence[Example]
    sampling: Sampling


class LogLikelihood(NamedTuple):
    """How likely a text is after another.

    Attributes:
        total: Natural logarithm, summed over the continuation's tokens.
        num_tokens: Tokens of the continuation.
        is_greedy: Whether each of its tokens is the most likely one.
    """

    total: float
    num_tokens: int
    is_greedy: bool


class Generator(ABC):
    """Answers prompts with any variant of models; made from `EngineSettings`. Subclasses declare their abilities.

    Attributes:
        is_served: Whether a server has the models, so that no weights reach this engine.
        gives_likelihoods: Whether `log_likelihoods` works.
        max_length: Tokens of prompt and answer that the engine accepts, if fewer than the model's own context.
        answer_log: The file in which an engine that asks a server stores each answer, so that nothing is asked twice;
            other engines ignore it.
    """

    is_served: bool = False
    gives_likelihoods: bool = False
    max_length: int | None = None
    answer_log: Path | None = None

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, str]:
        """Return engine, version, dtype and device: completions depend on these, weights, prompt and sampling."""

    @abstractmethod
    def generate(
        self,
        variant: Variant | None,
        examples: Sequence[Example],
        sampling: Sampling,
        advance: Callable[[int], None],
    ) -> list[Completion]:
        """Return each example's completions, `sampling.num_samples` of them in a row, in the order of the examples.

        `advance` is called with the number of examples of each finished batch.
        """

    def generate_many(
        self, requests: Sequence[Request], advance: Callable[[int], None]
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield each request's place and completions when done; override it if answering all together is faster."""
        for place, request in enumerate(requests):
            yield place, self.generate(request.variant, request.examples, request.sampling, advance)

    def log_likelihoods(
        self,
        variant: Variant,
        pairs: Sequence[tuple[str, str]],
        advance: Callable[[int], None],
    ) -> list[LogLikelihood]:
        """Return one `LogLikelihood` for each (context, continuation), which multiple-choice tasks are scored by."""
        raise NotImplementedError

    def realisation(self, variant: Variant) -> str:  # noqa: ARG002 - for engines with several ways
        """Return how a variant reaches the engine: `base`, `live`, `adapter` or `checkpoint`."""
        return "live"

    def dtype_of(self, base: Weights) -> str | None:  # noqa: ARG002
        """Return the dtype in which the engine computes on a base, as torch names it, if known."""
        return None

    def release(self) -> None:  # noqa: B027 - nothing to free by default
        """Free the device's memory until the next call."""


def engine_class(name: str, permissions: Permissions = NOTHING_ALLOWED) -> type[Generator]:
    """Return the engine class with that name.

    Raises:
        ConfigError: no engine has that name, or a plugin is not a subclass of `Generator`.
    """
    found = resolve(ENGINES, name, permissions)
    if not (isinstance(found, type) and issubclass(found, Generator)):
        raise ConfigError(
            f"'{name}' is not an engine", remedy="make it a subclass of backmerge.generation.protocol.Generator."
        )
    return found


def made_engine(settings: EngineSettings, permissions: Permissions = NOTHING_ALLOWED) -> Generator:
    """Make an engine from its settings, on its device.

    Raises:
        BackmergeError: there is no such engine, or its device cannot be used.
    """
    kind: Any = engine_class(settings.name, permissions)  # each engine is made from its settings
    engine: Generator = kind(settings)
    return engine


def realised(engine: Generator, variant: Variant | None) -> Realisation:
    """Return how an engine measures a variant."""
    if variant is None or engine.is_served:
        return Realisation("server", None, None, None)
    way = engine.realisation(variant)
    return Realisation(variant.served_as, served_dtype(variant), way, engine.dtype_of(variant.base))
