"""Metrics by rule on a user's own prompts, by hand and by laws."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge.benchmarks.matching import final_number, json_equal, pattern_match
from backmerge.errors import ConfigError, DataError
from backmerge.records import Example, Message

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def example(reference: str | None) -> Example:
    """With that reference."""
    return Example("mine-3", (Message("user", "?"),), reference)


@given(JSON, st.integers(0, 4), st.booleans())
def test_json_in_any_form(value: object, indent: int, is_fenced: bool) -> None:
    """Order of keys, white space, escapes and a fence do not count; a value put in a list does."""
    text = json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False)
    answer = f"It is:\n```json\n{text}\n```\nAnything else?" if is_fenced and "```" not in text else f"\n {text} "
    assert json_equal(example(json.dumps(value)), answer) == 1
    assert json_equal(example(json.dumps([value])), answer) == 0


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ('{"a": 1, "b": [1, 2]}', '{"b":[1,2],"a":1.0}', 1),
        ('{"a": 1, "b": [1, 2]}', '{"b":[2,1],"a":1}', 0),
        ('{"a": 1}', '{"a": true}', 0),
        ('{"a": 0}', '{"a": false}', 0),
        ("[1]", "[true]", 0),
        ('{"a": 1}', '{"a": "1"}', 0),
        ('{"a": null}', "{}", 0),
        ('{"a": 1}', '{"a": 1, "b": 2}', 0),
        ('{"a": 1}', "```\n{'a': 1}\n```", 0),
        ('{"a": 1}', '```json\n{"a": 1}\n```\n```json\n{"a": 2}\n```', 1),
        ('{"a": 1}', '```json\n{"a": 1}', 1),
        ('{"a": 1}', '{"a": 1} is it', 0),
        ('{"a": 1}', "", 0),
        ('{"a": 1}', "[" * 100_000, 0),
        ('{"a": 1}', '{"a": NaN}', 0),
        ('"x"', "x", 0),
        ("12", " 12\n", 1),
    ],
)
def test_json_by_hand(reference: str, answer: str, expected: float) -> None:
    """What JSON holds for equal is equal; an answer that is none is wrong."""
    assert json_equal(example(reference), answer) == expected


@pytest.mark.parametrize("reference", ["{'a': 1}", "", None, "NaN", "9" * 5000])
def test_reference_that_is_not_json_is_refused(reference: str | None) -> None:
    """It is an error that names the example, not a wrong answer."""
    with pytest.raises(DataError, match="'mine-3' is not JSON") as caught:
        json_equal(example(reference), "{}")
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("5 + 3 = 8.", "8"),
        ("It is $1,234,567.50 in all.", "1234567.5"),
        ("1,000.0", "1000"),
        ("3,5", "5"),
        ("1,2345", "2345"),
        ("from 10-5", "5"),
        ("x=-5", "-5"),
        ("(3)-4", "4"),
        ("−7 degrees", "-7"),
        ("-$20", "-20"),
        ("+4", "4"),
        ("5 - 3", "3"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("50%", "50"),
        ("1e3", "1000"),
        ("2.5e-3 m", "0.0025"),
        ("9 of H2O in v1.2.3", "9"),
        ("5km and the 3rd", "3"),
        ("12:30", "30"),
        ("**42**", "42"),
        ("\\boxed{42}", "42"),
        ("1e9999", "1e9999"),
    ],
)
def test_numbers_by_hand(text: str, number: str) -> None:
    """The last number counts, whatever its dress."""
    assert final_number(example(number), text) == 1
    assert final_number(example(text), number) == 1
    assert final_number(example(number + "1"), text) == 0


def test_no_number() -> None:
    """In the answer it is wrong; in the reference, an error that names the example."""
    assert final_number(example("5"), "five") == 0
    assert final_number(example("5"), "") == 0
    for reference in ("five", "", None, "H2O"):
        with pytest.raises(DataError, match="'mine-3' has no number"):
            final_number(example(reference), "5")


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_any_number(number: object) -> None:
    """With commas in threes or without, at the end of a sentence or alone."""
    for text in (f"{number:,}", f"{number:f}", f"First 3, then {number}."):
        assert final_number(example(str(number)), text) == 1


@pytest.mark.parametrize(
    ("pattern", "reference", "answer", "expected"),
    [
        (r"the answer is (\w+)", "Paris", "So the answer is paris.", 1),
        (r"the answer is (\w+)", "Paris", "So the answer is PARIS.", 1),
        (r"the answer is (\w+)", "Paris", "So the answer is Rome.", 0),
        (r"the answer is (\w+)", "Paris", "Paris", 0),
        (r"the answer is (\w+)", "Paris", "the answer is Rome, no: the answer is Paris", 0),
        (r"(?i)\bparis\b", None, "It is PARIS.", 1),
        (r"(?i)\bparis\b", None, "comparison", 0),
        (r"a(b)?", "b", "a", 0),
        (None, r"^\d+$", "15", 1),
        (None, r"^\d+$", "15 kites", 0),
        (None, r"(a)b", "ab", 1),
    ],
)
def test_patterns_by_hand(pattern: str | None, reference: str | None, answer: str, expected: float) -> None:
    """Found or not; caught and equal to the reference; or the reference itself as the pattern."""
    assert pattern_match(pattern)(example(reference), answer) == expected


def test_invalid_patterns_are_refused() -> None:
    """A wrong pattern is found before any answer is; a wrong reference names its example."""
    with pytest.raises(ConfigError, match="at character 0: missing"):
        pattern_match("(")
    with pytest.raises(DataError, match="'mine-3' is not a pattern"):
        pattern_match()(example("(a"), "a")
