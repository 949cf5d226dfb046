"""Turn generated token ids into completions: the same for every engine that returns token ids."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from backmerge.errors import GenerationError
from backmerge.generation.protocol import Sampling
from backmerge.generation.thoughts import CHANNEL, CHANNEL_TOKENS, MARK_TOKENS, separated
from backmerge.records import Completion, Example


def cut_at_end(tokens: Sequence[int], ends: Collection[int]) -> tuple[list[int], bool]:
    """Return the answer up to and including its end token, and whether there is one."""
    for position, token in enumerate(tokens):
        if token in ends:
            return list(tokens[: position + 1]), True
    return list(tokens), False


def completion_of(
    tokenizer: Any,
    example: Example,
    prompt: str,
    sample: int,
    tokens: Sequence[int],
    sampling: Sampling,
    *,
    is_ended: bool,
) -> Completion:
    """Return token ids as a completion.

    Args:
        tokenizer: The model's tokenizer.
        example: The example that was asked.
        prompt: The prompt as the model saw it.
        sample: Number of the answer, if there are several.
        tokens: Tokens of the answer, including its end token.
        sampling: Its stop texts are cut off, with the text after them.
        is_ended: Whether the model ended before the limit.
    """
    text = _text(tokenizer, tokens)
    stops = [place for place in (text.find(stop) for stop in sampling.stop) if place >= 0]
    num_tokens = len(tokens)
    if stops:
        text = text[: min(stops)]
        # tokens after the stop, such as padding of the batch, are not part of the answer
        num_tokens = 1 + bisect.bisect_left(
            range(1, len(tokens)),
            True,
            key=lambda count: any(stop in _text(tokenizer, tokens[:count]) for stop in sampling.stop),
        )
    thought, answer = separated(example.prefill + text, prompt.removesuffix(example.prefill))
    answer = _without_special(tokenizer, answer)
    return Completion(example.id, prompt, answer, num_tokens, is_ended or bool(stops), sample, thought)


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text without special tokens, but with those that mark a thought."""
    marks = _special_marks(tokenizer)
    # the clean-up that some tokenizers (Llama 3) request would remove spaces from code
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    if marks.isdisjoint(tokens):
        return str(decode(list(tokens), skip_special_tokens=True))
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special} - marks
    return str(decode([token for token in tokens if token not in special], skip_special_tokens=False))


def _without_special(tokenizer: Any, text: str) -> str:
    """Return the answer without marks of thoughts that are special tokens outside a thought."""
    for token in _special_marks(tokenizer):
        text = text.replace(str(tokenizer.added_tokens_decoder[token]), "")
    return text


@functools.lru_cache(maxsize=16)
def _special_marks(tokenizer: Any) -> frozenset[int]:
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = MARK_TOKENS | CHANNEL_TOKENS if CHANNEL in special else MARK_TOKENS
    return frozenset(number for text, number in special.items() if text in marks)


def check_lengths(examples: Sequence[Example], tokens: Sequence[Sequence[int]], context: int | None) -> None:
    """Check that each prompt leaves room for an answer.

    Args:
        examples: The examples.
        tokens: Tokens of each prompt.
        context: The model's context, in tokens; `None` if it is not known.

    Raises:
        GenerationError: one does not; the message names it.
    """
    for example, ids in zip(examples, tokens, strict=True):
        if context is not None and len(ids) + 1 > context:
            raise GenerationError(
                f"prompt '{example.id}' has {len(ids)} tokens, but the model's context is {context} tokens",
                remedy="remove the prompt, or use a model with a longer context.",
                example=example.id,
            )


def check_tokens(tokens: Iterable[Sequence[int]], num_rows: int) -> None:
    """Check that the model has an embedding for each token.

    Raises:
        GenerationError: the tokenizer produced a token without an embedding.
    """
    highest = max((max(ids, default=0) for ids in tokens), default=0)
    if highest >= num_rows:
        raise GenerationError(
            f"the tokenizer produces the token {highest}, but the model has only {num_rows} embeddings",
            remedy="the tokenizer is another model's, or its files are damaged: copy the tokenizer files of the model "
            "that this one was tuned from into the folder.",
        )
