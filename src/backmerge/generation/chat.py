"""Conversations to the text that a model sees, by its own chat template, exactly once."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backmerge.checkpoints.model_config import check_settings
from backmerge.errors import GenerationError
from backmerge.records import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What templates are told that ask for today's date by this name (Llama 3.1 and 3.2): a prompt must not change
# overnight, in the middle of a run that is resumed. It is the date that Llama 3.1's own template falls back on.
DATE_STRING = "26 Jul 2024"
LONGEST = 500  # characters of another library's message


# Renders a template in a process of its own; ends with 0 unless it goes beyond the limits. Other faults of a template
# are found, and named, when it is rendered in earnest.
PROBE = """
import resource, sys
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2 import nodes
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (10, 10))

class Generation(Extension):
    tags = {"generation"}
    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body).set_lineno(line)

def refuse(message):
    raise ValueError(message)

turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hello"), ("user", "Why?")]
try:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
    template = environment.from_string(sys.stdin.read())
except MemoryError:
    sys.exit(3)
except Exception:
    sys.exit(0)
for start, stop in ((0, 4), (1, 4), (1, 2)):
    messages = [{"role": role, "content": text} for role, text in turns[start:stop]]
    try:
        text = template.render(
            messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>", date_string="26 Jul 2024"
        )
    except MemoryError:
        sys.exit(3)
    except Exception:
        continue
    if len(text) > 1_000_000:
        sys.exit(3)
"""


def load_tokenizer(directory: Path, *, needs_template: bool = True) -> PreTrainedTokenizerBase:
    """A model's tokenizer, padding on the left.

    Args:
        directory: The model's.
        needs_template: Whether one without a chat template is refused at once, and not only where it is needed.

    Raises:
        GenerationError: it cannot be loaded without running code of its own, or has no chat template.
    """
    import tokenizers
    import transformers

    check_settings(directory)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, padding_side="left", trust_remote_code=False)
        is_empty = len(tokenizer) <= len(tokenizer.all_special_ids)
    except Exception as error:  # boundary: on a damaged file tokenizers raises plain `Exception`, transformers anything
        raise GenerationError(
            f"the tokenizer in {directory} cannot be loaded: {str(error).strip()[:LONGEST] or type(error).__name__}",
            remedy="if a newer version wrote it, upgrade (here are transformers "
            f"{transformers.__version__} and tokenizers {tokenizers.__version__}); otherwise copy the tokenizer files "
            "of the model that this one was tuned from into the folder.",
        ) from error
    if is_empty:  # transformers makes one without words if there is no file
        raise GenerationError(
            f"there is no tokenizer in {directory}, or one without words",
            remedy="copy the tokenizer files of the model that this one was tuned from into the folder.",
        )
    for template in _templates(tokenizer):
        check_bounded(template, directory)
    if needs_template:
        _check_template(tokenizer)
    if tokenizer.pad_token is None:
        # any token will do: what is padded is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _templates(tokenizer: Any) -> list[str]:
    """All chat templates of a tokenizer, as texts."""
    template = tokenizer.chat_template
    return list(template.values()) if isinstance(template, dict) else [template] if template else []


@functools.lru_cache
def check_bounded(template: str, directory: Path) -> None:
    """Refuse a chat template that takes memory or time without end.

    A template is a program that came with a model. It is rendered once in a process of limited memory and time before
    it is rendered here.

    Raises:
        GenerationError: it took more than 1 GB, 10 seconds, or made over a million characters of a short conversation.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", PROBE], input=template.encode(), capture_output=True, timeout=30, check=False
        )
        is_bounded = done.returncode == 0
    except subprocess.TimeoutExpired:
        is_bounded = False
    if not is_bounded:
        raise GenerationError(
            f"the chat template in {directory} takes memory or time without end: rendering a short conversation, it "
            "was stopped",
            remedy="no working model has such a template: do not use it before you know who wrote it.",
        )


def _check_template(tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        raise GenerationError(
            f"the tokenizer in {tokenizer.name_or_path} has no chat template, so how to ask the model is unknown",
            remedy="give a chat model, or put its chat_template.jinja beside the tokenizer.",
        )


def render(tokenizer: Any, messages: Sequence[Message], *, answer_follows: bool = True) -> str:
    """The conversation as text, beginning-of-sequence token included where the template has one.

    Tokenise it with `add_special_tokens=False`: the template has added them already. For a template without a
    system role, which refuses the system's text or leaves it out, that text goes in front of the first user turn.

    Raises:
        GenerationError: the template refuses the conversation.
    """
    from jinja2 import TemplateError

    _check_template(tokenizer)
    has_system = messages[0].role == "system" and len(messages) > 1
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = str(
            tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=answer_follows, date_string=DATE_STRING
            )
        )
    except TemplateError as error:
        if not has_system:
            raise GenerationError(
                f"the chat template of {tokenizer.name_or_path} refuses a conversation: {error}"
            ) from error
    else:
        if not has_system or messages[0].content.strip() in text:
            return text
    system, user, *rest = messages
    merged = Message("user", f"{system.content}\n\n{user.content}")
    return render(tokenizer, (merged, *rest), answer_follows=answer_follows)


def prompt_text(tokenizer: Any, example: Example) -> str:
    """All that the model sees of an example before it answers: rendered, unless raw, and the answer's beginning.

    Raises:
        GenerationError: the template refuses the conversation.
    """
    asked = example.prompt if example.is_raw else render(tokenizer, example.messages)
    return asked + example.prefill


def prompt_tokens(tokenizer: Any, example: Example, text: str) -> list[int]:
    """Token ids of `prompt_text`, with one beginning-of-sequence token where the model has one."""
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer(text, add_special_tokens=example.is_raw and not begins)["input_ids"]
    return ids


def turn_end(tokenizer: Any) -> int | None:
    """The special token that the template puts after an answer, if it puts one.

    A tuned model learns to end its answers by it, and not every model lists it among its end tokens: Gemma's
    `<end_of_turn>` is neither in gemma-2b-it's generation config nor its tokenizer's end of sequence.
    """
    answer = "backmerge"
    try:
        whole = render(tokenizer, (Message("user", "?"), Message("assistant", answer)), answer_follows=False)
    except GenerationError:
        return None
    ids: list[int] = tokenizer(whole.rpartition(answer)[2].lstrip(), add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    return ids[0] if ids and ids[0] in added and added[ids[0]].special else None


def end_tokens(config: Any, tokenizer: Any) -> set[int]:
    """Chat models often end a turn by another token than the tokenizer's end of sequence; all of them count."""
    ends = config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return {token for token in (*listed, tokenizer.eos_token_id, turn_end(tokenizer)) if token is not None}
