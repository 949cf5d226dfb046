"""Records: what is written reads back, and what was torn is found with its line."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge.errors import DataError
from backmerge.records import Completion, Example, Message, Score, Verdict, from_dict, lines_of, read_lines, to_json

# anything that a model may write, line separators and NUL included, but for halves of surrogate pairs
TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from('\n\r\x85\u2028\u2029\0\x1b"\\')))
RATES = st.floats(0, 1)
FLAGS = st.sampled_from([True, False, None])
KINDS: dict[Any, st.SearchStrategy[Any]] = {
    Example: st.builds(
        Example,
        TEXT,
        st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), TEXT), min_size=1).map(tuple),
        st.none() | TEXT,
        st.none() | TEXT,
        st.none() | TEXT,
        st.dictionaries(TEXT, TEXT, max_size=3),
    ),
    Completion: st.builds(Completion, TEXT, TEXT, TEXT, st.integers(0, 10**6), st.booleans()),
    Verdict: st.builds(Verdict, TEXT, FLAGS, FLAGS, TEXT),
    Score: st.builds(
        Score, TEXT, TEXT, TEXT, TEXT, st.none() | RATES, RATES, st.integers(0), RATES, RATES, RATES, st.integers(0),
        RATES, RATES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_records_read_back(kind: Any, tmp_path: Path) -> None:
    """Every kind of record comes back from its file equal, whatever its texts hold; one line each."""

    @given(records=st.lists(KINDS[kind], max_size=4))
    def check(records: list[Any]) -> None:
        text = lines_of(records)
        assert text.count("\n") == len(records)
        (tmp_path / "records.jsonl").write_bytes(text.encode())
        assert list(read_lines(kind, tmp_path / "records.jsonl")) == records

    check()


def test_keys_keep_their_order() -> None:
    """A verdict's line by hand."""
    line = '{"example":"a-1","harmful":null,"refusal":false,"reason":"λ","sample":0}'
    assert to_json(Verdict("a-1", None, False, "λ")) == line


def test_unknown_keys_are_passed_over() -> None:
    """A record of a newer version is read by what is known of it."""
    assert from_dict(Verdict, {"example": "a", "harmful": True, "refusal": False, "mood": 1}) == Verdict(
        "a", True, False
    )


WHOLE = to_json(Completion("a-1", "prompt", "kites: 凧 and ağaç", 3, finished=True)).encode()


@pytest.mark.parametrize("length", range(1, len(WHOLE)))
def test_a_torn_line_is_found(tmp_path: Path, length: int) -> None:
    """Cut anywhere, also within a character, the line is named, and the one before it was read."""
    path = tmp_path / "records.jsonl"
    path.write_bytes(WHOLE + b"\n" + WHOLE[:length])
    records = read_lines(Completion, path)
    assert next(records).example == "a-1"
    with pytest.raises(DataError, match=r"records\.jsonl, line 2: not a completion record") as caught:
        next(records)
    assert caught.value.remedy


@pytest.mark.parametrize("line", ["null", "[]", "3", '"x"', "{}", "", "{", '{"example": "a"}'])
def test_invalid_records_are_refused(tmp_path: Path, line: str) -> None:
    """JSON of another form, a record that lacks a field, and an empty line are errors with their line."""
    (tmp_path / "records.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match="line 1: not a completion record"):
        list(read_lines(Completion, tmp_path / "records.jsonl"))


def test_an_example_needs_its_messages(tmp_path: Path) -> None:
    """An example whose messages are of another form is refused, too."""
    for messages in ("null", '["hello"]', '[{"role": "user"}]', '[{"role": "user", "content": "x", "mood": "y"}]'):
        (tmp_path / "e.jsonl").write_text(f'{{"id": "a", "messages": {messages}}}\n')
        with pytest.raises(DataError, match="line 1: not a example record"):
            list(read_lines(Example, tmp_path / "e.jsonl"))


def test_the_prompt_is_the_last_turn() -> None:
    """Of a conversation, the user's last message."""
    turns = (Message("user", "one"), Message("assistant", "two"), Message("user", "three"))
    assert Example("a", turns).prompt == "three"
