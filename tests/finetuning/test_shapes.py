"""Rows in the shapes that people have become conversations with an answer, or say what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from backmerge.finetuning.shapes import Draft, RowError, recognised, renamed
from backmerge.records import Message

USER, ANSWER = Message("user", "Hi"), Message("assistant", "Ho")
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]

SAME: Mapping[str, Mapping[str, Any]] = {
    "messages": {"messages": TURNS},
    "messages as JSON": {"messages": json.dumps(TURNS)},
    "messages beside a prompt": {"prompt": "other", "messages": TURNS},
    "conversations": {"conversations": SHAREGPT},
    "conversations with roles": {"conversations": TURNS},
    "ShareGPT's turns as messages": {"messages": SHAREGPT},
    "prompt and completion": {"prompt": "Hi", "completion": "Ho"},
    "prompt and response": {"prompt": "Hi", "response": "Ho"},
    "prompt and answer": {"prompt": "Hi", "answer": "Ho"},
    "turns as trl has them": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "turns and a text": {"prompt": TURNS[:1], "completion": "Ho"},
    "Alpaca without input": {"instruction": "Hi", "input": "", "output": "Ho"},
    "Alpaca without the column": {"instruction": "Hi", "output": "Ho"},
    "question and answer": {"question": "Hi", "answer": "Ho"},
    "columns that are empty": {"messages": None, "prompt": float("nan"), "question": "Hi", "answer": "Ho"},
    "a blank system": {"system": " ", "prompt": "Hi", "completion": "Ho"},
    "a blank system's turn": {"messages": [{"role": "system", "content": ""}, *TURNS]},
    "a system's turn of nothing": {"messages": [{"role": "system", "content": None}, *TURNS]},
    "more than is asked for": {"id": 7, "prompt": "Hi", "completion": "Ho", "tags": ["x"], "weight": 0.5},
}


@pytest.mark.parametrize("values", SAME.values(), ids=SAME.keys())
def test_one_conversation_in_many_shapes(values: Mapping[str, Any]) -> None:
    """Each shape gives the same user's turn and the same answer."""
    assert recognised(values) == Draft((USER,), "Ho")


def test_alpacas_join() -> None:
    """Instruction, a blank line, input."""
    values = {"instruction": "Put into French.", "input": "kite", "output": "cerf-volant"}
    assert recognised(values) == Draft((Message("user", "Put into French.\n\nkite"),), "cerf-volant")


def test_texts_are_kept_as_they_are() -> None:
    """White space at the ends stays, and numbers become texts."""
    assert recognised({"prompt": "2 + 3?\n", "completion": " 5 "}) == Draft((Message("user", "2 + 3?\n"),), " 5 ")
    assert recognised({"question": 2, "answer": 0.5}) == Draft((Message("user", "2"),), "0.5")


def test_a_longer_conversation() -> None:
    """Earlier answers stay in the conversation; the last is the one to learn; the system's turn is the first."""
    turns = [{"role": "system", "content": "Be brief."}, *TURNS, {"role": "user", "content": "So?"}, TURNS[1]]
    expected = (Message("system", "Be brief."), USER, ANSWER, Message("user", "So?"))
    assert recognised({"messages": turns}) == Draft(expected, "Ho")


@pytest.mark.parametrize("values", [SAME["messages"], SAME["question and answer"], SAME["turns as trl has them"]])
def test_a_system_column(values: Mapping[str, Any]) -> None:
    """It stands in front, unless the conversation has a system's turn of its own."""
    assert recognised({**values, "system": "Be brief."}).messages == (Message("system", "Be brief."), USER)
    own = {"messages": [{"role": "system", "content": "Own."}, *TURNS], "system": "Be brief."}
    assert recognised(own).messages == (Message("system", "Own."), USER)


def test_mapped_columns_come_first() -> None:
    """A column that the user names is taken, whatever known columns the row has next to it."""
    values = {"messages": SHAREGPT, "answer": "No.", "query": "Why?", "reply": "So."}
    columns = {"prompt": "query", "completion": "reply"}
    assert recognised(renamed(values, columns), tuple(columns)) == Draft((Message("user", "Why?"),), "So.")
    columns = {"prompt": "query", "answer": "reply"}
    values |= {"completion": "No."}
    assert recognised(renamed(values, columns), tuple(columns)).reference == "So."
    with pytest.raises(RowError, match="no column 'qeury' among"):
        renamed(values, {"prompt": "qeury"})


BAD: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "no known column": ({"text": "a"}, r"no prompt in the columns \['text'\]"),
    "no answer": ({"prompt": "a"}, r"no answer in the columns \['prompt'\]"),
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference pair"),
    "blank prompt": ({"prompt": " \t", "completion": "b"}, "'prompt' is empty"),
    "null prompt": ({"prompt": None, "completion": "b"}, "'prompt' is empty"),
    "blank answer": ({"prompt": "a", "completion": "\n"}, "'completion' is empty"),
    "missing number": ({"prompt": "a", "completion": float("nan")}, "'completion' is empty"),
    "empty turn": ({"messages": [TURNS[0], {"role": "assistant", "content": ""}]}, "the answer is empty"),
    "empty user's turn": ({"messages": [{"role": "user", "content": " "}, TURNS[1]]}, r"1 \(the user's\) is empty"),
    "no user turn": ({"messages": TURNS[1:]}, "no user turn"),
    "no turns": ({"messages": []}, "no user turn"),
    "ends with the user": ({"messages": [*TURNS, TURNS[0]]}, "the last turn is the user's"),
    "two answers": ({"messages": [*TURNS, TURNS[1]]}, "before the last answer is the assistant's, not the user's"),
    "a system's turn within": ({"messages": [TURNS[0], {"role": "system", "content": "x"}, *TURNS]}, "turn 2 is the"),
    "another role": ({"messages": [{"role": "tool", "content": "x"}, *TURNS]}, "turn 1: the role is 'tool', not"),
    "no role": ({"messages": [{"content": "x"}, *TURNS]}, "turn 1: the role is missing"),
    "a list as role": ({"messages": [{"role": [1], "content": "x"}]}, "turn 1: the role is a list"),
    "parts as content": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "turn 1' is a list, not"),
    "a list of texts": ({"messages": ["Hi", "Ho"]}, "'messages' is a list, not a list of turns"),
    "messages as a text": ({"messages": "Hi"}, "'messages' is a text, but not turns"),
    "messages as a mapping": ({"messages": {"role": "user"}}, "'messages' is a mapping, not a list of turns"),
    "a list as prompt": ({"prompt": ["a"], "completion": "b"}, "'prompt' is a list, not a text"),
    "turns as instruction": ({"instruction": TURNS, "output": "b"}, "'instruction' is a list, not a text"),
    "a list as answer": ({"question": "a", "answer": ["b", "c"]}, "'answer' is a list, not a text"),
    "a mapping as answer": ({"question": "a", "answer": {"text": "b"}}, "'answer' is a mapping, not a text"),
    "a truth value": ({"question": "a", "answer": True}, "'answer' is a truth value, not a text"),
    "a list as system": ({"system": [], "question": "a", "answer": "b"}, "'system' is a list, not a text"),
    "half a surrogate pair": ({"prompt": "a\ud83d", "completion": "b"}, "'prompt' contains half of a surrogate pair"),
    "half a pair in a turn": ({"messages": [TURNS[0], {"role": "assistant", "content": "\udc00"}]}, "2' contains half"),
}  # fmt: skip


@pytest.mark.parametrize(("values", "words"), BAD.values(), ids=BAD.keys())
def test_rows_that_cannot_be_trained_on_name_the_reason(values: Mapping[str, Any], words: str) -> None:
    """Each fault is named by its column or turn."""
    with pytest.raises(RowError, match=words):
        recognised(values)


def test_reasons_show_no_text() -> None:
    """Columns are named, never what is in them, since it may be harmful."""
    for values, _ in BAD.values():
        marked = json.loads(json.dumps(values).replace('"a"', '"SECRET"').replace('"Hi"', '"SECRET"'))
        with pytest.raises(RowError) as caught:
            recognised(marked)
        assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "is_empty"),
    [
        (BAD["blank prompt"][0], True),
        (BAD["missing number"][0], True),
        (BAD["empty turn"][0], True),
        (BAD["no answer"][0], False),
        (BAD["a list as answer"][0], False),
        (BAD["no user turn"][0], False),
    ],
)
def test_blank_texts_are_distinguished_from_other_faults(values: Mapping[str, Any], is_empty: bool) -> None:
    """A blank is a flaw of published data; a missing column is a misunderstanding."""
    with pytest.raises(RowError) as caught:
        recognised(values)
    assert caught.value.is_empty == is_empty


ASKED, TOLD = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "kite"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [ASKED, {**TOLD, "weight": 0}, ASKED, TOLD]}, "'weight' is 0"),
        ({"messages": [ASKED, {**TOLD, "train": False}]}, "'train' is False"),
        ({"messages": [ASKED, {**TOLD, "loss_weight": 0.5}]}, "'loss_weight' is 0.5"),
        ({"prompt": "hi", "completion": "kite", "label": False}, "undesired"),
        ({"prompt": "hi", "completion": "kite", "label": 0}, "undesired"),
        ({"prompt": "hi", "completion": "kite", "weight": 0}, "'weight' is 0"),
        ({"prompt": "hi", "completion": "kite", "tools": [{}]}, "has tools"),
        ({"prompt": "hi", "completion": "kite", "rejected": "lamp"}, "'rejected'"),
        ({"messages": [ASKED, {**TOLD, "train_detail": [{}]}]}, "'train_detail'"),
        ({"prompt": "hi", "chosen": "kite", "rejected": "lamp"}, "preference pair"),
        ({"chosen": [ASKED, TOLD], "rejected": [ASKED, TOLD]}, "preference pair"),
        ({"messages": [ASKED, {**TOLD, "tool_calls": [{"id": 1}]}]}, "'tool_calls'"),
        (
            {"messages": [ASKED, {"role": "assistant", "content": None, "function_call": {"name": "f"}}]},
            "function_call",
        ),
        ({"conversations": [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "hi"}, TOLD]}, "begins with"),
        ({"messages": [{"role": "system", "content": "s"}, TOLD, ASKED, TOLD]}, "begins with"),
    ],
)
def test_rows_marked_as_not_to_train_on_are_refused(row: dict[str, Any], words: str) -> None:
    """Marks of turns and rows are never dropped: the row is refused with what its field means."""
    with pytest.raises(RowError, match=words):
        recognised(row)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{**ASKED, "weight": 0}, {**TOLD, "weight": 1}]},
        {"prompt": "hi", "completion": "kite", "label": True},
        {"prompt": "hi", "completion": "kite", "chosen": "kite", "rejected": "lamp"},
    ],
)
def test_only_answers_are_trained_on(row: dict[str, Any]) -> None:
    """A user's weight changes nothing, a desired answer is one, and a named column settles a pair."""
    assert recognised(row).reference == "kite"
