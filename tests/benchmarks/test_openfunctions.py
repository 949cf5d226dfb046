"""OpenFunctions: the prompt, the rows of test and training set, and the real file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from backmerge.benchmarks.function_calls import calls_in
from backmerge.benchmarks.openfunctions import (
    call_match,
    function_prompt,
    openfunctions_examples,
    parameter_names,
)
from backmerge.errors import DataError
from backmerge.records import Example, Message, lines_of
from backmerge.rows import sound_rows

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "openfunctions" / "gorilla_openfunctions_v1_test.json"

SPECIFICATION = {
    "name": "Kites",
    "api_call": "kite.fly",
    "parameters": {"type": "object", "properties": {"height": {"type": "integer"}, "café": {"type": "string"}}},
}
ROW = {"question": " Fly it at 20 m. ", "function": SPECIFICATION, "model_answer": "kite.fly(height=20)"}


def written(path: Path, content: Any) -> Path:
    """A JSON file."""
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_the_prompt_by_hand() -> None:
    """Question, line, and a list of the specifications with their keys in order and their letters as they are."""
    listed = (
        '[{"name": "Kites", "api_call": "kite.fly", "parameters": {"type": "object", '
        '"properties": {"height": {"type": "integer"}, "café": {"type": "string"}}}}]'
    )
    expected = f"Fly it at 20 m.\nYou may call these functions:\n{listed}"
    as_json, as_python = json.dumps(SPECIFICATION), repr(SPECIFICATION) + "\n"
    for functions in (
        SPECIFICATION, [SPECIFICATION], as_json, as_python, [as_json], [as_python], json.dumps([SPECIFICATION]),
    ):  # fmt: skip
        assert function_prompt(" Fly it at 20 m.\n", functions) == expected


@pytest.mark.parametrize("text", ["no specification", "{'a': }", "{[]: 1}", "(" * 5000, "3", "{'a': {1, 2}}", r"'\d'"])
def test_a_specification_that_is_a_text(text: str) -> None:
    """What is neither JSON nor a Python literal of a mapping stays as it is."""
    assert json.loads(function_prompt("?", [text]).splitlines()[-1]) == [text]


def test_an_unknown_escape_in_a_specification() -> None:
    """Python warns of it, and that is not a fault of the data."""
    assert json.loads(function_prompt("?", r"{'a': '\d'}").splitlines()[-1]) == [{"a": "\\d"}]


@pytest.mark.parametrize(
    ("functions", "expected"),
    [
        (SPECIFICATION, {"kite.fly": ["height", "café"]}),
        ([{"api_name": "a.b", "parameters": [{"name": "x"}, {"name": "y"}]}], {"a.b": ["x", "y"]}),
        ([{"name": "f", "parameters": {"properties": {}}}, {"name": "g"}, "h", 3], {"f": []}),
        (repr(SPECIFICATION), {"kite.fly": ["height", "café"]}),
        ([{"name": "f", "parameters": {"required": [{"name": "x"}]}}], {}),
    ],
)
def test_names_of_parameters(functions: Any, expected: dict[str, list[str]]) -> None:
    """From JSON Schema and from lists; other forms give none."""
    assert parameter_names(functions) == expected


def test_rows_by_hand(tmp_path: Path) -> None:
    """A list, or lines; several right answers; calls to be made together, in the training set's columns."""
    more = ROW | {"model_answer": ["kite.fly(height=20)", "kite.fly(height=20, café='x')"]}
    training = {"Instruction": "Two.", "Functions": [repr(SPECIFICATION)], "Output": ["kite.fly()", "kite.fly()\n"]}
    as_list = openfunctions_examples(written(tmp_path / "a.json", [ROW, more, training]))
    lines = "".join(json.dumps(row) + "\n\n" for row in (ROW, more, training))
    assert openfunctions_examples(written(tmp_path / "b.jsonl", lines)) == as_list
    first, second, third = as_list
    assert first == Example(
        "openfunctions-0",
        (Message("user", function_prompt("Fly it at 20 m.", SPECIFICATION)),),
        "kite.fly(height=20)",
        facts={"references": '["kite.fly(height=20)"]', "parameters": '{"kite.fly": ["height", "café"]}'},
    )
    assert second.reference == first.reference
    assert json.loads(second.facts["references"]) == more["model_answer"]
    assert third.reference == "kite.fly()\nkite.fly()"
    assert [call_match(second, answer) for answer in ("kite.fly(20, 'x')", "kite.fly(20)", "kite.fly(21)")] == [1, 1, 0]
    assert [call_match(third, answer) for answer in ("kite.fly()", "kite.fly(), kite.fly()")] == [0, 1]
    lines_of(as_list).encode()


def test_call_match_without_facts() -> None:
    """An example of a user's own file is scored by its reference alone."""
    one = Example("a", (Message("user", "?"),), "f(a=1)")
    assert (call_match(one, "f(a=1.0)"), call_match(one, "f(1)")) == (1, 0)


FAULTS: dict[str, tuple[Any, str]] = {
    "no question": ([ROW, ROW | {"question": " "}], r"row 2 \(line 1\): nothing in 'question'"),
    "question no text": ([ROW | {"question": 3}], r"row 1 \(line 1\): the question is not a text"),
    "no functions": ([{"question": "a", "model_answer": "b"}], r"row 1 \(line 1\): nothing in 'function'; .*answer"),
    "empty functions": ([ROW | {"function": []}], "nothing in 'function'"),
    "no answer": ([ROW | {"model_answer": None}], "nothing in 'model_answer'"),
    "an empty answer": ([ROW | {"model_answer": ["f()", ""]}], "an answer is empty"),
    "an answer no text": ([ROW | {"model_answer": {"f": 1}}], "an answer is empty, or not a text"),
    "no object": ([ROW, 3], r"row 2 \(line 1\): not a JSON object"),
    "line no object": ('{"a": 1}\n3\n', "nothing in 'question'|line 2: not a JSON object"),
    "torn list": ("[{", "not JSON"),
    "torn line": (json.dumps(ROW) + "\n{", "line 2: not JSON"),
    "too deep": ("[" * 200_000, "not JSON"),
    "empty": ("", "contains no rows"),
    "empty list": ("[]", "contains no rows"),
    "surrogate": ([ROW | {"question": "a\ud83d"}], r"row 1 \(line 1\): a text contains half of a surrogate pair"),
}


@pytest.mark.parametrize(("content", "words"), FAULTS.values(), ids=FAULTS.keys())
def test_what_cannot_be_read_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    """Each fault is an error that names file and row, and what to do."""
    path = written(tmp_path / "rows.json", content)
    with pytest.raises(DataError, match=words) as caught:
        openfunctions_examples(path)
    assert "rows.json" in caught.value.message
    assert caught.value.remedy


def test_files_that_are_not_there(tmp_path: Path) -> None:
    """Without a file the message says where the test set is; bytes that are not UTF-8 are refused."""
    with pytest.raises(DataError, match="no file was given") as caught:
        openfunctions_examples(None)
    assert "gorilla_openfunctions_v1_test.json" in str(caught.value)
    (tmp_path / "latin.json").write_bytes(b'[{"question": "caf\xe9"}]')
    for path in (tmp_path / "absent.json", tmp_path / "latin.json", tmp_path):
        with pytest.raises(DataError, match=r"cannot read|not UTF-8"):
            openfunctions_examples(path)


def test_separators_within_a_line(tmp_path: Path) -> None:
    """A line ends at a line break alone: JSON allows other separators within a text."""
    path = written(tmp_path / "a.jsonl", json.dumps({"a": "x\u2028y\u0085z"}, ensure_ascii=False) + "\r\n")
    assert [row.values for row in sound_rows(path)] == [{"a": "x\u2028y\u0085z"}]


@pytest.mark.skipif(not REAL.is_file(), reason="OpenFunctions is not in ../shared/data")
def test_the_real_test_set() -> None:
    """All 112 right answers are one readable call of the function given, right for themselves and no other row's."""
    examples = openfunctions_examples(REAL)
    assert len(examples) == len({one.id for one in examples}) == 112
    for one in examples:
        (call,) = calls_in(one.reference or "")
        assert call.name in one.messages[-1].content
        assert call_match(one, f"Sure:\n```python\n{one.reference}\n```") == 1
    right = Counter(
        (one.id, other.id) for one in examples for other in examples if call_match(one, other.reference or "")
    )
    # two rows ask for the same rate of exchange
    assert len(right) == 112 + 2
    assert ("openfunctions-25", "openfunctions-31") in right
