"""What a generator is, and what it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from pydantic import Field

from backmerge.config import Settings
from backmerge.merging.recipe import Variant
from backmerge.merging.served import Realisation, served_dtype
from backmerge.records import Completion, Example


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
        batch_size: Prompts at once; halved by itself when the device's memory does not suffice.
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


class Generator(Protocol):
    """Answers prompts with any variant of models; a class of `EngineSettings` and the keyword `allow_plugins`.

    Beside what stands here it may have, where it can do them:

    - `generate_many(requests, advance)`, which yields (index, completions) of each `Request` as it is done: for
      engines that are faster when they get all prompts of all variants together;
    - `log_likelihoods(variant, pairs, advance)`, one `LogLikelihood` per (context, continuation): what multiple-choice
      tasks are scored by;
    - `realisation(variant)`, how a variant reaches it: `base`, `live`, `adapter` or `checkpoint`; else `live`;
    - `dtype_of(base)`, the dtype in which it computes;
    - `is_served`, if a server has the models, so that no weights reach it;
    - `release()`, which frees the device's memory until the next call.
    """

    @property
    def identity(self) -> dict[str, str]:
        """Engine, version, dtype and device: what completions depend on beside weights, prompt and sampling."""
        ...

    def generate(
        self,
        variant: Variant | None,
        examples: Sequence[Example],
        sampling: Sampling,
        advance: Callable[[int], None],
    ) -> list[Completion]:
        """Each example's completions, `sampling.num_samples` of them in a row, in the order of the examples.

        `advance` is told of the examples of each batch that is done.
        """
        ...


def answers(
    engine: Generator, requests: Sequence[Request], advance: Callable[[int], None]
) -> Iterator[tuple[int, list[Completion]]]:
    """Carry out many requests, together where the engine can; yields each one's place and completions when done."""
    together = getattr(engine, "generate_many", None)
    if together is not None:
        yield from together(requests, advance)
        return
    for place, request in enumerate(requests):
        yield place, engine.generate(request.variant, request.examples, request.sampling, advance)


def way_of(engine: Generator, variant: Variant) -> str:
    """How a variant reaches an engine: `base`, `live`, `adapter` or `checkpoint`."""
    ask = getattr(engine, "realisation", None)
    # an engine that cannot take a merge in several ways has it in memory
    return "live" if ask is None else str(ask(variant))


def realised(engine: Generator, variant: Variant | None) -> Realisation:
    """How an engine measures a variant."""
    if variant is None or getattr(engine, "is_served", False):
        return Realisation("server", None, None, None)
    dtype_of = getattr(engine, "dtype_of", None)
    computed_in = None if dtype_of is None else str(dtype_of(variant.base))
    return Realisation(variant.served_as, served_dtype(variant), way_of(engine, variant), computed_in)


def release(engine: Generator) -> None:
    """Free the device's memory, where the engine can."""
    free = getattr(engine, "release", None)
    if free is not None:
        free()
