"""Runs and suites are read, or refused with what is wrong with each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from backmerge.errors import RunError
from backmerge.reporting.finished_runs import is_suite, read_runs, read_suite

from .several import experiment_of, results_of, written

SUITE = """\
name: "Table 1: tiny"
table: table1
scale: null
experiments:
- {name: reasoning, file: a.yaml, set: []}
- {name: code, file: b.yaml, set: []}
"""


def test_runs_are_called_by_their_folders(tmp_path: Path) -> None:
    """In the order given, each once, however it is written."""
    for name in ("b", "a"):
        written(tmp_path / name, results_of())
    runs = read_runs([tmp_path / "b", tmp_path / "a", tmp_path / "a" / ".." / "b"])
    assert [run.name for run in runs] == ["b", "a"]


def test_folders_with_the_same_name_are_distinguished(tmp_path: Path) -> None:
    """By as much of the path as they need."""
    for name in ("x/run", "y/run"):
        written(tmp_path / name, results_of())
    assert [run.name for run in read_runs([tmp_path / "x/run", tmp_path / "y/run"])] == ["x/run", "y/run"]


def test_model_and_task_come_from_the_run(tmp_path: Path) -> None:
    """The base without its owner and revision; the data set, or the title where tuning was elsewhere."""
    results = results_of(base="someone/aligned-7b@main", title="mine")
    written(tmp_path / "a", results, experiment_of(dataset="owner/medical"))
    written(tmp_path / "b", results, experiment_of(dataset=None))
    runs = read_runs([tmp_path / "a", tmp_path / "b"])
    assert [(run.model, run.task) for run in runs] == [("aligned-7b", "medical"), ("aligned-7b", "mine")]


def test_every_model_s_own_values_are_there(tmp_path: Path) -> None:
    """By point, also where one model stands for all."""
    written(tmp_path / "a", results_of(chosen="model_stock"))
    (run,) = read_runs([tmp_path / "a"])
    assert run.values["confirmation", "tuned", "task", "accuracy"] == [0.8, 0.9]
    assert run.values["confirmation", "base", "task", "accuracy"] == [0.2]
    assert run.values["confirmation", "model_stock", "task", "accuracy"] == [0.5]


def test_faults_of_each_run_are_reported(tmp_path: Path) -> None:
    """Unfinished, damaged, of another version, not there: all in one error, with the way on."""
    written(tmp_path / "fine", results_of())
    (written(tmp_path / "unfinished", results_of()) / "results.json").unlink()
    (written(tmp_path / "damaged", results_of()) / "results.json").write_text('{"schema')
    written(tmp_path / "other", {**results_of(), "schema_version": 1})
    names = ["fine", "unfinished", "damaged", "other", "nowhere"]
    with pytest.raises(RunError) as raised:
        read_runs([tmp_path / name for name in names])
    told = str(raised.value)
    assert told.startswith("4 of 5 runs cannot be compared:")
    for words in ("has no results.json", "is damaged", "schema version 1", "no such folder", "again to continue"):
        assert words in told
    assert "fine" not in told.replace("unfinished", "").replace("finished", "").replace("finish", "")


def test_a_single_fault_is_the_error(tmp_path: Path) -> None:
    """One run that cannot be read is reported with its own remedy."""
    written(tmp_path / "fine", results_of())
    with pytest.raises(RunError, match="there is no such folder") as raised:
        read_runs([tmp_path / "fine", tmp_path / "nowhere"])
    assert raised.value.remedy == "give the --out of a run."


def test_a_suite_names_its_runs(tmp_path: Path) -> None:
    """Title, table and folders, in the file's order."""
    assert not is_suite(tmp_path)
    (tmp_path / "suite.yaml").write_text(SUITE)
    assert is_suite(tmp_path)
    suite = read_suite(tmp_path)
    assert suite == ("Table 1: tiny", "table1", (tmp_path / "reasoning", tmp_path / "code"))


@pytest.mark.parametrize(
    "text",
    [
        "name: [",
        "just words",
        "name: a\nexperiments: [{name: b}]",
        "name: a\ntable: null\nexperiments: []",
        "name: a\ntable: null\nexperiments: [b]",
        "name: a\ntable: null\nexperiments: [{name: ../../elsewhere}]",
        "name: a\ntable: null\nexperiments: [{name: ..}]",
        "name: a\ntable: table9\nexperiments: [{name: b}]",
    ],
)
def test_a_damaged_suite_is_refused(tmp_path: Path, text: str) -> None:
    """Also one whose names lead out of its folder."""
    (tmp_path / "suite.yaml").write_text(text)
    with pytest.raises(RunError, match=re.escape("suite.yaml is damaged")):
        read_suite(tmp_path)
