"""Render conversations as the text that a model sees, with its own chat template, exactly once."""

from __future__ import annotations

import functools
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backmerge.checkpoints.model_config import CONFIG, check_settings
from backmerge.errors import GenerationError
from backmerge.generation.thoughts import separated
from backmerge.records import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The date for templates that ask for today's under this name (Llama 3.1 and 3.2): a prompt must not change overnight,
# in the middle of a run that is resumed. It is the default of Llama 3.1's own template.
DATE_STRING = "26 Jul 2024"
LONGEST = 500  # characters of another library's message
RENDERING_LIMIT = 5  # seconds of CPU for one conversation; templates take milliseconds


# Renders a template in its own process; exits with 0 unless it exceeds the limits. Other faults of a template are found
# and reported when it is rendered in this process.
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

    directory: The model's folder.
    needs_template: Whether a missing chat template is refused at once, and not only when it is needed.

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
        _check_config(directory)  # the tokenizer's class is found by config.json
        raise GenerationError(
            f"the tokenizer in {directory} cannot be loaded: {str(error).strip()[:LONGEST] or type(error).__name__}",
            remedy="if a newer version wrote it, upgrade (installed: transformers "
            f"{transformers.__version__} and tokenizers {tokenizers.__version__}); otherwise copy the tokenizer files "
            "of the model that this one was tuned from into the folder.",
        ) from error
    if is_empty:  # transformers makes an empty one if there is no file
        raise GenerationError(
            f"the tokenizer in {directory} is missing or empty",
            remedy="copy the tokenizer files of the model that this one was tuned from into the folder.",
        )
    for template in _templates(tokenizer):
        check_bounded(template, directory)
    if needs_template:
        _check_template(tokenizer)
    if tokenizer.pad_token is None:
        # any token will do: padding is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _check_config(directory: Path) -> None:
    """Check that transformers reads a model's `config.json`, if it has one.

    Raises:
        GenerationError: it does not.
    """
    import transformers

    if not (directory / CONFIG).is_file():
        return
    try:
        transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # boundary: on a damaged file transformers may raise any exception
        raise GenerationError(
            f"transformers {transformers.__version__} cannot read {directory / CONFIG}: "
            f"{str(error).strip()[:LONGEST] or type(error).__name__}",
            remedy="the file may be damaged, or need a newer version of transformers; code that comes with a model is "
            "never run.",
        ) from error


def _templates(tokenizer: Any) -> list[str]:
    """Return all chat templates of a tokenizer, as texts."""
    template = tokenizer.chat_template
    return list(template.values()) if isinstance(template, dict) else [template] if template else []


@functools.lru_cache
def _is_bounded(template: str) -> bool:
    """Return whether a template stays within the probe's limits; asked once, also if many models have it."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", PROBE], input=template.encode(), capture_output=True, timeout=30, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def check_bounded(template: str, directory: Path) -> None:
    """Refuse a chat template that needs unlimited memory or time.

    A template is a program that came with a model. It is rendered once in a process with limited memory and time before
    it is rendered in this one.

    Raises:
        GenerationError: it needed more than 1 GB or 10 seconds, or made over a million characters of a short
            conversation.
    """
    if not _is_bounded(template):
        raise GenerationError(
            f"the chat template in {directory} needs too much memory or time: it was stopped while rendering a short "
            "conversation",
            remedy="no working model has such a template: do not use it unless you know who wrote it.",
        )


def _check_template(tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        raise GenerationError(
            f"the tokenizer in {tokenizer.name_or_path} has no chat template, so prompts cannot be rendered",
            remedy="use a chat model, or put its chat_template.jinja next to the tokenizer.",
        )


def render(
    tokenizer: Any, messages: Sequence[Message], *, answer_follows: bool = True, thinking: bool | None = None
) -> str:
    """Render the conversation as text, with a beginning-of-sequence token if the template has one.

    Tokenise it with `add_special_tokens=False`: the template has already added them. Every turn must be in the
    rendering, in order. If a template loses one, or fails, it gets the contents as lists of parts, the only form that
    some take (vision models, Llama Guard 3), and then with the system text at the start of the first user turn, for
    templates without a system role.

    Args:
        tokenizer: The model's tokenizer.
        messages: The turns.
        answer_follows: Whether the model answers next.
        thinking: Whether it thinks first; `None` leaves that to the template.

    Raises:
        GenerationError: the template refuses the conversation or loses a part of it, or cannot switch thinking on or
            off.
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
                given = [_turn(message, as_parts=as_parts) for message in turns]
                text = _rendered(tokenizer, given, answer_follows=answer_follows, switch=switch)
            except _template_faults() as error:
                fault = fault or f"refuses a conversation: {error}"
                continue
            lost = _lost(turns, text)
            if not lost and not (as_parts and _shows_parts(turns, text)):
                return text
            fault = fault or f"drops the {' and the '.join(lost) or 'user'}'s text"
            if lost == ["system"] and not as_parts:
                break  # a template without a system role: the next form handles it
    raise GenerationError(
        f"the chat template of {tokenizer.name_or_path} {fault}",
        remedy="correct the model's chat_template.jinja; a model that was not made for chat cannot be used here.",
    )


def _rendered(
    tokenizer: Any, turns: Sequence[Mapping[str, Any]], *, answer_follows: bool, switch: Mapping[str, Any]
) -> str:
    """Return the template's rendering of a conversation.

    Raises:
        GenerationError: it takes too long; a template may loop only for some contents, which `check_bounded` cannot
            see. Python calls the signal's handler between two steps of the template, and in the main thread only.
    """

    def stop(*_: object) -> None:
        raise GenerationError(
            f"the chat template of {tokenizer.name_or_path} was stopped: it needed more than {RENDERING_LIMIT} seconds "
            "for one conversation",
            remedy="no working model has such a template: do not use it unless you know who wrote it.",
        )

    is_limited = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGVTALRM, stop) if is_limited else None
    try:
        if is_limited:
            signal.setitimer(signal.ITIMER_VIRTUAL, RENDERING_LIMIT)
        return str(
            tokenizer.apply_chat_template(
                list(turns),
                tokenize=False,
                add_generation_prompt=answer_follows,
                date_string=DATE_STRING,
                **switch,
            )
        )
    finally:
        if is_limited:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)


def _template_faults() -> tuple[type[Exception], ...]:
    """Return the exceptions of templates: refusals, too many brackets, faults on unsupported conversations."""
    from jinja2 import TemplateError

    return (TemplateError, RecursionError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def _turn(message: Message, *, as_parts: bool) -> dict[str, Any]:
    content = [{"type": "text", "text": message.content}] if as_parts else message.content
    return {"role": message.role, "content": content}


def _lost(turns: Sequence[Message], text: str) -> list[str]:
    """Return whose texts are missing from the rendering or out of order.

    White space is ignored, since templates strip it. The thought of an earlier answer may be missing.
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
        elif turn.role != "system":  # some templates move its text further back
            at = found + len(wanted)
    return list(lost)


def _shows_parts(turns: Sequence[Message], text: str) -> bool:
    """Return whether the template rendered the list itself, rather than the texts in it."""
    marks = ("'type': 'text'", '"type": "text"')
    return any(text.count(mark) > sum(turn.content.count(mark) for turn in turns) for mark in marks)


# a template's variable, and its values with and without thinking
SWITCHES: tuple[tuple[str, Any, Any], ...] = (
    ("enable_thinking", True, False),  # Qwen 3, SmolLM3, GLM 4.5, Hunyuan
    ("thinking", True, False),  # Granite 3.2, DeepSeek 3.1
    ("reasoning", True, False),  # Command A Reasoning
    ("reasoning_effort", "medium", "none"),  # if there is such an effort
    ("reasoning_effort", "medium", "low"),  # gpt-oss, which always thinks
    ("thinking_budget", -1, 0),  # Seed-OSS
)
_NONE_IS_KNOWN = re.compile(r"""["']none["']""")


def thinking_switch(tokenizer: Any, *, thinking: bool) -> dict[str, Any]:
    """Return the variable of the chat template that turns thinking on or off, found by rendering a question both ways.

    Raises:
        GenerationError: the template has no such variable.
    """
    name, on, off = _switch_of(tokenizer)
    return {name: on if thinking else off}


@functools.lru_cache(maxsize=16)
def _switch_of(tokenizer: Any) -> tuple[str, Any, Any]:
    _check_template(tokenizer)
    question = [{"role": "user", "content": "?"}]

    def rendered(switch: dict[str, Any]) -> str:
        return _rendered(tokenizer, question, answer_follows=True, switch=switch)

    for name, on, off in SWITCHES:
        if off == "none" and not _NONE_IS_KNOWN.search(str(tokenizer.chat_template)):
            continue
        try:
            if rendered({name: on}) != rendered({name: off}):
                return name, on, off
        except _template_faults():  # it does not accept this value
            continue
    raise GenerationError(
        f"the chat template of {tokenizer.name_or_path} has no switch for thinking",
        remedy="remove --thinking (engine.thinking); thoughts are separated from answers anyway.",
    )


def prompt_text(tokenizer: Any, example: Example, *, thinking: bool | None = None) -> str:
    """Return what the model sees of an example before it answers: rendered, unless raw, and the answer's beginning.

    Raises:
        GenerationError: see `render`.
    """
    asked = example.prompt if example.is_raw else render(tokenizer, example.messages, thinking=thinking)
    return asked + example.prefill


def prompt_tokens(tokenizer: Any, example: Example, text: str) -> list[int]:
    """Return the token ids of `prompt_text`, with one beginning-of-sequence token if the model has one."""
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer(text, add_special_tokens=example.is_raw and not begins)["input_ids"]
    return ids


def prompt_lengths(tokenizer: Any, examples: Sequence[Example]) -> list[int]:
    """Return the number of tokens of each prompt, as the model sees it."""
    return [len(prompt_tokens(tokenizer, example, prompt_text(tokenizer, example))) for example in examples]


def max_positions(model: Any) -> int | None:
    """Return how many tokens a model can process, prompt and answer together; `None` if this is not configured."""
    found: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found


def turn_end(tokenizer: Any) -> int | None:
    """Return the special token that the template puts after an answer, if it does.

    A tuned model learns to end its answers with it, but not every model lists it among its end tokens: Gemma's
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
    """Return all end tokens: chat models often end a turn with other tokens than the tokenizer's end of sequence."""
    ends = config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return {token for token in (*listed, tokenizer.eos_token_id, turn_end(tokenizer)) if token is not None}
