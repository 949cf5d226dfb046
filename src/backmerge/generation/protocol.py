"""What a generator is, and what it is asked for."""

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
        top_p: Nucleus: the smallest set of tokens that holds this probability.
        top_k: Only the k most likely tokens; 0 for all.
        repetition_penalty: Divides the odds of tokens that occur in prompt or answer; 1 for none.
        seed: Of the random draws.
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
        stop: Texts that end an answer; they and what follows are cut off.
    """

    max_new_tokens: Annotated[int, Field(gt=0)] = 512
    num_samples: Annotated[int, Field(gt=0)] = 1
    stop: tuple[str, ...] = ()


class EngineSettings(Settings):
    """What runs the models.

    Attributes:
        name: From the table of engines, or package.module:Class.
        device: Where: `auto` is a GPU if there is one.
        dtype: Of the computation: `auto` is float32 on a CPU and the checkpoint's own elsewhere.
        batch_size: Prompts at once; halved automatically when the device's memory does not suffice.
        thinking: Whether a reasoning model is to think before it answers, by its chat template's own switch; left to
            the template if not given.
        options: The engine's own; its module says which.
    """

    name: str = "transformers"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: Annotated[int, Field(gt=0)] = 64
    thinking: bool | None = None
    options: Mapping[str, Any] = Field(default_factory=dict)


def thinking_identity(settings: EngineSettings) -> dict[str, str]:
    """What an engine's identity has of the switch for thoughts: nothing if it is left to the template."""
    return {} if settings.thinking is None else {"thinking": "on" if settings.thinking else "off"}


class Request(NamedTuple):
    """Prompts for one variant; no variant stands for the model that a server has."""

    variant: Variant | None
    examples: Sequence[Example]
    sampling: Sampling


class LogLikelihood(NamedTuple):
    """How likely a text is after another.

    Attributes:
        total: Natural logarithm, summed over the continuation's tokens.
        num_tokens: Of the continuation.
        is_greedy: Whether each of its tokens is the most likely one.
    """

    total: float
    num_tokens: int
    is_greedy: bool


class Generator(ABC):
    """Answers prompts with any variant of models; made from `EngineSettings`. Subclasses declare what they can do.

    Attributes:
        is_served: Whether a server has the models, so that no weights reach this engine.
        gives_likelihoods: Whether `log_likelihoods` works.
        max_length: Tokens of prompt and answer that the engine takes, if it limits them below the model's own context.
        answer_log: Where an engine that asks a server keeps each answer, so that nothing is asked twice; others ignore
            it.
    """

    is_served: bool = False
    gives_likelihoods: bool = False
    max_length: int | None = None
    answer_log: Path | None = None

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, str]:
        """Engine, version, dtype and device: what completions depend on besides weights, prompt and sampling."""

    @abstractmethod
    def generate(
        self,
        variant: Variant | None,
        examples: Sequence[Example],
        sampling: Sampling,
        advance: Callable[[int], None],
    ) -> list[Completion]:
        """Return each example's completions, `sampling.num_samples` of them in a row, in the order of the examples.

        `advance` is called with the number of examples of each batch that is done.
        """

    def generate_many(
        self, requests: Sequence[Request], advance: Callable[[int], None]
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield each request's place and completions when done; override it if all together are faster."""
        for place, request in enumerate(requests):
            yield place, self.generate(request.variant, request.examples, request.sampling, advance)

    def log_likelihoods(
        self,
        variant: Variant,
        pairs: Sequence[tuple[str, str]],
        advance: Callable[[int], None],
    ) -> list[LogLikelihood]:
        """Return one `LogLikelihood` per (context, continuation), by which multiple-choice tasks are scored."""
        raise NotImplementedError

    def realisation(self, variant: Variant) -> str:  # noqa: ARG002 - for engines with several ways
        """Return how a variant reaches the engine: `base`, `live`, `adapter` or `checkpoint`."""
        return "live"

    def dtype_of(self, base: Weights) -> str | None:  # noqa: ARG002
        """Return the dtype in which the engine computes on a base, as torch names it, if it is known."""
        return None

    def release(self) -> None:  # noqa: B027 - nothing to free by default
        """Free the device's memory until the next call."""


def engine_class(name: str, permissions: Permissions = NOTHING_ALLOWED) -> type[Generator]:
    """Return the engine of that name.

    Raises:
        ConfigError: there is none, or a plugin is no subclass of `Generator`.
    """
    found = resolve(ENGINES, name, permissions)
    if not (isinstance(found, type) and issubclass(found, Generator)):
        raise ConfigError(
            f"'{name}' is not an engine", remedy="make it a subclass of backmerge.generation.protocol.Generator."
        )
    return found


def made_engine(settings: EngineSettings, permissions: Permissions = NOTHING_ALLOWED) -> Generator:
    """Return an engine with its settings, on its device.

    Raises:
        BackmergeError: there is none, or its device cannot be used.
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
