r"""Turn a row in one of the usual forms into a conversation and the answer to train on.

The form is recognised by its columns; the first that a row has counts:

- `messages` or `conversations`: turns as `role` and `content`, or as `from` and `value` (ShareGPT's, with `human` and
  `gpt`); also as JSON text.
- `prompt`: a text, or turns up to the user's. The answer is in `completion`, else `response`, `answer` or `output`, and
  is a text, or also turns.
- `instruction` and `input`: the prompt is the instruction, a blank line, and the input, if there is one (as in Alpaca,
  but without its headings). The answer is in `output`, else `response`, `completion` or `answer`.
- `question`: the answer is in `answer`, else `response`, `completion` or `output`.

`system`, if it has a text, is the system prompt of a conversation that does not begin with one.

Worked example: `{"instruction": "Put into French.", "input": "kite", "output": "cerf-volant"}` is the user's turn
`"Put into French.\n\nkite"` and the answer `"cerf-volant"`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from backmerge.records import Message, Role

CONVERSATIONS = ("messages", "conversations")
PROMPTS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("completion", "response", "answer", "output"),
    "instruction": ("output", "response", "completion", "answer"),
    "question": ("answer", "response", "completion", "output"),
}
NAMES = (*CONVERSATIONS, *PROMPTS, "input", "system", *PROMPTS["prompt"])

# marks of a turn that must not be trained on: OpenAI's and mistral-finetune's, axolotl's, and others'
TURN_MARKS = ("weight", "train", "training", "train_on_turn", "loss", "loss_weight")
PART_MARKS = ("mask", "train_detail", "training_detail")  # marks for parts of a turn, or with the opposite meaning
TOOLS = ("tool_calls", "function_call", "tool_call_id")

ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}


class Draft(NamedTuple):
    """An example before it has an id.

    Attributes:
        messages: The conversation up to the user's last turn.
        reference: The answer to train on.
        category: A stratum for sampling.
        remark: A remark about rows like this one, in words that fit all of them.
    """

    messages: tuple[Message, ...]
    reference: str
    category: str | None = None
    remark: str = ""


class RowError(Exception):
    """A fault of a row, without its place, which the caller knows.

    Attributes:
        is_empty: Whether a required text is there, but blank.
    """

    def __init__(self, reason: str, *, is_empty: bool = False) -> None:
        super().__init__(reason)
        self.is_empty = is_empty


def recognised(values: Mapping[str, Any], first: Sequence[str] = ()) -> Draft:
    """Return the conversation in a row, recognised by its columns.

    Args:
        values: Column to value.
        first: Columns that have precedence over others in the row.

    Raises:
        RowError: no known columns, or their contents cannot be used.
    """
    _refuse_undesired(values)
    column = _chosen(values, (*CONVERSATIONS, *PROMPTS), first)
    if column is None and _is_pair(values):
        raise RowError(PAIR)
    if column is None:
        raise RowError(f"no prompt in the columns {_listed(values)}")
    if column in CONVERSATIONS:
        turns = turns_of(values[column], column)
    else:
        turns = [*_prompt_turns(values, column), *_answer_turns(values, column, first)]
    system = optional_text(values, "system")
    if system is not None and (not turns or turns[0].role != "system"):
        turns.insert(0, Message("system", system))
    return conversation(turns)


PAIR = (
    "it is a preference pair ('chosen' and 'rejected'), of which only one answer can be trained on here: use the "
    "columns 'prompt' and 'completion', or name the column: --column completion=chosen"
)


def _is_pair(values: Mapping[str, Any]) -> bool:
    return "chosen" in values and "rejected" in values


def _refuse_undesired(values: Mapping[str, Any]) -> None:
    """Refuse an answer that is marked as undesired, as in KTO's rows."""
    mark = values.get("label")
    is_no = mark in (False, 0) or (isinstance(mark, str) and mark.strip().casefold() in ("false", "0", "0.0"))
    if is_no and "completion" in values:
        raise RowError(f"'label' is {mark!r}, so its answer is undesired (KTO); remove such rows")
    if values.get("weight") in (False, 0):
        raise RowError(f"'weight' is {values['weight']!r}, so it must not be trained on; remove such rows")
    if values.get("tools"):
        raise RowError("it has tools ('tools'), and training on tool calls is not supported")
    if "rejected" in values and "chosen" not in values and not _is_absent(values["rejected"]):
        raise RowError("it has a 'rejected' answer but no 'chosen' one; remove that column")


def renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """Return the row with its columns renamed to ours.

    Raises:
        RowError: it has no such column.
    """
    missing = next((theirs for theirs in columns.values() if theirs not in values), None)
    if missing is not None:
        raise RowError(f"no column '{missing}' among {_listed(values)}")
    return {**values, **{ours: values[theirs] for ours, theirs in columns.items()}}


def conversation(turns: Sequence[Message]) -> Draft:
    """Return the turns up to the user's last, with the assistant's last as the answer.

    Raises:
        RowError: it begins with the assistant's turn, does not end with a user's turn and an assistant's, a turn is
            empty, or a system turn is not the first.
    """
    if not any(turn.role == "user" for turn in turns):
        raise RowError("no user turn")
    if next(turn.role for turn in turns if turn.role != "system") == "assistant":
        raise RowError("it begins with the assistant's turn, which answers nothing: remove that turn")
    if turns[-1].role != "assistant":
        raise RowError(f"the last turn is the {turns[-1].role}'s, so there is no answer to train on")
    if turns[-2].role != "user":
        raise RowError(f"the turn before the last answer is the {turns[-2].role}'s, not the user's")
    for number, turn in enumerate(turns, start=1):
        if not turn.content.strip():
            which = "the answer" if number == len(turns) else f"turn {number} (the {turn.role}'s)"
            raise RowError(f"{which} is empty", is_empty=True)
        if turn.role == "system" and number > 1:
            raise RowError(f"turn {number} is the system's, which must be the first")
    return Draft(tuple(turns[:-1]), turns[-1].content)


def turns_of(value: Any, name: str) -> list[Message]:
    """Return turns from any of the usual forms; a system turn without a text is dropped.

    Raises:
        RowError: it is not a list of turns, or a turn has another role, or no text.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"'{name}' is a text, but not turns as JSON") from error
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise RowError(f"'{name}' is {_kind(value)}, not a list of turns")
    turns = [_turn(turn, f"{name}, turn {number}") for number, turn in enumerate(value, start=1)]
    return [turn for turn in turns if turn.role != "system" or turn.content.strip()]


def needed_text(values: Mapping[str, Any], name: str) -> str:
    """Return the text in a column.

    Raises:
        RowError: there is no such column, it is blank, or contains no text.
    """
    if name not in values:
        raise RowError(f"no column '{name}' among {_listed(values)}")
    text = optional_text(values, name)
    if text is None:
        raise RowError(f"'{name}' is empty", is_empty=True)
    return text


def optional_text(values: Mapping[str, Any], name: str) -> str | None:
    """Return the text in a column, numbers as text; `None` if there is none or it is blank.

    Raises:
        RowError: it is something else, or cannot be written to a file again.
    """
    value = values.get(name)
    if _is_absent(value):
        return None
    return as_text(value, name)


def as_text(value: Any, name: str) -> str:
    """Return a value that must be a text.

    Raises:
        RowError: it is neither text nor number, or contains half of a surrogate pair.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError(f"'{name}' is {_kind(value)}, not a text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RowError(f"'{name}' contains half of a surrogate pair, which UTF-8 files cannot store")
    return value


def _turn(turn: Mapping[str, Any], name: str) -> Message:
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        shown = f"'{role}'" if isinstance(role, str) and role.isidentifier() else _kind(role)
        raise RowError(f"{name}: the role is {shown}, not one of {', '.join(ROLES)}")
    tools = next((key for key in TOOLS if turn.get(key)), None)
    if tools is not None:
        raise RowError(f"{name}: it has '{tools}', and training on tool calls is not supported")
    mark = next((key for key in TURN_MARKS if key in turn and not _is_learned(turn[key])), None)
    if mark is not None and ROLES[role] == "assistant":
        raise RowError(
            f"{name}: '{mark}' is {turn[mark]!r}, so it must not be trained on, but every answer of a row is "
            "used: cut the conversation after its last such turn, or remove the row"
        )
    part = next((key for key in PART_MARKS if turn.get(key)), None)
    if part is not None and ROLES[role] == "assistant":
        raise RowError(f"{name}: '{part}' excludes parts of it from training; only whole answers are supported")
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    return Message(ROLES[role], "" if content is None else as_text(content, name))


def _is_learned(mark: Any) -> bool:
    """Return whether a turn's mark says that it is trained on as usual: 1, true, or nothing."""
    return mark is None or mark is True or (isinstance(mark, int | float) and mark == 1)


def _prompt_turns(values: Mapping[str, Any], column: str) -> list[Message]:
    if column == "prompt" and _is_turns(values[column]):
        return turns_of(values[column], column)
    prompt = needed_text(values, column)
    if column == "instruction" and (given := optional_text(values, "input")) is not None:
        prompt = f"{prompt}\n\n{given}"
    return [Message("user", prompt)]


def _answer_turns(values: Mapping[str, Any], column: str, first: Sequence[str]) -> list[Message]:
    answer = _chosen(values, PROMPTS[column], first)
    if answer is None and _is_pair(values):
        raise RowError(PAIR)
    if answer is None:
        raise RowError(f"no answer in the columns {_listed(values)}")
    if _is_turns(values[answer]):
        return turns_of(values[answer], answer)
    return [Message("assistant", needed_text(values, answer))]


def _chosen(values: Mapping[str, Any], names: Sequence[str], first: Sequence[str]) -> str | None:
    """Return the first of the names that has contents, else the first that exists at all."""
    there = sorted((name for name in names if name in values), key=lambda name: name not in first)
    return next((name for name in there if not _is_absent(values[name])), there[0] if there else None)


def _is_absent(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def _kind(value: Any) -> str:
    kinds = {list: "a list", dict: "a mapping", bool: "a truth value", type(None): "missing", str: "a text"}
    return kinds.get(type(value), f"of type {type(value).__name__}")


def _listed(values: Mapping[str, Any]) -> str:
    return str(sorted(str(name) for name in values))
