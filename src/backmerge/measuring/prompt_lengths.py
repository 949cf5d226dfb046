"""How long prompts are in a model's tokens: for what an evaluation will cost, and whether its context holds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backmerge.benchmarks.protocol import Benchmark
from backmerge.checkpoints.reader import context_length
from backmerge.errors import GenerationError
from backmerge.generation.chat import prompt_text, prompt_tokens
from backmerge.generation.protocol import Generator
from backmerge.records import Example

# engines that refuse a prompt beyond the model's context; another may cut it, or know better
REFUSING = frozenset({"transformers", "vllm"})


def prompt_lengths(tokenizer: Any, examples: Sequence[Example]) -> list[int]:
    """Tokens of each prompt, as the model sees it."""
    return [len(prompt_tokens(tokenizer, example, prompt_text(tokenizer, example))) for example in examples]


def context_of(directory: Path, engine: Generator) -> int | None:
    """What a model holds in tokens, prompt and answer together; `None` if neither its config nor the engine says."""
    limits = [context_length(directory), engine.max_length]
    known = [limit for limit in limits if isinstance(limit, int)]
    return min(known) if known else None


def check_prompts_fit(
    benchmark: Benchmark, examples: Sequence[Example], lengths: Sequence[int], context: int | None
) -> None:
    """That each prompt leaves room for an answer.

    Raises:
        GenerationError: some don't; names the first.
    """
    if context is None:
        return
    long = [(e, length) for e, length in zip(examples, lengths, strict=True) if length + 1 > context]
    if not long:
        return
    example, length = long[0]
    more = f", and {len(long) - 1} more are too long" if len(long) > 1 else ""
    raise GenerationError(
        f"prompt '{example.id}' of {benchmark.name} has {length:,} tokens, and the model's context holds {context:,}"
        f"{more}: nothing was generated",
        remedy=f"take a model with a longer context, or leave {benchmark.name} out of evaluate.{benchmark.kind}; of a "
        "file of your own, remove the line.",
        example=example.id,
    )
