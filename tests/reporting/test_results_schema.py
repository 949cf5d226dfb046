"""The schema of `results.json` as documented: nothing more, and nothing less, than a real run writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from backmerge.config import Document, validated
from backmerge.pipeline.results import SCHEMA_VERSION
from backmerge.pipeline.stages import run_experiment
from backmerge.planning.settings import Experiment

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
ROW = re.compile(r"^\| `(?P<key>[^`]+)` \| (?P<kind>[a-z ]+) \| (?P<meaning>.+) \|$", re.MULTILINE)
SHAPE = re.compile(r"^An? \*\*(?P<name>\w+)\*\*", re.MULTILINE)
KINDS: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "whole number": (int,),
    "number": (int, float),
    "flag": (bool,),
    "list": (list,),
    "table": (dict,),
    "null": (type(None),),
    "anything": (object,),
}

# small, but with everything in it that a run can have: two judges, a comparison, held-out rows, categories
SETTINGS: dict[str, Any] = {
    "name": "small",
    "base": "demo",
    "finetune": {
        "dataset": "demo-plans",
        "data": {"num_examples": 40, "validation": 0.1},
        "seeds": [1, 2],
        "steps": 20,
        "batch_size": 4,
        "learning_rate": 8.0e-3,
        "device": "cpu",
    },
    "merge": [{"method": "linear", "lam": [0.5]}, {"method": "slerp", "lam": [0.5]}],
    "evaluate": {
        "utility": ["demo-plans"],
        "safety": ["demo-harmful"],
        "over_refusal": ["demo-harmless"],
        "judge": "demo-rule",
        "second_judge": "refusal-phrases",
        "engine": {"device": "cpu", "dtype": "float32"},
        "limit": 6,
    },
    "choice": {"rule": "paper", "compare": True},
}


class Documented(NamedTuple):
    """A key of the documentation."""

    key: str
    kind: str


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`results.json` of a real run of a few seconds."""
    directory = tmp_path_factory.mktemp("schema") / "run"
    run_experiment(validated(Experiment, Document("this test", SETTINGS, {})), directory)
    found: dict[str, Any] = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    return found


def documented() -> dict[str, str]:
    """Each key of the page with what it is; shapes are put in where they return."""
    text = PAGE.read_text(encoding="utf-8")
    schema = text[text.index("## results.json") : text.index("### Shapes that return")]
    parts = SHAPE.split(text[text.index("### Shapes that return") :])
    shapes = {name: rows_of(part) for name, part in zip(parts[1::2], parts[2::2], strict=True)}
    found: dict[str, str] = {}
    for key, kind in rows_of(schema):
        assert key not in found, f"'{key}' is told of twice"
        name = kind.removesuffix(" or null")
        found[key] = kind.replace(name, "table") if name in shapes else kind
        found |= {f"{key}.{inner}": kind for inner, kind in shapes.get(name, ())}
    return found


def rows_of(text: str) -> list[Documented]:
    """The rows of the tables in a part of the page."""
    return [Documented(row["key"], row["kind"]) for row in ROW.finditer(text)]


def keys_of(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a document with each of its values; `[]` after those of lists whose entries are tables."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from keys_of(inner, f"{at}.{key}" if at else key)
    elif isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
        for inner in value:
            yield from keys_of(inner, f"{at}[]")
    if at:
        yield at, value


def as_documented(key: str, known: dict[str, str]) -> str | None:
    """The documented key that a key is, by name or through a place for names."""
    if key in known:
        return key
    for pattern in known:
        # its own name goes before a place for any
        if "<" in pattern and re.fullmatch(re.sub(r"<\w+>", "[^.]+", re.escape(pattern)), key):
            return pattern
    # a list of tables that is empty
    return f"{key}[]" if f"{key}[]" in known else None


def test_every_key_is_documented(results: dict[str, Any]) -> None:
    """What a run writes is told of on the page."""
    known = documented()
    inner = {"points[].parameters."}
    found = {key for key, _ in keys_of(results) if not any(key.startswith(one) for one in inner)}
    assert sorted(key for key in found if as_documented(key, known) is None) == []


def test_every_documented_key_is_written(results: dict[str, Any]) -> None:
    """What the page tells of is in a run's results."""
    known = documented()
    found = {as_documented(key, known) for key, _ in keys_of(results)}
    # models that came from elsewhere: this run made its own, and its method asks for no more
    assert sorted(set(known) - found) == ["inputs.models.<model>", "inputs.tuned.<model>"]


def test_every_value_is_what_the_page_says(results: dict[str, Any]) -> None:
    """Texts are texts, numbers numbers, and null is only where the page says so."""
    known = documented()
    for key, value in keys_of(results):
        pattern = as_documented(key, known)
        if pattern is None:
            continue
        kinds = ("list",) if pattern.endswith("[]") and not key.endswith("[]") else known[pattern].split(" or ")
        is_flag = isinstance(value, bool)
        fits = [isinstance(value, KINDS[kind]) and (not is_flag or kind in ("flag", "anything")) for kind in kinds]
        assert any(fits), f"{key} is {value!r}, and should be {known[pattern]}"


def test_the_page_is_of_this_version() -> None:
    """A new version of the schema is a new text."""
    assert f"**version {SCHEMA_VERSION}** of the schema" in PAGE.read_text(encoding="utf-8")


def test_the_page_is_read_whole() -> None:
    """No row of its tables is passed over by the tests above, and none lacks a meaning."""
    text = PAGE.read_text(encoding="utf-8")
    schema = text[text.index("## results.json") :]
    rows = [line for line in schema.splitlines() if line.startswith("| `")]
    assert len(rows) == len(ROW.findall(schema)) > 150
