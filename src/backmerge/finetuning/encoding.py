"""Turn examples into token ids, with the loss on the answers only."""

from __future__ import annotations

from typing import Any, NamedTuple

from backmerge.checkpoints.reader import Checkpoint, context_length
from backmerge.errors import DataError
from backmerge.finetuning.settings import FinetuneSettings
from backmerge.generation.chat import render
from backmerge.records import Example, Message

IGNORED = -100  # the label that torch's cross entropy ignores


class Encoded(NamedTuple):
    """One example to train on.

    Attributes:
        input_ids: Prompt and answer, after earlier turns.
        labels: The same, with everything but the answers replaced by `IGNORED`.
        was_cut: Whether the end was cut off.
    """

    input_ids: list[int]
    labels: list[int]
    was_cut: bool


def cutoff_for(base: Checkpoint, settings: FinetuneSettings) -> int:
    """Return the longest example in tokens: the setting, but at most the model's context."""
    context = context_length(base.directory)
    return settings.cutoff if context is None else min(settings.cutoff, context)


def leaves_no_answer(tokenizer: Any, example: Example, cutoff: int) -> bool:
    """Return whether the first prompt reaches the cut-off, so that there is nothing to train on."""
    first = next((place for place, turn in enumerate(example.messages) if turn.role == "assistant"), None)
    asked = render(tokenizer, example.messages[:first])
    if len(asked.encode()) < cutoff:  # a token is at least one byte
        return False
    return len(tokenizer(asked, add_special_tokens=False)["input_ids"]) >= cutoff


def encode(tokenizer: Any, example: Example, cutoff: int) -> Encoded:
    """Return an example's token ids and labels.

    The prompt is rendered and tokenised alone, exactly as when the model is asked, so that training and inference have
    the same boundary. In a conversation each of the assistant's turns is an answer to train on.

    Raises:
        DataError: the example has no answer, the chat template changes the prompt when an answer follows, or the first
            prompt reaches the cut-off.
    """
    if example.reference is None:
        raise DataError(f"example '{example.id}' has no answer to train on", remedy="remove it, or add its answer.")
    turns = (*example.messages, Message("assistant", example.reference))
    input_ids: list[int] = []
    labels: list[int] = []
    seen = ""
    for place in [number for number, turn in enumerate(turns) if turn.role == "assistant"]:
        prompt = render(tokenizer, turns[:place])
        whole = render(tokenizer, turns[: place + 1], answer_follows=False)
        if not (prompt.startswith(seen) and whole.startswith(prompt)):
            raise DataError(
                f"the chat template of {tokenizer.name_or_path} renders example '{example.id}' differently when an "
                "answer follows, so the answer's tokens cannot be identified",
                remedy="this model's template cannot be used for training as it is"
                + ("; cut the conversation into one row per answer." if seen or place + 1 < len(turns) else "."),
            )
        asked: list[int] = tokenizer(prompt[len(seen) :], add_special_tokens=False)["input_ids"]
        answer: list[int] = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
        if not labels and len(asked) >= cutoff:
            raise DataError(
                f"the prompt of example '{example.id}' has {len(asked)} tokens, so no answer fits in the "
                f"cut-off of {cutoff}",
                remedy="raise finetune.cutoff, or remove the example.",
            )
        input_ids += asked + answer
        labels += [IGNORED] * len(asked) + answer
        seen = whole
    return Encoded(input_ids[:cutoff], labels[:cutoff], len(input_ids) > cutoff)
