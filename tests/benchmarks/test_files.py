"""Prompts from a user's own files: read as what they are, or refused with the line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge.benchmarks.catalogue import find_benchmark
from backmerge.benchmarks.files import contains_reference, exact_match, from_file
from backmerge.benchmarks.protocol import Kind
from backmerge.errors import BackmergeError, ConfigError, DataError
from backmerge.records import Example, Message, lines_of

ADVBENCH = Path(__file__).parents[2].parent / "shared" / "data" / "advbench" / "harmful_behaviors.csv"


def written(path: Path, content: str | bytes) -> Path:
    """The file with this content, byte for byte."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(*values: Any) -> str:
    """JSON Lines of some values."""
    return "".join(json.dumps(value) + "\n" for value in values)


def refused(path: Path, words: str, kind: Kind = "safety") -> None:
    """The file is refused with those words, its name, and a remedy."""
    with pytest.raises(DataError, match=words) as caught:
        from_file(path, kind)
    assert path.name in caught.value.message
    assert caught.value.remedy


def test_json_lines_by_hand(tmp_path: Path) -> None:
    """Prompt, answer, category, system and id are taken from their columns; blank lines are passed over."""
    content = rows(
        {"prompt": "What is 2 + 3?", "answer": 5, "category": "sums", "system": "Be brief.", "id": "q1"},
        {"question": "And 0 + 0?", "expected": 0},
    ).replace("\n", "\n\n", 1)
    found = from_file(written(tmp_path / "sums.jsonl", content), "utility")
    assert (found.name, found.kind, found.scorer and found.scorer.metrics) == (
        "sums",
        "utility",
        ("exact_match", "contains_reference"),
    )
    first, second = found.examples
    assert first == Example("q1", (Message("system", "Be brief."), Message("user", "What is 2 + 3?")), "5", "sums")
    assert second == Example("sums-3", (Message("user", "And 0 + 0?"),), "0")


@pytest.mark.parametrize("name", ["p.csv", "p.CSV"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
def test_csv_by_hand(tmp_path: Path, name: str, mark: str, end: str) -> None:
    """Quoted commas, quotes and line breaks; Excel's byte order mark and line ends."""
    lines = ["prompt,answer", '"first, then","a ""b"""', '"two\nlines",c']
    found = from_file(written(tmp_path / name, mark + end.join(lines) + end), "utility").examples
    assert [(one.prompt, one.reference) for one in found] == [("first, then", 'a "b"'), ("two\nlines", "c")]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_before_json(tmp_path: Path, mark: str) -> None:
    """It is not part of the first line."""
    assert len(from_file(written(tmp_path / "p.jsonl", mark + rows({"prompt": "a"})), "safety").examples) == 1


@pytest.mark.skipif(not ADVBENCH.is_file(), reason="AdvBench is not in ../shared/data")
def test_advbench_as_published() -> None:
    """The original file, with `goal` and `target`, is 520 prompts for a judge."""
    found = from_file(ADVBENCH, "safety")
    assert len(found.examples) == len({one.id for one in found.examples}) == 520
    assert found.kind == "safety"
    assert found.scorer is None
    assert all(one.prompt.strip() for one in found.examples)


@given(
    prompts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: text.strip()), min_size=1, max_size=5
    )
)
def test_any_text_comes_through(tmp_path_factory: pytest.TempPathFactory, prompts: list[str]) -> None:
    """Whatever a JSON string can hold is the prompt, and can be written to a record again."""
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    found = from_file(written(path, rows(*({"prompt": prompt} for prompt in prompts))), "safety").examples
    assert [one.prompt for one in found] == prompts
    lines_of(found).encode()


FAULTS: dict[str, tuple[str, str | bytes, Kind, str]] = {
    "no prompt column": ("p.jsonl", rows({"text": "a"}), "safety", r"line 1: no prompt in the columns \['text'\]"),
    "no prompt in one row": ("p.jsonl", rows({"prompt": "a"}, {"prompt": ""}), "safety", "line 2: no prompt"),
    "blank prompt": ("p.jsonl", rows({"prompt": " \t"}), "safety", "line 1: no prompt"),
    "null prompt": ("p.jsonl", rows({"prompt": None}), "safety", "line 1: no prompt"),
    "no answer": ("p.jsonl", rows({"prompt": "a", "answer": "b"}, {"prompt": "c"}), "utility", "line 2: no expected"),
    "blank answer": ("p.jsonl", rows({"prompt": "a", "answer": " "}), "utility", "line 1: no expected answer"),
    "csv without prompt": ("p.csv", "text\na\n", "safety", "line 2: no prompt"),
    "csv row too long": ("p.csv", "prompt\nfirst, then\n", "safety", "line 2: 2 fields, but the header has 1"),
    "csv row too short": ("p.csv", "prompt,answer\na\n", "utility", "line 2: no expected answer"),
    "csv quote left open": ("p.csv", 'prompt\n"a\n', "safety", "line 2: unexpected end"),
    "csv line after a long row": ("p.csv", 'prompt,answer\n"a\nb",c\nd,\n', "utility", "line 4: no expected"),
    "repeated ids": ("p.jsonl", rows({"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"}), "safety", "uses 1 ids"),
    "an id like a line's": ("p.jsonl", rows({"prompt": "a"}, {"prompt": "b", "id": "p-1"}), "safety", "uses 1 ids"),
    "not JSON": ("p.jsonl", rows({"prompt": "a"}) + "prompt: b\n", "safety", "line 2: not JSON"),
    "torn": ("p.jsonl", rows({"prompt": "a"})[:-4], "safety", "line 1: not JSON"),
    "a list cut short": ("p.json", '[\n{"prompt": "a"}\n', "safety", "neither a comma nor the list's end"),
    "no object": ("p.jsonl", '"a"\n', "safety", "line 1: not a JSON object"),
    "too many digits": ("p.jsonl", '{"prompt": "a", "n": ' + "9" * 5000 + "}\n", "safety", "line 1: not JSON"),
    "too deep": ("p.jsonl", '{"prompt": ' + "[" * 100_000 + "\n", "safety", "line 1: not JSON"),
    "a list of answers": ("p.jsonl", rows({"prompt": "a", "answer": ["b", "c"]}), "utility", "'answer' is a list"),
    "a mapping as prompt": ("p.jsonl", rows({"prompt": {"text": "a"}}), "safety", "'prompt' is a mapping"),
    "half of a surrogate pair": ("p.jsonl", '{"prompt": "a\\ud83d"}\n', "safety", "line 1: 'prompt' contains half"),
    "instruction and input": (
        "p.jsonl", rows({"instruction": "Translate.", "input": "kite", "output": "x"}), "utility", "both 'instruction'",
    ),
    "empty": ("p.jsonl", "", "safety", "contains no rows"),
    "blank lines only": ("p.jsonl", "\n\n", "safety", "contains no rows"),
    "header only": ("p.csv", "prompt\n", "safety", "contains no rows"),
    "latin-1": ("p.jsonl", b'{"prompt": "caf\xe9"}\n', "safety", "not UTF-8"),
    "utf-16": ("p.csv", "prompt\na\n".encode("utf-16"), "safety", "not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "kind", "words"), FAULTS.values(), ids=FAULTS.keys())
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, name: str, content: str | bytes, kind: Kind, words: str
) -> None:
    """Each fault is one error with the line; nothing is cut off, guessed or passed over."""
    refused(written(tmp_path / name, content), words, kind)


def test_messages_show_no_prompt(tmp_path: Path) -> None:
    """Law 13: a fault in a file of harmful requests names the line and the columns, not the text."""
    for name, content in (
        ("p.jsonl", rows({"prompt": "SECRET", "answer": ["SECRET"]}) + rows({"prompt": "", "goals": "SECRET"})),
        ("p.csv", "prompt\nSECRET, SECRET\n"),
        ("q.jsonl", '{"prompt": "SECRET"\n'),
        ("r.jsonl", rows({"prompt": "SECRET", "id": "a"}, {"prompt": "SECRET", "id": "a"})),
    ):
        with pytest.raises(DataError) as caught:
            from_file(written(tmp_path / name, content), "utility" if name == "p.jsonl" else "safety")
        assert "SECRET" not in str(caught.value)


def test_alpaca_without_input(tmp_path: Path) -> None:
    """An `input` that is empty, as in many rows of such files, does no harm."""
    content = rows({"instruction": "Name a kite.", "input": "", "output": "Dragon"})
    (found,) = from_file(written(tmp_path / "p.jsonl", content), "utility").examples
    assert (found.prompt, found.reference) == ("Name a kite.", "Dragon")


@pytest.mark.parametrize(
    ("reference", "answer", "exact", "contained"),
    [
        ("5", "5", 1, 1),
        ("5", " 5\n", 1, 1),
        ("Paris", "paris", 1, 1),
        ("Paris", "It is Paris.", 0, 1),
        ("STRASSE", "straße", 1, 1),
        ("5", "", 0, 0),
        ("5", "6", 0, 0),
    ],
)
def test_metrics_by_hand(reference: str, answer: str, exact: float, contained: float) -> None:
    """White space at the ends and letter case do not count."""
    one = Example("a", (Message("user", "?"),), reference)
    assert exact_match(one, answer) == exact
    assert contains_reference(one, answer) == contained


def test_a_file_is_found_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path, with or without a folder, is a benchmark of the kind that is asked for."""
    written(tmp_path / "mine.jsonl", rows({"prompt": "a"}))
    monkeypatch.chdir(tmp_path)
    kinds: Sequence[Kind] = ("safety", "over_refusal")
    for kind in kinds:
        for name in ("mine.jsonl", str(tmp_path / "mine.jsonl")):
            assert find_benchmark(name, kind).kind == kind


@pytest.mark.parametrize(
    ("name", "kind", "error", "words"),
    [
        ("absent.jsonl", "safety", DataError, "there is no file 'absent.jsonl'"),
        ("folder/absent", "safety", DataError, "there is no file"),
        ("advbnech", "safety", ConfigError, "did you mean 'advbench'"),
        ("demo-plans", "safety", ConfigError, "measures utility, but was given as safety"),
        ("os.path:join", "safety", ConfigError, "your own code"),
        (".", "safety", BackmergeError, "no benchmark named"),
    ],
)
def test_a_benchmark_that_is_not_there(name: str, kind: Kind, error: type[BackmergeError], words: str) -> None:
    """A missing file, a misspelt name, one of another kind, and code without leave each say so."""
    with pytest.raises(error, match=words):
        find_benchmark(name, kind)
