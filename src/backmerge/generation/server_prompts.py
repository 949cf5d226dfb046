"""Prepare prompts for a server: a conversation, token ids, or text that becomes those ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from backmerge.errors import GenerationError
from backmerge.generation.chat import load_tokenizer, prompt_text, prompt_tokens, turn_end
from backmerge.generation.server_options import ServerKind, ServerOptions
from backmerge.generation.server_protocol import chat_messages, messages_text
from backmerge.merging.recipe import Variant
from backmerge.records import Example


class Prompt(NamedTuple):
    """One prompt, ready to send.

    Attributes:
        text: The recorded text: what the model sees or, if the server renders it, the messages as JSON.
        fields: Fields of the request.
        room: Tokens that an answer may have in the model's context; `None` if not known.
        end: The token that ends a turn by the chat template, if it is rendered here.
        is_conversation: Whether the server renders it.
        tokenizer: The model's tokenizer, if there is one on this machine.
    """

    text: str
    fields: Mapping[str, Any]
    room: int | None = None
    end: int | None = None
    tokenizer: Any = None
    is_conversation: bool = False

    def num_tokens(self, answer: str) -> int:
        """Return the length of an answer in tokens, for servers that do not report it; 0 if it is unknown."""
        if self.tokenizer is None:
            return 0
        return len(self.tokenizer(answer, add_special_tokens=False)["input_ids"])


class PromptWriter:
    """Write prompts as the options require, with tokenizers that are loaded once each.

    Args:
        options: The engine's options.
        thinking: Whether a reasoning model thinks, if the prompt is rendered here.
    """

    def __init__(self, options: ServerOptions, *, thinking: bool | None = None) -> None:
        self._thinking = thinking
        self._options = options
        self._tokenizers: dict[Path, tuple[Any, int | None]] = {}

    def prompt(self, variant: Variant | None, example: Example, kind: ServerKind, limit: int | None) -> Prompt:
        """Return the example in the form in which it is sent.

        Args:
            variant: Its tokenizer is used, unless the options name one.
            example: The example.
            kind: The kind of server.
            limit: The model's context in tokens, if known.

        Raises:
            GenerationError: the server does not support this example, there is no tokenizer to render it, or no room
                for it.
        """
        if self._options.api == "chat":
            messages = chat_messages(example, kind)
            going_on = {"continue_final_message": True, "add_generation_prompt": False}
            extra = going_on if example.prefill and kind == "vllm" else {}
            return Prompt(messages_text(messages), {"messages": messages, **extra}, is_conversation=True)
        loaded = self._loaded(variant)
        if loaded is None:
            if not example.is_raw:
                raise GenerationError(
                    f"prompt '{example.id}' cannot be rendered: the tokenizer is not known",
                    remedy="give its folder with the option 'tokenizer', or set 'api: chat'.",
                )
            text = example.prompt + example.prefill
            return Prompt(text, {"prompt": text})
        tokenizer, end = loaded
        text = prompt_text(tokenizer, example, thinking=self._thinking)
        ids = prompt_tokens(tokenizer, example, text)
        room = None if limit is None else limit - len(ids)
        if room is not None and room < 1:
            raise GenerationError(
                f"prompt '{example.id}' has {len(ids)} tokens, but the model's context on the server is {limit} tokens",
                remedy="remove the prompt, or serve the model with a longer context.",
                example=example.id,
            )
        sent = ids if self._options.prompt_as == "tokens" else self._as_text(tokenizer, example, text, ids)
        return Prompt(text, {"prompt": sent}, room, end, tokenizer)

    def continuation(
        self, variant: Variant | None, context: str, continuation: str, limit: int | None
    ) -> tuple[list[int], int]:
        """Return the token ids of both, and how many of them are the continuation's.

        Raises:
            GenerationError: there is no tokenizer, or the continuation has no tokens or is too long.
        """
        from backmerge.generation.likelihood import row_of

        loaded = self._loaded(variant)
        if loaded is None:
            raise GenerationError(
                "likelihoods need the model's tokenizer, which is not known",
                remedy="give its folder with the option 'tokenizer'.",
            )
        return row_of(loaded[0], context, continuation, limit)

    def _loaded(self, variant: Variant | None) -> tuple[Any, int | None] | None:
        directory = self._options.tokenizer or (None if variant is None else variant.companions.folder())
        if directory is None:
            return None
        if directory not in self._tokenizers:
            tokenizer = load_tokenizer(directory)
            self._tokenizers[directory] = (tokenizer, turn_end(tokenizer))
        return self._tokenizers[directory]

    def _as_text(self, tokenizer: Any, example: Example, text: str, ids: list[int]) -> str:
        """Return the text that becomes exactly these ids on a server, which adds special tokens."""
        bos = tokenizer.bos_token or ""
        for candidate in (text, text.removeprefix(bos)):
            if tokenizer(candidate)["input_ids"] == ids:
                return candidate
        raise GenerationError(
            f"prompt '{example.id}' cannot be sent as text: it would become other tokens",
            remedy="set the option 'prompt_as: tokens' if the server accepts token ids, or 'api: chat'.",
        )
