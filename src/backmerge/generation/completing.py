"""From generated token ids to completions: the same for every engine that hands over token ids."""

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
    """The answer up to its end token, which is counted, and whether there is one."""
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
    """What token ids say, as a record.

    Args:
        tokenizer: The model's.
        example: What was asked.
        prompt: As the model saw it.
        sample: Which of several answers.
        tokens: Of the answer, its end token included.
        sampling: Whose stop texts are cut off, with what follows them.
        is_ended: Whether the model ended before the limit.
    """
    text = _text(tokenizer, tokens)
    stops = [place for place in (text.find(stop) for stop in sampling.stop) if place >= 0]
    num_tokens = len(tokens)
    if stops:
        text = text[: min(stops)]
        # what an engine gives after the stop, such as its batch's padding, was not generated
        num_tokens = 1 + bisect.bisect_left(
            range(1, len(tokens)),
            True,
            key=lambda count: any(stop in _text(tokenizer, tokens[:count]) for stop in sampling.stop),
        )
    thought, answer = separated(example.prefill + text, prompt.removesuffix(example.prefill))
    answer = _without_special(tokenizer, answer)
    return Completion(example.id, prompt, answer, num_tokens, is_ended or bool(stops), sample, thought)


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text without special tokens, but with those that mark a thought."""
    marks = _special_marks(tokenizer)
    # the clean-up that some tokenizers (Llama 3) ask for would take spaces out of code
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    if marks.isdisjoint(tokens):
        return str(decode(list(tokens), skip_special_tokens=True))
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special} - marks
    return str(decode([token for token in tokens if token not in special], skip_special_tokens=False))


def _without_special(tokenizer: Any, text: str) -> str:
    """The answer without marks of thoughts that are special tokens and were not where a thought is."""
    for token in _special_marks(tokenizer):
        text = text.replace(str(tokenizer.added_tokens_decoder[token]), "")
    return text


@functools.lru_cache(maxsize=16)
def _special_marks(tokenizer: Any) -> frozenset[int]:
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = MARK_TOKENS | CHANNEL_TOKENS if CHANNEL in special else MARK_TOKENS
    return frozenset(number for text, number in special.items() if text in marks)


def check_lengths(examples: Sequence[Example], tokens: Sequence[Sequence[int]], context: int | None) -> None:
    """That each prompt leaves room for an answer.

    Args:
        examples: What is asked.
        tokens: Of each prompt.
        context: What the model holds, in tokens; `None` if that is not known.

    Raises:
        GenerationError: one does not; names it.
    """
    for example, ids in zip(examples, tokens, strict=True):
        if context is not None and len(ids) + 1 > context:
            raise GenerationError(
                f"prompt '{example.id}' has {len(ids)} tokens, and the model's context holds {context}",
                remedy="remove the prompt, or use a model with a longer context.",
                example=example.id,
            )


def check_tokens(tokens: Iterable[Sequence[int]], num_rows: int) -> None:
    """Check that the model has an embedding for each token.

    Raises:
        GenerationError: the tokenizer made one that it does not have.
    """
    highest = max((max(ids, default=0) for ids in tokens), default=0)
    if highest >= num_rows:
        raise GenerationError(
            f"the tokenizer makes the token {highest}, and the model has embeddings for {num_rows} tokens",
            remedy="the tokenizer is another model's, or its files are damaged: copy the tokenizer files of the model "
            "that this one was tuned from into the folder.",
        )
