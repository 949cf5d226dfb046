"""Ollama's Modelfile: a model's own chat template in Ollama's template language, checked against the original."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from backmerge.errors import GenerationError
from backmerge.generation.chat import end_tokens, render
from backmerge.records import Message

SYSTEM, QUESTION, ANSWER, SECOND = "Sys0tem text", "Ques1tion text", "Ans2wer text", "Sec3ond text"
# a longer context costs memory that few prompts need; the user can raise it
MAX_CONTEXT = 8192


class TurnMarks(NamedTuple):
    """The text that a chat template puts around each turn.

    Attributes:
        before_system, after_system: Around the system text.
        before_user, after_user: Around the user's text; after the last turn, the answer begins.
        after_answer: Ends an answer if another turn follows.
        default_system: The system text of a conversation without one; `None` if its block is then omitted.
        is_system_in_turn: The system text is at the beginning of the first user turn, with `after_system` after it.
    """

    before_system: str
    after_system: str
    before_user: str
    after_user: str
    after_answer: str
    default_system: str | None
    is_system_in_turn: bool = False

    @property
    def go_template(self) -> str:
        """The template in Go's template language, filled in by Ollama for each turn, with system text in the first."""
        system = f"{{{{ if .System }}}}{self.before_system}{{{{ .System }}}}{self.after_system}{{{{ end }}}}"
        first, inner = ("", system) if self.is_system_in_turn else (system, "")
        user = f"{{{{ if .Prompt }}}}{self.before_user}{inner}{{{{ .Prompt }}}}{self.after_user}{{{{ end }}}}"
        return f"{first}{user}{{{{ .Response }}}}{self.after_answer}"

    def rendered(self, messages: Sequence[Message]) -> str:
        """Return a conversation with these marks, up to the beginning of the answer."""
        system = messages[0].content if messages[0].role == "system" else self.default_system
        block = "" if system is None else f"{self.before_system}{system}{self.after_system}"
        text, inner = ("", block) if self.is_system_in_turn else (block, "")
        for message in messages[messages[0].role == "system" :]:
            if message.role == "user":
                text += f"{self.before_user}{inner}{message.content}{self.after_user}"
                inner = ""
            else:
                text += f"{message.content}{self.after_answer}"
        return text


def turn_marks(tokenizer: Any) -> TurnMarks | None:
    """Return the text that the tokenizer's chat template puts around turns; `None` if it has another form.

    The beginning-of-sequence token is omitted: llama.cpp and Ollama add it themselves.
    """
    plain = (Message("user", QUESTION),)
    answered = (*plain, Message("assistant", ANSWER))
    bos = _added_bos(tokenizer)
    try:
        alone = render(tokenizer, plain).removeprefix(bos)
        headed = render(tokenizer, (Message("system", SYSTEM), *plain)).removeprefix(bos)
        closed = render(tokenizer, answered, answer_follows=False).removeprefix(bos)
        longer = render(tokenizer, (*answered, Message("user", SECOND))).removeprefix(bos)
    except GenerationError:
        return None
    before, _, after_user = alone.partition(QUESTION)
    after_answer = closed.partition(ANSWER)[2]
    before_system, _, between = headed.partition(SYSTEM)
    next_turn = longer.partition(ANSWER)[2]
    end, second_end = f"{QUESTION}{after_user}", f"{SECOND}{after_user}"
    if not (between.endswith(end) and next_turn.startswith(after_answer) and next_turn.endswith(second_end)):
        return None
    before_user = next_turn.removeprefix(after_answer).removesuffix(second_end)
    is_in_turn = before_user != "" and before_system == before_user
    after_system = between.removesuffix(end)
    if is_in_turn:
        before_system = ""
    else:
        after_system = after_system.removesuffix(before_user)
    default_system = None
    if before != before_user:
        default_system = before.removesuffix(before_user).removeprefix(before_system).removesuffix(after_system)
    marks = TurnMarks(before_system, after_system, before_user, after_user, after_answer, default_system, is_in_turn)
    texts = (before_system, after_system, before_user, after_user, after_answer, default_system or "")
    is_quotable = not any(sign in text for text in texts for sign in ('"""', "{{", "}}"))
    if default_system == "":
        return None  # a system block even without a system text, which Ollama does not support
    return marks if is_quotable and _agree(marks, tokenizer, bos) else None


def modelfile(name: str, tokenizer: Any, config: Any, context: int | None) -> tuple[str, bool]:
    """Return the text of a Modelfile, and whether it states the chat template.

    Args:
        name: The GGUF file, in the Modelfile's folder.
        tokenizer: The model's tokenizer.
        config: The model's generation configuration.
        context: The model's context in tokens, if known.
    """
    marks = turn_marks(tokenizer)
    lines = [f"FROM ./{name}"]
    if marks is None:
        lines += [
            "# This model's chat template cannot be stated in Ollama's template language. Ollama takes the one in the",
            "# GGUF if it knows it: compare `ollama show --template` with the model's before you trust it.",
        ]
    else:
        lines.append(f'TEMPLATE """{marks.go_template}"""')
        if marks.default_system:
            lines.append(f'SYSTEM """{marks.default_system}"""')
    stops = {str(tokenizer.convert_ids_to_tokens(token)) for token in end_tokens(config, tokenizer)}
    lines += [f'PARAMETER stop "{stop}"' for stop in sorted(stops) if '"' not in stop]
    lines.append(f"PARAMETER num_ctx {min(context or MAX_CONTEXT, MAX_CONTEXT)}")
    lines.append("PARAMETER repeat_penalty 1")  # 1 is none, as when the model was measured
    return "\n".join(lines) + "\n", marks is not None


def _agree(marks: TurnMarks, tokenizer: Any, bos: str) -> bool:
    """Return whether the marks reproduce the template's text on conversations that they were not derived from."""
    conversations = (
        (Message("user", "Why is tea warm?"),),
        (Message("system", "Be brief."), Message("user", "Why?")),
        (
            Message("system", "Be brief."),
            Message("user", "Why?"),
            Message("assistant", "It was heated."),
            Message("user", "By whom?"),
            Message("assistant", "By you."),
            Message("user", "When?"),
        ),
    )
    try:
        return all(render(tokenizer, turns).removeprefix(bos) == marks.rendered(turns) for turns in conversations)
    except GenerationError:
        return False


def _added_bos(tokenizer: Any) -> str:
    """Return the beginning-of-sequence token if the tokenizer adds it to texts; some only use it to begin turns."""
    first = tokenizer("x")["input_ids"][:1]
    return str(tokenizer.bos_token) if tokenizer.bos_token and first == [tokenizer.bos_token_id] else ""
