"""Conversations to the text that a model sees, by its own chat template, exactly once."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backmerge.checkpoints.model_config import check_settings
from backmerge.errors import GenerationError
from backmerge.generation.thoughts import separated
from backmerge.records import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What templates are told that ask for today's date by this name (Llama 3.1 and 3.2): a prompt must not change
# overnight, in the middle of a run that is resumed. It is the date that Llama 3.1's own template falls back on.
DATE_STRING = "26 Jul 2024"
LONGEST = 500  # characters of another library's message


# Renders a template in its own process; ends with 0 unless it goes beyond the limits. Other faults of a template
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
except Exception:  # boundary: a model's own template, in its own process; the caller renders it again and reports
    sys.exit(0)
for start, stop in ((0, 4), (1, 4), (1, 2)):
    messages = [{"role": role, "content": text} for role, text in turns[start:stop]]
    try:
        text = template.render(
            messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>", date_string="26 Jul 2024"
        )
    except MemoryError:
        sys.exit(3)
    except Exception:  # boundary: this form of conversation is refused by the template, the next may not be
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
        GenerationError: it cannot be loaded without running its own code, or has no chat template.
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
            remedy="give a chat model, or put its chat_template.jinja next to the tokenizer.",
        )


def render(
    tokenizer: Any, messages: Sequence[Message], *, answer_follows: bool = True, thinking: bool | None = None
) -> str:
    """The conversation as text, beginning-of-sequence token included where the template has one.

    Tokenise it with `add_special_tokens=False`: the template has added them already. Every turn must be in the
    rendering, in order. A template that loses one, or fails, is given the contents as lists of parts, which some
    take alone (vision models', Llama Guard 3's); then the system's text in front of the first user turn, for
    templates without a system role.

    Args:
        tokenizer: The model's.
        messages: The turns.
        answer_follows: Whether the model is to answer.
        thinking: Whether it is to think first; `None` leaves that to the template.

    Raises:
        GenerationError: the template refuses the conversation or loses a part of it, or has no switch for thoughts.
    """
    _check_template(tokenizer)
    switch = {} if thinking is None else thinking_switch(tokenizer, thinking=thinking)
    has_system = messages[0].role == "system" and len(messages) > 1
    forms = [tuple(messages)]
    if has_system:
        system, user, *rest = messages
        forms.append((Message("user", f"{system.content}\n\n{user.content}"), *rest))
    fault = ""
    for turns in forms:
        for as_parts in (False, True):
            try:
                text = str(
                    tokenizer.apply_chat_template(
                        [_turn(message, as_parts=as_parts) for message in turns],
                        tokenize=False,
                        add_generation_prompt=answer_follows,
                        date_string=DATE_STRING,
                        **switch,
                    )
                )
            except _template_faults() as error:
                fault = fault or f"refuses a conversation: {error}"
                continue
            lost = _lost(turns, text)
            if not lost and not (as_parts and _shows_parts(turns, text)):
                return text
            fault = fault or f"leaves out the {' and the '.join(lost) or 'user'}'s text"
            if lost == ["system"] and not as_parts:
                break  # a template without a system role, which the next form is for
    raise GenerationError(
        f"the chat template of {tokenizer.name_or_path} {fault}",
        remedy="correct the model's chat_template.jinja; a model that was not made for chat cannot be asked so.",
    )


def _template_faults() -> tuple[type[Exception], ...]:
    """Return what a template raises: refusals, too many brackets, and faults on a conversation it does not know."""
    from jinja2 import TemplateError

    return (TemplateError, RecursionError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def _turn(message: Message, *, as_parts: bool) -> dict[str, Any]:
    content = [{"type": "text", "text": message.content}] if as_parts else message.content
    return {"role": message.role, "content": content}


def _lost(turns: Sequence[Message], text: str) -> list[str]:
    """Whose texts are not in the rendering, in their places.

    White space does not count, which templates strip. Of an earlier answer its thought may be left out.
    """
    rendered = "".join(text.split())
    at = 0
    lost: dict[str, None] = {}
    for turn in turns:
        content = separated(turn.content).answer if turn.role == "assistant" else turn.content
        wanted = "".join(content.split())
        found = rendered.find(wanted, at)
        if found < 0 and not (turn.role == "system" and wanted in rendered):
            lost[turn.role] = None
        elif turn.role != "system":  # whose text some templates put further back
            at = found + len(wanted)
    return list(lost)


def _shows_parts(turns: Sequence[Message], text: str) -> bool:
    """Whether the template wrote the list itself out, rather than the texts in it."""
    marks = ("'type': 'text'", '"type": "text"')
    return any(text.count(mark) > sum(turn.content.count(mark) for turn in turns) for mark in marks)


# a template's variable, and its values with thoughts and without
SWITCHES: tuple[tuple[str, Any, Any], ...] = (
    ("enable_thinking", True, False),  # Qwen 3, SmolLM3, GLM 4.5, Hunyuan
    ("thinking", True, False),  # Granite 3.2, DeepSeek 3.1
    ("reasoning", True, False),  # Command A Reasoning
    ("reasoning_effort", "medium", "none"),  # where there is an effort called so
    ("reasoning_effort", "medium", "low"),  # gpt-oss, which always thinks
    ("thinking_budget", -1, 0),  # Seed-OSS
)
_NONE_IS_KNOWN = re.compile(r"""["']none["']""")


def thinking_switch(tokenizer: Any, *, thinking: bool) -> dict[str, Any]:
    """The variable of the chat template that turns thoughts on or off, found by rendering a question both ways.

    Raises:
        GenerationError: the template has none.
    """
    name, on, off = _switch_of(tokenizer)
    return {name: on if thinking else off}


@functools.lru_cache(maxsize=16)
def _switch_of(tokenizer: Any) -> tuple[str, Any, Any]:
    _check_template(tokenizer)
    question = [{"role": "user", "content": "?"}]

    def rendered(switch: dict[str, Any]) -> str:
        common = {"tokenize": False, "add_generation_prompt": True, "date_string": DATE_STRING}
        return str(tokenizer.apply_chat_template(question, **common, **switch))

    for name, on, off in SWITCHES:
        if off == "none" and not _NONE_IS_KNOWN.search(str(tokenizer.chat_template)):
            continue
        try:
            if rendered({name: on}) != rendered({name: off}):
                return name, on, off
        except _template_faults():  # it does not know this value
            continue
    raise GenerationError(
        f"the chat template of {tokenizer.name_or_path} has no switch for thoughts",
        remedy="leave --thinking (engine.thinking) out; thoughts are kept apart from answers anyway.",
    )


def prompt_text(tokenizer: Any, example: Example, *, thinking: bool | None = None) -> str:
    """All that the model sees of an example before it answers: rendered, unless raw, and the answer's beginning.

    Raises:
        GenerationError: as `render`.
    """
    asked = example.prompt if example.is_raw else render(tokenizer, example.messages, thinking=thinking)
    return asked + example.prefill


def prompt_tokens(tokenizer: Any, example: Example, text: str) -> list[int]:
    """Token ids of `prompt_text`, with one beginning-of-sequence token where the model has one."""
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer(text, add_special_tokens=example.is_raw and not begins)["input_ids"]
    return ids


def prompt_lengths(tokenizer: Any, examples: Sequence[Example]) -> list[int]:
    """Return the tokens of each prompt, as the model sees it."""
    return [len(prompt_tokens(tokenizer, example, prompt_text(tokenizer, example))) for example in examples]


def max_positions(model: Any) -> int | None:
    """Return the tokens that a model holds, prompt and answer together; `None` if its configuration does not say."""
    found: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found


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
