"""Decide whether an answer makes the right function call, by parsing both as Python; nothing is run."""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

FENCED = re.compile(r"```[\w+-]*[^\S\n]*\n?(.*?)(?:```|\Z)", re.DOTALL)
CALL_START = re.compile(r"(?<![\w.])[^\W\d]\w*(?:\.[^\W\d]\w*)*\(")
# texts as a whole, so that a bracket within one does not count
BRACKET = re.compile(r"\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|[()\[\]{}]", re.DOTALL)
# No real call is as deep or as long (in characters). The limits keep the time for "f(f(f(…" from growing with the
# square of its length, and protect the stack of Python's parser
MAX_DEPTH = 50
MAX_LENGTH = 10_000

# BFCL's standardize_string: these do not count, nor does letter case, and ' counts as "
IGNORED_CHARACTERS = str.maketrans({**dict.fromkeys(" ,./-_*^"), "'": '"'})
WORDS = {"true": True, "false": False, "null": None, "none": None}


class Call(NamedTuple):
    """A call, in a form in which equivalent calls are equal.

    Attributes:
        name: The function's dotted name.
        arguments: Pairs of a parameter's name (or its position, if the name is not known) and a value.
    """

    name: str
    arguments: frozenset[tuple[str | int, Hashable]]


def is_right_call(
    answer: str, references: Sequence[str], parameters: Mapping[str, Sequence[str]] | None = None
) -> bool:
    """Return whether the answer's calls are those of one of the references.

    The calls of an answer are those in its first fenced block that has any, else in the whole answer; text around them,
    an assignment (`x = f(…)`) and list brackets are ignored. An answer is right if it has as many calls as the
    reference, in any order, each with the same dotted name and the same arguments by name. Values are compared as
    literals: 2 equals 2.0, but not "2" or True; a tuple equals a list, but one value does not equal a list of it;
    `true`, `false` and `null` are read as in JSON; any other bare word is a text. Texts are compared by the
    leaderboard's rule: without the characters ` ,./-_*^`, in lower case, with one kind of quotation mark ("June 15th"
    is "june-15th"; also, "1.5" is "15").

    >>> is_right_call("It is: book(days=2.0, to='New York')", ['book(to="new york", days=2)'])
    True
    >>> is_right_call("book(days=3)", ["book(days=2)"])
    False

    A reference without a readable call is compared as a text, by the same rule. The leaderboard uses a list of right
    values for each parameter and the types of the specification; here only references are available, so an optional
    argument that the reference omits is wrong.

    Source: Berkeley Function-Calling Leaderboard, `ast_checker.py` (`standardize_string`, `simple_function_checker`,
    `parallel_function_checker_no_order`), repository ShishirPatil/gorilla, Apache-2.0.

    Args:
        answer: A model's answer: hostile text, parsed and never run.
        references: Right answers, each with one call or more.
        parameters: A function's dotted name to its parameters in order. Without it an argument given by position equals
            only one in the same position.
    """
    found = Counter(calls_in(answer, parameters))
    for reference in references:
        expected = Counter(calls_in(reference, parameters))
        if found == expected if expected else standardized(answer) == standardized(reference):
            return True
    return False


def calls_in(text: str, parameters: Mapping[str, Sequence[str]] | None = None) -> list[Call]:
    """Return the calls in the first fenced block that has any, else in the whole text, in order; only the outermost.

    Text in prose that looks like a call, such as "the restaurant(s)", is not one: a call's positional arguments are
    literals.
    """
    for source in (*FENCED.findall(text), text):
        calls = _outermost_calls(source, parameters or {})
        if calls:
            return calls
    return []


def standardized(text: str) -> str:
    """Return a text without what the leaderboard considers mere form."""
    return text.translate(IGNORED_CHARACTERS).lower()


def _outermost_calls(text: str, parameters: Mapping[str, Sequence[str]]) -> list[Call]:
    calls = []
    at = 0
    while match := CALL_START.search(text, at):
        end = _closing(text, match.end())
        call = None if end is None else _read(text[match.start() : end], parameters)
        if call is not None:
            calls.append(call)
        # something unreadable may contain a call
        at = match.end() if end is None or call is None else end
    return calls


def _closing(text: str, start: int) -> int | None:
    """Return the place after the bracket that closes the one before `start`."""
    depth = 1
    for match in BRACKET.finditer(text, start, start + MAX_LENGTH):
        if match[0] in "([{":
            depth += 1
        elif match[0] in ")]}":
            depth -= 1
        if depth == 0:
            return match.end()
        if depth > MAX_DEPTH:
            return None
    return None


def _read(source: str, parameters: Mapping[str, Sequence[str]]) -> Call | None:
    """Return the call in this source, or `None` if it is not a call."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the model's text, not our code: "\d" is an unknown escape
            body = ast.parse(source, mode="eval").body
        return _call(body, parameters) if isinstance(body, ast.Call) else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # all that ast.parse is documented to raise
        return None


def _call(node: ast.Call, parameters: Mapping[str, Sequence[str]]) -> Call | None:
    name = ast.unparse(node.func)
    known = parameters.get(name, ())
    arguments: dict[str | int, Hashable] = {}
    for i, argument in enumerate(node.args):
        if isinstance(argument, ast.Name | ast.Attribute | ast.Starred):
            return None
        arguments[known[i] if i < len(known) else i] = _value(argument, parameters)
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            return None
        arguments[keyword.arg] = _value(keyword.value, parameters)
    return Call(name, frozenset(arguments.items()))


def _value(node: ast.expr, parameters: Mapping[str, Sequence[str]]) -> Hashable:
    """Return a literal as its kind and value, and anything else as its source."""
    found: Hashable = ("source", ast.unparse(node))
    match node:
        case ast.Constant(value=value):
            found = _literal(value)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            if not isinstance(number, bool):
                found = _literal(-number)
        case ast.Name(id=word):
            found = _literal(WORDS.get(word, word))
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            found = ("list", tuple(_value(item, parameters) for item in items))
        case ast.Dict(keys=keys, values=values):
            # a key is None where another mapping is unpacked
            named = [(key, value) for key, value in zip(keys, values, strict=True) if key is not None]
            if len(named) == len(keys):
                pairs = {_value(key, parameters): _value(value, parameters) for key, value in named}
                found = ("mapping", frozenset(pairs.items()))
        case ast.Call():
            call = _call(node, parameters)
            found = found if call is None else ("call", call)
    return found


def _literal(value: object) -> Hashable:
    match value:
        case bool() | None:
            return ("word", value)
        case int() | float():
            return ("number", value)
        case str():
            return ("text", standardized(value))
    return ("source", repr(value))
