"""Whether an answer makes the right call: by laws, by a table of answers, and on hostile text."""

from __future__ import annotations

import time
from keyword import iskeyword
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge.benchmarks.function_calls import calls_in, is_right_call, standardized

REFERENCE = 'coffee_shop.find_nearby(location="San Francisco, CA", amenities=["Wi-Fi"], limit=2)'
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True).filter(lambda name: not iskeyword(name))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def written(name: str, arguments: list[tuple[str, object]]) -> str:
    """A call as Python writes it."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments)})"


@given(NAMES, st.dictionaries(NAMES, VALUES, min_size=1, max_size=4), st.randoms())
def test_laws(name: str, arguments: dict[str, object], random: Random) -> None:
    """A call is right for itself, in any order of arguments; not with one less, one more, or another name."""
    items = list(arguments.items())
    reference = written(f"api.{name}", items)
    assert len(calls_in(reference)) == 1
    assert is_right_call(reference, [reference])
    random.shuffle(items)
    assert is_right_call(written(f"api.{name}", items), [reference])
    assert not is_right_call(written(f"api.{name}", items[1:]), [reference])
    assert not is_right_call(written(f"api.{name}", [*items, ("Another", 1)]), [reference])
    assert not is_right_call(written(f"api2.{name}", items), [reference])
    assert not is_right_call(written(name, items), [reference])


@given(st.text(max_size=80), st.sampled_from(["", "f(", "f(a=", "api.f(x='", '"', "```", "\\", "\0", "\ud800"]))
def test_any_text_is_read_and_none_is_run(text: str, start: str) -> None:
    """Whatever a model writes is right or wrong, never an error."""
    assert is_right_call(start + text, [REFERENCE]) in {True, False}
    assert is_right_call(REFERENCE, [start + text]) in {True, False}


RIGHT = {
    "as it is": REFERENCE,
    "other order": 'coffee_shop.find_nearby(limit=2, amenities=["Wi-Fi"], location="San Francisco, CA")',
    "other quotes and spaces": "coffee_shop.find_nearby( location = 'San Francisco, CA',amenities=['Wi-Fi'],limit=2 )",
    "lines": 'coffee_shop.find_nearby(\n    location="San Francisco, CA",\n    amenities=["Wi-Fi"],\n    limit=2,\n)',
    "fenced": f"```python\n{REFERENCE}\n```",
    "fenced without a language": f"Here it is:\n```\n{REFERENCE}\n```\nShall I go on (or not)?",
    "fence left open": f"```python\n{REFERENCE}",
    "the first fence": f"```\n{REFERENCE}\n```\nor\n```\ncoffee_shop.find_nearby()\n```",
    "a fence without a call": f"```json\n{{}}\n```\n{REFERENCE}",
    "in ticks": f"Use `{REFERENCE}`.",
    "after a mark": f"<<function>>{REFERENCE}",
    "in prose": f"I can find the coffee shop(s) near you (with Wi-Fi): {REFERENCE} finds them.",
    "assigned": f"result = {REFERENCE}",
    "assigned and printed": f"import coffee_shop\nresult = {REFERENCE}\nprint(result)",
    "in a list": f"[{REFERENCE}]",
    "letter case and punctuation": 'coffee_shop.find_nearby(location="san francisco ca", amenities=["wifi"], limit=2)',
    "a whole number as a float": REFERENCE.replace("2", "2.0"),
    "a tuple": REFERENCE.replace('["Wi-Fi"]', '("Wi-Fi",)'),
}

WRONG = {
    "empty": "",
    "prose": "I would find a coffee shop near San Francisco.",
    "other function": REFERENCE.replace("find_nearby", "find"),
    "letter case of the function": REFERENCE.replace("coffee_shop", "Coffee_Shop"),
    "without its module": REFERENCE.removeprefix("coffee_shop."),
    "other value": REFERENCE.replace("2", "3"),
    "a text for a number": REFERENCE.replace("2", '"2"'),
    "a number's negative": REFERENCE.replace("2", "-2"),
    "a value for a list of it": REFERENCE.replace('["Wi-Fi"]', '"Wi-Fi"'),
    "longer list": REFERENCE.replace('["Wi-Fi"]', '["Wi-Fi", "Bakery"]'),
    "argument missing": REFERENCE.replace(", limit=2", ""),
    "argument too many": REFERENCE.replace("limit=2", "limit=2, open=True"),
    "argument misnamed": REFERENCE.replace("limit", "max"),
    "argument twice": REFERENCE.replace("limit=2", "limit=2, limit=2"),
    "unpacked": 'coffee_shop.find_nearby(**{"location": "San Francisco, CA", "amenities": ["Wi-Fi"], "limit": 2})',
    "twice": f"{REFERENCE}\n{REFERENCE}",
    "another call too": f"{REFERENCE}\nweather.forecast(days=5)",
    "within another call": f"print({REFERENCE})",
    "cut off": REFERENCE[:-1],
    "cut off in a text": REFERENCE[:40],
    "by position": 'coffee_shop.find_nearby("San Francisco, CA", ["Wi-Fi"], 2)',
    "as JSON": '{"name": "coffee_shop.find_nearby", "arguments": {"location": "San Francisco, CA"}}',
}


@pytest.mark.parametrize("answer", RIGHT.values(), ids=RIGHT.keys())
def test_right_answers(answer: str) -> None:
    """Form does not count."""
    assert is_right_call(answer, [REFERENCE])


@pytest.mark.parametrize("answer", WRONG.values(), ids=WRONG.keys())
def test_wrong_answers(answer: str) -> None:
    """Content does."""
    assert not is_right_call(answer, [REFERENCE])


@pytest.mark.parametrize(
    ("answer", "reference", "is_right"),
    [
        ("f(a=True)", "f(a=true)", True),
        ("f(a=None)", "f(a=null)", True),
        ("f(a=True)", "f(a=1)", False),
        ("f(a=-True)", "f(a=-1)", False),
        ("f(a=False)", "f(a=0)", False),
        ("f(a=None)", 'f(a="None")', False),
        ('f(a="Berkeley")', "f(a=Berkeley)", True),
        ("f(a=-1.50)", "f(a=-1.5)", True),
        ("f(a=1e3)", "f(a=1000)", True),
        ('f(a={"x": 1, "y": [2]})', "f(a={'y': [2.0], 'x': 1})", True),
        ('f(a={"x": 1})', 'f(a={"x": 2})', False),
        ("f(a=[1, 2])", "f(a=[2, 1])", False),
        ("f(a=g(x=1, y=2))", "f(a=g(y=2, x=1))", True),
        ("f(a=g(x=1))", "f(a=g(x=2))", False),
        ("f(a=2 * 3)", "f(a=2*3)", True),
        ("f(a=6)", "f(a=2*3)", False),
        ("f(a=Color.RED)", "f(a=Color.RED)", True),
        ("f(a={**b})", "f(a={**b})", True),
        ("f(a={**b})", "f(a={**c})", False),
        ("f()", "f()", True),
        ("f(a=1)", "f()", False),
        ("f(a='June 15th')", "f(a='june-15th')", True),
        (r"f(a='\d')", r"f(a='\d')", True),
        ("g(x=1), f(a=1)", "f(a=1)\ng(x=1)", True),
        ("f(a=1)\nf(a=1)\nf(a=1)", "f(a=1), f(a=1)", False),
        ("```\nf(a=1)\nf(a=1)\n```", "f(a=1), f(a=1)", True),
        ("f(1, 2)", "f(1, 2)", True),
        ("f(2, 1)", "f(1, 2)", False),
        ("no call", "No-call", True),
        ("a call", "no call", False),
    ],
)
def test_values_by_hand(answer: str, reference: str, is_right: bool) -> None:
    """Literals by their value, other expressions by their source, several calls in any order."""
    assert is_right_call(answer, [reference]) == is_right
    assert is_right_call(reference, [answer]) == is_right


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the kite(s)",
        "f(x.y)",
        "f(*a)",
        "f(**a)",
        "f(a=1, a=2)",
        "f (a=1)",
        "f(a=1",
        "f(a b)",
        "x[0].f(a=1)",
        "2f(a=1)",
        "f(a='\0')",
        "f(a='\ud800')",
    ],
)
def test_text_without_a_call(text: str) -> None:
    """Prose, and calls whose arguments cannot be told."""
    assert calls_in(text) == []


def test_any_of_several_references() -> None:
    """One is enough; with none nothing is right."""
    assert is_right_call("f(a=2)", ["f(a=1)", "f(a=2)"])
    assert not is_right_call("f(a=3)", ["f(a=1)", "f(a=2)"])
    assert not is_right_call("f(a=3)", [])


def test_arguments_by_position() -> None:
    """They are named by the specification, where there is one."""
    parameters = {"api.f": ["a", "b"]}
    assert is_right_call("api.f(1, b=2)", ["api.f(a=1, b=2)"], parameters)
    assert is_right_call("api.f(1, 2)", ["api.f(1, b=2)"], parameters)
    assert not is_right_call("api.f(2, 1)", ["api.f(a=1, b=2)"], parameters)
    assert not is_right_call("api.f(1, a=1)", ["api.f(a=1)"], parameters)
    assert not is_right_call("api.f(1, 2, 3)", ["api.f(a=1, b=2)"], parameters)
    assert not is_right_call("api.f(1, 2)", ["api.f(a=1, b=2)"])
    assert not is_right_call("other.f(1, 2)", ["other.f(a=1, b=2)"], parameters)


def test_an_unknown_escape_is_read() -> None:
    """Python warns of it, and that is not a fault of the answer."""
    (call,) = calls_in(r"f(a='\d')")
    assert call.arguments == {("a", ("text", "\\d"))}


def test_the_leaderboards_rule_for_texts() -> None:
    """Its example, and what it costs: a point within a number that stands as a text is lost."""
    assert len({standardized(text) for text in ("April 1, 2024", "April 1,2024", "April 1 2024")}) == 1
    assert standardized("It's a^b_c*d/e-f.g") == 'it"sabcdefg'
    assert is_right_call("f(a='1.5')", ["f(a='15')"])


HOSTILE = {
    "calls": "f(" * 20_000,
    "lists": "f([" * 20_000,
    "quotes": "f(a='" * 5_000,
    "many": "f(a=1)" * 5_000,
    "brackets": "(" * 50_000,
    "digits": "f(a=" + "9" * 9_000 + ")",
    # just short enough to reach Python's parser, and too long for it
    "signs": "f(a=" + "-" * 5_000 + "1)",
    "attributes": "f(a=" + "x." * 4_000 + "y)",
    "sums": "f(a=" + "1+" * 4_000 + "1)",
    "signs without end": "f(a=" + "-" * 50_000 + "1)",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_answers_end_soon(text: str) -> None:
    """Nested, long and unclosed texts cost time that grows with their length, and no error."""
    started = time.monotonic()
    assert not is_right_call(text, [REFERENCE])
    assert time.monotonic() - started < 5
