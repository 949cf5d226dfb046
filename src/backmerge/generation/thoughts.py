"""Separate a reasoning model's thought from its answer, by the marks that models put around it."""

from __future__ import annotations

import re
from typing import NamedTuple

# opening and closing mark of each family: DeepSeek-R1, Qwen 3, SmolLM3 and most others; variants of tuned models;
# Seed-OSS; Magistral; Command A Reasoning; OpenThinker
MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
# marks that some models put around the answer that follows
_ANSWER_MARKS = (
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
)
CHANNEL = (
    "<|channel|>"  # gpt-oss's: <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>
)
# tokens that stay in the text until a reply is split; those of channels have other meanings in models without channels
MARK_TOKENS = frozenset(mark for pair in (*MARKS, *_ANSWER_MARKS) for mark in pair)
CHANNEL_TOKENS = frozenset(
    f"<|{name}|>" for name in ("channel", "start", "end", "message", "constrain", "call", "return")
)
_CHANNELS = re.compile(
    r"(?:<\|start\|>assistant)?<\|channel\|>(?P<name>\w*)(?P<head>[^<]*(?:<\|constrain\|>[^<]*)?)(?:<\|message\|>|\Z)"
)
_CHANNEL_END = re.compile(r"<\|(?:end|return|call|start|channel)\|>")
# the same after its special tokens were removed
_BARE_CHANNELS = re.compile(r"(?P<thought>\s*analysis(?!\s).*?)assistant(?:commentary.*?assistant)?final", re.DOTALL)


class Reply(NamedTuple):
    """A model's reply in two parts.

    thought: The thought without its marks; empty if there is none.
    answer: The text after the thought, unchanged; empty if the thought never ends.
    """

    thought: str
    answer: str


def opens_thought(prompt: str) -> bool:
    """Return whether a rendered prompt ends in a thought that the template opened (DeepSeek-R1, Qwen 3 Thinking)."""
    return any(prompt.rstrip().endswith(opening) for opening, _ in MARKS)


def separated(text: str, prompt: str = "") -> Reply:
    r"""Split a reply into its thought and its answer.

    A thought is only at the beginning: later marks are part of the answer, so that a closing mark after an answer does
    not hide it. If the prompt is not known, a closing mark without an opening one ends a thought that the prompt
    opened. If a thought never ends, the answer is empty.

    >>> separated("<think>2 + 3 is 5.</think>\n\n5")
    Reply(thought='2 + 3 is 5.', answer='5')

    Args:
        text: The reply.
        prompt: The prompt as the model saw it, if known.
    """
    if CHANNEL in text:
        return _by_channels(text)
    if bare := _BARE_CHANNELS.match(text):
        return Reply(bare["thought"].strip().removeprefix("analysis").strip(), text[bare.end() :])
    thoughts: list[str] = []
    rest = text
    is_open = opens_thought(prompt)
    while True:
        began = next((pair for pair in MARKS if rest.lstrip().startswith(pair[0])), None)
        if began is not None:
            body, closing = rest.lstrip().removeprefix(began[0]), began[1]
        elif is_open:
            body = rest
            closing = next(end for opening, end in MARKS if prompt.rstrip().endswith(opening))
        else:
            break
        is_open = False
        thought, closed, rest = body.partition(closing)
        thoughts.append(thought.strip())
        if not closed:
            rest = ""
    if not thoughts and not prompt and (found := _unopened(text)) is not None:
        thoughts, rest = [found.thought], found.answer
    if not thoughts:
        return Reply("", text)
    rest = rest.lstrip("\r\n") if rest.strip() else ""
    return Reply("\n\n".join(filter(None, thoughts)), _without_answer_marks(rest))


def _unopened(text: str) -> Reply | None:
    """Return the thought and answer if the opening mark is in a prompt that is not known."""
    for opening, closing in MARKS:
        thought, closed, rest = text.partition(closing)
        if closed and opening not in thought:
            return Reply(thought.strip(), rest)
    return None


def _without_answer_marks(text: str) -> str:
    for opening, closing in _ANSWER_MARKS:
        if text.lstrip().startswith(opening):
            return text.lstrip().removeprefix(opening).partition(closing)[0].strip("\r\n")
    return text


def _by_channels(text: str) -> Reply:
    """Split gpt-oss's channels: `final` is the answer; `analysis` and others not meant for the reader are the thought.

    A tool call, in the channel `commentary` with an addressee, is an answer too.
    """
    thoughts: list[str] = []
    answers = [text[: text.index(CHANNEL)].removesuffix("<|start|>assistant")]
    for channel in _CHANNELS.finditer(text):
        ended = _CHANNEL_END.search(text, channel.end())
        body = text[channel.end() : ended.start() if ended else len(text)]
        is_answer = channel["name"] == "final" or (channel["name"] == "commentary" and " to=" in channel["head"])
        (answers if is_answer else thoughts).append(body)
    return Reply("\n\n".join(filter(None, (thought.strip() for thought in thoughts))), "".join(answers))
