"""Examples to token ids, with the loss on the answers only."""

from __future__ import annotations

from typing import Any, NamedTuple

from backmerge.checkpoints.reader import Checkpoint, context_length
from backmerge.errors import DataError
from backmerge.finetuning.settings import FinetuneSettings
from backmerge.generation.chat import render
from backmerge.records import Example, Message

IGNORED = -100  # the label that torch's cross entropy passes over


class Encoded(NamedTuple):
    """One example to train on.

    Attributes:
        input_ids: Prompt and answer; earlier turns before them.
        labels: The same, with all but the answers replaced by `IGNORED`.
        was_cut: Whether the end was lost to the cut-off.
    """

    input_ids: list[int]
    labels: list[int]
    was_cut: bool


def cutoff_for(base: Checkpoint, settings: FinetuneSettings) -> int:
    """Longest example in tokens: the setting, but not beyond the model's context, where it answers nothing either."""
    context = context_length(base.directory)
    return settings.cutoff if context is None else min(settings.cutoff, context)


def leaves_no_answer(tokenizer: Any, example: Example, cutoff: int) -> bool:
    """Whether the first prompt fills the cut-off, so that nothing can be learned."""
    first = next((place for place, turn in enumerate(example.messages) if turn.role == "assistant"), None)
    asked = render(tokenizer, example.messages[:first])
    if len(asked.encode()) < cutoff:  # a token is a byte at least
        return False
    return len(tokenizer(asked, add_special_tokens=False)["input_ids"]) >= cutoff


def encode(tokenizer: Any, example: Example, cutoff: int) -> Encoded:
    """Token ids and labels.

    The prompt is rendered and tokenised alone, just as it is when the model is asked, so that training and
    inference see the same boundary. In a conversation each of the assistant's turns is an answer to learn.

    Raises:
        DataError: the example has no answer, the chat template changes the prompt once an answer follows, or the
            first prompt fills the cut-off.
    """
    if example.reference is None:
        raise DataError(f"example '{example.id}' has no answer to learn", remedy="remove it, or add its answer.")
    turns = (*example.messages, Message("assistant", example.reference))
    input_ids: list[int] = []
    labels: list[int] = []
    seen = ""
    for place in [number for number, turn in enumerate(turns) if turn.role == "assistant"]:
        prompt = render(tokenizer, turns[:place])
        whole = render(tokenizer, turns[: place + 1], answer_follows=False)
        if not (prompt.startswith(seen) and whole.startswith(prompt)):
            raise DataError(
                f"the chat template of {tokenizer.name_or_path} renders example '{example.id}' differently once an "
                "answer follows, so the answer's tokens cannot be told apart",
                remedy="this model's template cannot be trained on as it is"
                + ("; cut the conversation into one row per answer." if seen or place + 1 < len(turns) else "."),
            )
        asked: list[int] = tokenizer(prompt[len(seen) :], add_special_tokens=False)["input_ids"]
        answer: list[int] = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
        if not labels and len(asked) >= cutoff:
            raise DataError(
                f"the prompt of example '{example.id}' has {len(asked)} tokens, which leaves no answer before the "
                f"cut-off of {cutoff}",
                remedy="raise finetune.cutoff, or remove the example.",
            )
        input_ids += asked + answer
        labels += [IGNORED] * len(asked) + answer
        seen = whole
    return Encoded(input_ids[:cutoff], labels[:cutoff], len(input_ids) > cutoff)
