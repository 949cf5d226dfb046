"""Rows of files: the same in every format, each with its place, and with what is wrong with it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge.errors import DataError
from backmerge.rows import HubData, Row, files_of, hub_rows, read_rows

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
# neither NUL, which csv cannot hold, nor a lone carriage return, which ends a line for csv and for no editor
FIELD = TEXT.filter(lambda text: "\0" not in text and "\r" not in text)


def separated(delimiter: str) -> Callable[[Path, Sequence[dict[str, str]]], None]:
    """A writer of CSV or TSV."""

    def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, ["prompt", "answer"], delimiter=delimiter, quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)

    return write


def json_lines(path: Path, rows: Sequence[Any]) -> None:
    """Write JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write Parquet."""
    datasets.Dataset.from_list(list(rows)).to_parquet(path)


WRITERS: dict[str, Callable[[Path, Sequence[dict[str, str]]], None]] = {
    "a.jsonl": json_lines,
    "a.json": lambda path, rows: path.write_text(json.dumps(rows), encoding="utf-8") and None,
    "b.json": lambda path, rows: (
        path.write_text("\ufeff" + json.dumps(rows, indent=2, ensure_ascii=False), "utf-8") and None
    ),
    "a": json_lines,
    "a.csv": separated(","),
    "a.TSV": separated("\t"),
    "a.parquet": parquet,
}


@pytest.mark.parametrize("name", WRITERS)
@given(rows=st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=5))
def test_every_format_gives_the_rows_that_were_written(
    tmp_path_factory: pytest.TempPathFactory, name: str, rows: list[tuple[str, str]]
) -> None:
    """Whatever texts a row holds, separators, quotes and line breaks among them, they are read as they were."""
    path = tmp_path_factory.getbasetemp() / name
    written = [{"prompt": prompt, "answer": answer} for prompt, answer in rows]
    WRITERS[name](path, written)
    found = list(read_rows(path))
    assert [row.values for row in found] == written
    assert len({row.id for row in found}) == len(rows)
    assert not any(row.fault for row in found)


@pytest.mark.parametrize("name", WRITERS)
def test_places_are_those_that_an_editor_shows(tmp_path: Path, name: str) -> None:
    """The header of CSV counts as a line; lists and Parquet have rows, and a list's rows their lines too."""
    path = tmp_path / name
    WRITERS[name](path, [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d"}])
    second = list(read_rows(path))[1]
    expected = {
        "a.jsonl": (2, "line 2"),
        "a.json": (2, "row 2 (line 1)"),
        "b.json": (2, "row 2 (line 6)"),
        "a": (2, "line 2"),
        "a.csv": (3, "line 3"),
        "a.TSV": (3, "line 3"),
        "a.parquet": (2, "row 2"),
    }[name]
    assert (second.id, second.place) == (f"{path.stem}-{expected[0]}", f"{path}, {expected[1]}")


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    """In JSON Lines and in CSV; a field over several lines is at its first."""
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"prompt": "a"}\n\n{"prompt": "b"}\n', encoding="utf-8")
    assert [row.id for row in read_rows(path)] == ["a-2", "a-4"]
    path = tmp_path / "b.csv"
    path.write_text('prompt,answer\r\n"a\r\nb",c\r\n\r\nd,e\r\n', encoding="utf-8")
    assert [(row.id, row.values["prompt"]) for row in read_rows(path)] == [("b-2", "a\r\nb"), ("b-5", "d")]


@pytest.mark.parametrize(
    ("name", "content", "faults"),
    [
        ("a.jsonl", b'{"prompt": "a"}\nprompt: b\n{"prompt": "c"}\n', ["", "not JSON: Expecting value", ""]),
        ("a.jsonl", b'{"prompt": "a"}\n"b"\n', ["", "not a JSON object"]),
        ("a.jsonl", b'{"prompt": "caf\xe9"}\n{"prompt": "a"}\n', ["not UTF-8", ""]),
        ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}\n", ["not JSON: Exceeds the limit"]),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000 + b"\n", ["not JSON: "]),
        ("a.json", b'[{"prompt": "a"}, "b"]', ["", "not a JSON object"]),
        ("a.csv", b"prompt,answer\na,b\nfirst, then,c\nd,e\n", ["", "3 fields, but the header has 2 columns", ""]),
    ],
)
def test_a_bad_row_says_so_and_those_after_it_are_read(
    tmp_path: Path, name: str, content: bytes, faults: list[str]
) -> None:
    """What cannot be read of one row is kept with it; the others come through."""
    path = tmp_path / name
    path.write_bytes(content)
    found = list(read_rows(path))
    assert len(found) == len(faults)
    for row, fault in zip(found, faults, strict=True):
        assert row.fault.startswith(fault)
        assert bool(row.fault) == bool(fault) != bool(row.values)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'[\n{"prompt": "a"},\n{"prompt": "b"\n', r"line 4: not JSON"),
        (
            "a.json",
            b'[\n{"prompt": "a"}\n{"prompt": "b"}]',
            r"neither a comma nor the list's end after row 1 \(line 2\)",
        ),
        ("a.json", b'[\n{"prompt": "a"},\n', "not JSON"),
        ("a.json", b'[\n{"prompt": "caf\xe9"}]', "line 2: not UTF-8"),
        ("a.csv", b'prompt,answer\na,b\n"c,d\n', "line 3: unexpected end of data"),
        ("a.csv", "prompt\na\n".encode("utf-16"), "line 1: not UTF-8"),
        ("a.csv", b"prompt,prompt\na,b\n", "column 'prompt' is repeated"),
        ("a.parquet", b"PAR1 no more", "after row 0: not readable as Parquet"),
    ],
)
def test_damage_after_which_no_row_is_sure_is_an_error(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    """The file and the place are named, with what to do."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        list(read_rows(path))
    assert str(path) in caught.value.message
    assert caught.value.remedy


def test_a_short_row_of_csv_lacks_its_last_columns(tmp_path: Path) -> None:
    """So that what needs them can say that they are not there."""
    path = tmp_path / "a.csv"
    path.write_text("prompt,answer\na\n", encoding="utf-8")
    assert [row.values for row in read_rows(path)] == [{"prompt": "a"}]


def test_tables_without_header_are_read_without_quotes(tmp_path: Path) -> None:
    """Named columns make a .tsv plain fields between tabs; a wrong number of them is a fault of that row."""
    path = tmp_path / "a.tsv"
    path.write_text('"a" b\tc\n\nd\te\tf\n', encoding="utf-8")
    first, second = read_rows(path, ("x", "y"))
    assert first == Row("a-1", f"{path}, line 1", {"x": '"a" b', "y": "c"})
    assert (second.id, second.fault) == ("a-3", "3 fields between tabs, not 2 (x, y)")


def test_a_folder_is_its_data_files_in_order(tmp_path: Path) -> None:
    """By name, whatever else lies there; a file is itself."""
    for name in ("b.tsv", "a.jsonl", "LICENSE", ".hidden.csv", "c.txt"):
        (tmp_path / name).touch()
    assert [file.name for file in files_of(tmp_path)] == ["a.jsonl", "b.tsv"]
    assert files_of(tmp_path / "c.txt") == (tmp_path / "c.txt",)


def test_folders_that_will_not_do(tmp_path: Path) -> None:
    """Nothing there, no data in it, or two files whose rows would have the same ids."""
    with pytest.raises(DataError, match="there is no file"):
        files_of(tmp_path / "none")
    with pytest.raises(DataError, match="has no data files"):
        files_of(tmp_path)
    for name in ("a.csv", "a.tsv"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="several files named 'a'"):
        files_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b'{"prompt": "a"}\n'), ("a.csv", b'prompt\n"a"\n"b'), ("a.tsv", b"prompt\na\n\xff\n")],
)
def test_rows_are_read_as_a_stream(tmp_path: Path, name: str, content: bytes) -> None:
    """The first row is there before the rest is read, damaged as it may be: memory does not grow with the file."""
    path = tmp_path / name
    path.write_bytes(content)
    assert next(read_rows(path)).values == {"prompt": "a"}


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of data sets in a folder of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.usefixtures("own_cache")
def test_the_hubs_rows(tmp_path: Path) -> None:
    """One file of a repository, read by `datasets` itself from a folder laid out like it, values as they are."""
    repository = tmp_path / "owner" / "name"
    repository.mkdir(parents=True)
    rows = [{"inputs": "a", "targets": "b", "turns": [{"role": "user"}]}, {"inputs": "c", "targets": "d", "turns": []}]
    json_lines(repository / "wanted.json", rows)
    json_lines(repository / "other.json", [{"no": "row"}])
    found = list(hub_rows(HubData(str(repository), None, "wanted.json")))
    assert [row.values for row in found] == rows
    assert [row.id for row in found] == ["name-1", "name-2"]
    assert found[1].place == f"{repository}, row 2"


@pytest.mark.usefixtures("own_cache")
def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, and not in the cache: the reason, and what can be done."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"'nobody/nothing' could not be downloaded from the hub(.|\n)*give the file"):
        list(hub_rows(HubData("nobody/nothing")))
