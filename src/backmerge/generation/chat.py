"""Conversations to the text that a model sees, by its own chat template, exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backmerge.errors import GenerationError
from backmerge.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """A model's tokenizer, padding on the left.

    Raises:
        GenerationError: it cannot be loaded without running code of its own, or has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise GenerationError(
            f"the tokenizer in {directory} cannot be loaded: {error}",
            remedy="put the base's tokenizer files beside the weights.",
        ) from error
    if not tokenizer.chat_template:
        raise GenerationError(
            f"the tokenizer in {directory} has no chat template, so how to ask the model is unknown",
            remedy="give a chat model, or put its chat_template.jinja beside the tokenizer.",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def render(tokenizer: Any, messages: Sequence[Message], *, answer_follows: bool = True) -> str:
    """The conversation as text, beginning-of-sequence token included where the template has one.

    Tokenise it with `add_special_tokens=False`: the template has added them already. For a template without a
    system role the system's text goes in front of the first user turn.

    Raises:
        GenerationError: the template refuses the conversation.
    """
    from jinja2 import TemplateError

    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_follows))
    except TemplateError as error:
        if messages[0].role != "system" or len(messages) < 2:
            raise GenerationError(
                f"the chat template of {tokenizer.name_or_path} refuses a conversation: {error}"
            ) from error
    system, user, *rest = messages
    merged = Message("user", f"{system.content}\n\n{user.content}")
    return render(tokenizer, (merged, *rest), answer_follows=answer_follows)
