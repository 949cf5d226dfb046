"""What a generator is, and what it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, Protocol

from pydantic import Field

from backmerge.config import Settings
from backmerge.merging.recipe import Variant
from backmerge.records import Completion, Example


class Sampling(Settings):
    """How the next token is drawn. The default is greedy.

    Attributes:
        max_new_tokens: Generation limit, in tokens.
        temperature: 0 is greedy.
        top_p: Nucleus: the smallest set of tokens that holds this probability.
        top_k: Only the k most likely tokens; 0 for all.
        repetition_penalty: Divides the odds of tokens that occur in prompt or answer; 1 for none.
        seed: Of the random draws.
    """

    max_new_tokens: Annotated[int, Field(gt=0)] = 512
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class EngineSettings(Settings):
    """What runs the models.

    Attributes:
        name: From the table of engines, or package.module:Class.
        device: Where: `auto` is a GPU if there is one.
        dtype: Of the computation: `auto` is float32 on a CPU and the checkpoint's own elsewhere.
        batch_size: Prompts at once; halved by itself when the device's memory does not suffice.
    """

    name: str = "transformers"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: Annotated[int, Field(gt=0)] = 64


class Generator(Protocol):
    """Answers prompts with any variant of models; a class of one argument, `EngineSettings`."""

    @property
    def identity(self) -> dict[str, str]:
        """Engine, version, dtype and device: what completions depend on beside weights, prompt and sampling."""
        ...

    def generate(
        self,
        variant: Variant,
        examples: Sequence[Example],
        sampling: Sampling,
        advance: Callable[[int], None],
    ) -> list[Completion]:
        """One completion per example, in order; `advance` is told of each batch that is done."""
        ...
