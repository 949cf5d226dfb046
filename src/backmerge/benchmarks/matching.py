"""Metrics for a user's own prompts, by rule: a pattern, equal JSON, the last number.

Each has the values 0 and 1. Exact match and containment are in `backmerge.benchmarks.files`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from dataclasses import replace
from decimal import Decimal
from typing import Any, NamedTuple

from backmerge.benchmarks.protocol import Metric
from backmerge.errors import ConfigError, DataError
from backmerge.records import Example

FENCED = re.compile(r"```[\w+-]*[^\S\n]*\n?(.*?)(?:```|\Z)", re.DOTALL)
# not the 2 of "H2O"; a sign only if it is not a minus between numbers: "10-5" ends in 5, "x=-5" in -5. Commas every
# three digits belong to the number. At most four digits of exponent, so that no answer can produce a huge number.
NUMBER = re.compile(
    r"(?:(?<![\w.)])(?P<sign>[-+−])[$€£]?)?"
    r"(?<![^\W\d])(?<!\d)(?<!\d\.)(?P<value>(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,4}(?!\w))?)"
)


def pattern_match(pattern: str | None = None) -> Metric:
    r"""Return a metric that searches for a pattern (syntax of Python's `re`) anywhere in the answer.

    Without a group in it, the pattern alone decides: 1 if it is found. With one, the first group's text at the first
    match (as in lm-eval's filters) is compared with the reference, apart from white space at the ends and letter case.
    Without a pattern, each example's reference is its pattern.

    >>> from backmerge.records import Message
    >>> example = Example("a", (Message("user", "2 + 3?"),), "5")
    >>> pattern_match(r"the answer is (\d+)")(example, "So the answer is 5.")
    1.0

    The pattern is the user's own; endless backtracking is not stopped.

    Raises:
        ConfigError: the pattern is not a regular expression.
        DataError: when called, if an example's reference is used as a pattern and is not one.
    """
    given = None if pattern is None else _compiled(pattern)

    def metric(example: Example, answer: str) -> float:
        compiled = given or _compiled_reference(example)
        match = compiled.search(answer)
        if match is None or given is None or not compiled.groups:
            return float(match is not None)
        caught = (match[1] or "").strip().casefold()
        return float(caught == _reference(example).strip().casefold())

    return metric


def json_equal(example: Example, answer: str) -> float:
    """1 if answer and reference are JSON with the same content.

    The order of keys and white space do not matter; the order of lists does. 1 equals 1.0, but not true or "1". The
    answer is its first fenced block, if it has one, else the whole answer.

    Raises:
        DataError: the reference is not JSON.
    """
    try:
        expected = _same_if_equal(_loads(_reference(example)))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"the reference of example '{example.id}' is not JSON: {getattr(error, 'msg', error)}",
            remedy="score this file with another metric, or fix the reference.",
        ) from error
    fenced = FENCED.search(answer)
    try:
        return float(_same_if_equal(_loads(fenced[1] if fenced else answer)) == expected)
    except (ValueError, RecursionError):
        return 0.0


def final_number(example: Example, answer: str) -> float:
    """1 if the last number in the answer equals the last in the reference.

    Compared as decimals: 1,000.0 is 1000 (commas in groups of three are removed), 50 % is 50, not 0.5. As in GSM8K,
    where a reference ends in "#### 18".

    Raises:
        DataError: the reference has no number.
    """
    expected = _last_number(_reference(example))
    if expected is None:
        raise DataError(
            f"the reference of example '{example.id}' has no number",
            remedy="score this file with another metric, or fix the reference.",
        )
    return float(_last_number(answer) == expected)


def _last_number(text: str) -> Decimal | None:
    matches = list(NUMBER.finditer(text))
    if not matches:
        return None
    number = Decimal(matches[-1]["value"].replace(",", ""))
    return -number if matches[-1]["sign"] in {"-", "−"} else number


def _loads(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse)  # NaN and Infinity are not JSON


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _same_if_equal(value: Any) -> Hashable:
    """Return a JSON value in a form in which only equal JSON is equal: in Python, True equals 1."""
    if isinstance(value, dict):
        return ("object", frozenset((key, _same_if_equal(one)) for key, one in value.items()))
    if isinstance(value, list):
        return ("list", tuple(_same_if_equal(one) for one in value))
    if isinstance(value, bool):
        return ("word", value)
    return ("value", value)


def _compiled_reference(example: Example) -> re.Pattern[str]:
    try:
        return _compiled(_reference(example))
    except ConfigError as error:
        raise DataError(
            f"the reference of example '{example.id}' is not a pattern: {error.message}", remedy=error.remedy
        ) from error


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"not a regular expression, at character {error.pos}: {error.msg}",
            remedy="write a backslash before characters such as ( [ * + ? . to match them literally.",
        ) from error


def _reference(example: Example) -> str:
    return example.reference or ""


_MARK = re.compile(r"\banswer\b[\s*_]*(?:(?:is|would\s+be)\b[\s*_]*:?|:)[\s*_]*", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_OPTION = re.compile(r"\(?([a-z])(?:\)|[.:]?$)")
_AROUND = " \t*_`\"'$“”‘’"  # marks, quotes and signs of money or mathematics


class FinalAnswer(NamedTuple):
    """The final answer in a text.

    Attributes:
        text: In lower case, without the marks around it and the full stop.
        is_marked: Whether the text states that it is the answer.
    """

    text: str
    is_marked: bool


def final_answer(text: str) -> FinalAnswer:
    r"""Return the final answer in a text.

    >>> final_answer("Lift needs air. Thus, the answer is yes.")
    FinalAnswer(text='yes', is_marked=True)
    >>> final_answer("48 + 24 = 72\n72 clips")
    FinalAnswer(text='72 clips', is_marked=False)
    """
    marks = list(_MARK.finditer(text))
    rest = text[marks[-1].end() :] if marks else ""
    lines = [line for line in (rest if marks else text).splitlines() if line.strip()]
    line = "" if not lines else lines[0] if marks else lines[-1]
    boxed = _BOXED.findall(line)
    return FinalAnswer(_bare(boxed[-1] if boxed else line), bool(marks or boxed))


def is_final_answer(example: Example, answer: str) -> float:
    """1 if the final answer equals the reference's.

    Numbers are compared as numbers ("1,000" is "1000.0"), options by their letter ("C" is "(C) 1120"), other texts
    ignoring letter case; text after the answer's comma or full stop does not count.
    """
    expected, found = final_answer(example.reference or "").text, final_answer(answer)
    if not expected or not answer.strip():
        return 0.0
    number = NUMBER.fullmatch(expected.rstrip("% "))
    if number is not None:
        return final_number(
            replace(example, reference=expected), _up_to_number(found.text) if found.is_marked else answer
        )
    option = _OPTION.fullmatch(expected)
    if option is not None:
        chosen = _OPTION.match(found.text)
        return float(chosen is not None and chosen[1] == option[1])
    if not found.text.startswith(expected):
        return 0.0
    after = found.text[len(expected) :]
    return float(not after or (after[0] in ".,;:!?" and not after[1:2].isalnum()))


def _up_to_number(text: str) -> str:
    """Return the beginning of a text up to the first number of its result: "5 x 3 = 15 (of 20)" becomes "15"."""
    result = text.rpartition("=")[2]
    first = NUMBER.search(result)
    return text if first is None else result[: first.end()]


def _bare(text: str) -> str:
    """Return a text in lower case, without marks around the answer."""
    bare = text.strip(_AROUND).rstrip(".").strip(_AROUND)
    return re.sub(r"\s+", " ", bare).casefold()
