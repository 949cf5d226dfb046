"""Calls of a function in another process: what comes back is what the function gave, or an error."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict, namedtuple
from typing import Any

import pytest

from backmerge.sandbox import Limits, make_sandbox
from backmerge.sandbox.remote_call import decode, encode

Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -1, 10**400, 0.1, -0.0, math.inf, "λ\ud800", b"\xff", 1 + 2j, [], (1, [2]), {1, "a"},
        frozenset([(1, 2)]), {(1, 2): [None], "k": {"d": 1.5}}, [1, 1.0, True],
    ],
)  # fmt: skip
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    """Of the same type, all the way down, and equal."""
    found = decode(encode(value))
    assert repr(found) == repr(value)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=1), {"a": 1}),
        (defaultdict(int, b=2), {"b": 2}),
        (Point(1, 2), (1, 2)),
        (bytearray(b"x"), b"x"),
    ],
)
def test_subclasses_are_returned_as_their_base_class(value: Any, plain: Any) -> None:
    """They equal the plain value, and nothing of theirs comes along."""
    found = decode(encode(value))
    assert found == plain
    assert type(found) is type(plain)


@pytest.mark.parametrize("value", [object(), iter([]), range(3), print, [object()]])
def test_other_objects_are_not_sent(value: Any) -> None:
    """They have no plain value."""
    with pytest.raises(TypeError, match="cannot be sent"):
        encode(value)


def test_what_a_function_raises_is_raised_by_the_tests() -> None:
    """By the name of the built-in exception, so that a test may expect it."""
    made = make_sandbox(allow_code_execution=True)
    candidate = "def half(n):\n    if n % 2: raise ValueError(n)\n    return n // 2\n"
    tests = "assert half(4) == 2\ntry:\n    half(3)\n    assert False\nexcept ValueError: pass\n"
    assert made.check(candidate, "half", tests).status == "ok"
    assert made.check(candidate, "half", "half(3)").status == "failed"
    assert made.check("half = 3", "half", "half(2)").status == "failed"
    assert made.check("def broken(:", "half", "half(2)", Limits(wall_seconds=5)).status == "failed"


def test_a_candidate_that_hangs_is_stopped_with_the_tests() -> None:
    """Whether it never answers, or lives on after the tests have failed."""
    made = make_sandbox(allow_code_execution=True)
    hanging = "def f():\n    while True: pass\n"
    assert made.check(hanging, "f", "f()", Limits(wall_seconds=2)).status == "timed out"
    outcome = made.check("import time\ntime.sleep(30)\ndef f(): pass\n", "f", "assert False", Limits(wall_seconds=20))
    assert outcome.status == "failed"
    assert outcome.seconds < 10
