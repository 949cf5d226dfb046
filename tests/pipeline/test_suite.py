"""Suites: every experiment checked before the first begins, each carried out whatever became of the others."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml

from backmerge.errors import ConfigError, DataError, RunError
from backmerge.pipeline import suite as suites
from backmerge.pipeline.stages import Finished
from backmerge.pipeline.suite import check_suite, plan_suite, run_suite
from backmerge.planning.settings import Experiment

RunCli = Callable[..., tuple[int, str, str]]

BASE = """\
base: demo
finetune: {dataset: demo-plans, data: {validation: 0}, seeds: [1], steps: 2, batch_size: 4, device: cpu}
merge: [{method: linear, lam: [0.5]}]
evaluate:
  utility: [demo-plans]
  safety: [demo-harmful]
  judge: demo-rule
  engine: {device: cpu, dtype: float32}
  limit: 3
report: {text: none}
"""
SUITE = """\
name: Two
table: table1
experiments:
  - {name: first, file: files/first.yaml}
  - name: second
    file: files/second.yaml
    set:
      merge: [{method: slerp, lam: [0.5]}]
set:
  evaluate: {limit: 4}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """`write(NAME, TEXT) -> Path`, folders made."""

    def written(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return written


@pytest.fixture
def suite(write: Callable[[str, str], Path]) -> Path:
    """A suite of two tiny experiments that share a file."""
    write("files/base.yaml", BASE)
    write("files/small.yaml", "merge: [{method: linear, lam: [0.1]}]\nevaluate: {limit: 2}\n")
    write("files/first.yaml", "extends: base.yaml\nname: the first\nscales: {small: small.yaml}\n")
    write("files/second.yaml", "extends: base.yaml\nname: the second\nscales: {small: small.yaml}\n")
    return write("suite.yaml", SUITE)


def finished(directory: Path, verdict: str) -> Finished:
    """A run that ended, as far as a suite looks at it."""
    results = SimpleNamespace(
        name="x",
        confirmation=SimpleNamespace(verdict=verdict),
        choice=SimpleNamespace(point=None),
        summary=(),
        benchmarks=(),
    )
    return Finished(directory, cast("Any", results))


def test_each_file_is_found_from_the_suite_s_folder_and_set(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set for all goes over the files, what is set for one over that, and an option over everything."""
    monkeypatch.chdir("/")
    found = plan_suite(suite).experiments
    assert list(found) == ["first", "second"]
    assert [one.merge[0].method for one in found.values()] == ["linear", "slerp"]
    assert [one.evaluate.limit for one in found.values()] == [4, 4]
    assert found["first"].name == "the first"
    assert {one.evaluate.limit for one in plan_suite(suite, overrides=["evaluate.limit=9"]).experiments.values()} == {9}


def test_a_scale_goes_under_what_the_suite_sets(suite: Path, write: Callable[[str, str], Path]) -> None:
    """The experiments' own scale first, then what the suite sets, which a scale of the suite's own may replace."""
    planned = plan_suite(suite, scale="small")
    assert [one.merge[0].lam for one in planned.experiments.values()] == [(0.1,), (0.5,)]
    assert {one.evaluate.limit for one in planned.experiments.values()} == {4}
    assert planned.title == "Two, at the scale 'small'"
    write("over.yaml", "set: {evaluate: {limit: 1}}\n")
    suite.write_text(SUITE + "scales: {small: over.yaml}\n")
    assert {one.evaluate.limit for one in plan_suite(suite, scale="small").experiments.values()} == {1}
    assert {one.evaluate.limit for one in plan_suite(suite).experiments.values()} == {4}


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("name: second", "name: first", "two experiments are named 'first'"),
        ("name: second", "name: ../second", r"line 5: 'experiments.1.name'"),
        ("name: second", "name: .hidden", r"'experiments.1.name'"),
        ("table: table1", "table: table9", r"line 2: 'table'"),
        ("table: table1", "tables: table1", r"line 2: unknown key 'tables'; did you mean 'table'"),
        ("files/second.yaml", "files/third.yaml", r"suite.yaml, line 6: the file 'files/third.yaml' does not exist"),
        ("{limit: 4}", "{limit: none}", r"suite.yaml, line 10: 'evaluate.limit'"),
        ("{limit: 4}", "{limmit: 4}", r"suite.yaml, line 10: unknown key 'evaluate.limmit'"),
        ("{method: slerp, lam: [0.5]}", "{method: slerp, lam: [5]}", r"suite.yaml, line 8: 'merge.0.lam.0'"),
    ],
)
def test_a_fault_is_named_with_its_file_and_line(suite: Path, before: str, after: str, words: str) -> None:
    """Of the suite's own keys, and of what it sets over the files."""
    assert before in SUITE
    suite.write_text(SUITE.replace(before, after))
    with pytest.raises(ConfigError, match=words):
        plan_suite(suite)


def test_faults_of_all_experiments_are_reported_together(suite: Path, write: Callable[[str, str], Path]) -> None:
    """One message, with both experiments' names and files."""
    write("files/first.yaml", "extends: base.yaml\nbsae: demo\n")
    write("files/second.yaml", "extends: base.yaml\nname: [1]\n")
    with pytest.raises(ConfigError) as caught:
        plan_suite(suite)
    said = str(caught.value)
    assert "2 of 2 experiments cannot be run, so none was started" in said
    assert "first: " in said
    assert "line 2: unknown key 'bsae'; did you mean 'base'" in said
    assert "second: " in said
    assert "line 2: 'name'" in said
    # what is sound is planned without the other
    write("files/first.yaml", "extends: base.yaml\n")
    assert list(plan_suite(suite, only=["first"]).experiments) == ["first"]


def test_shared_fault_is_reported_once(suite: Path, run_cli: RunCli, tmp_path: Path) -> None:
    """What both experiments lack is one fault, and there are no others to carry out."""
    code, _, said = run_cli("run", suite, "--out", tmp_path / "out", "--set", "evaluate.utility=[nowhere.jsonl]")
    assert code == 2
    assert said.count("there is no file 'nowhere.jsonl'") == 1
    assert "first, second: " in said
    assert "--only" not in said


def test_an_unknown_name_is_refused(suite: Path) -> None:
    """`--only` with a word that is no experiment's name says which is like it."""
    with pytest.raises(ConfigError, match="no experiment 'secnd'; did you mean 'second'"):
        plan_suite(suite, only=["secnd"])


def test_missing_parts_are_found_before_the_first_experiment_starts(
    suite: Path, write: Callable[[str, str], Path], run_cli: RunCli, tmp_path: Path
) -> None:
    """A benchmark's file that is not there, in the second: exit code 2, and nothing is written."""
    write("files/second.yaml", "extends: base.yaml\nevaluate: {utility: [nowhere.jsonl]}\n")
    code, _, said = run_cli("run", suite, "--out", tmp_path / "out")
    assert code == 2
    assert "1 of 2 experiments cannot be run, so none was started" in said
    assert "there is no file 'nowhere.jsonl'" in said
    assert not (tmp_path / "out").exists()


def test_one_that_fails_does_not_stop_the_others(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that the user can mend is kept as that experiment's outcome; a fault of ours ends everything."""
    done: list[str] = []

    def carried_out(experiment: Experiment, directory: Path, **_: Any) -> Finished:
        done.append(directory.name)
        if directory.name == "first":
            raise DataError("its data is gone")
        return finished(directory, "restored")

    monkeypatch.setattr(suites, "run_experiment", carried_out)
    told: list[str] = []
    outcomes = run_suite(plan_suite(suite), tmp_path / "out", on_done=lambda name, _: told.append(name))
    assert done == told == ["first", "second"]
    assert isinstance(outcomes["first"].error, DataError)
    assert outcomes["second"].finished is not None

    def faulty(*_: Any, **__: Any) -> Finished:
        raise ZeroDivisionError

    monkeypatch.setattr(suites, "run_experiment", faulty)
    with pytest.raises(ZeroDivisionError):
        run_suite(plan_suite(suite), tmp_path / "out")


@pytest.mark.parametrize(
    ("verdicts", "strict", "code"),
    [
        (("restored", "restored"), True, 0),
        (("restored", "worse"), False, 0),
        (("restored", "not shown"), True, 3),
        (("restored", None), False, 2),
        (("not shown", None), True, 2),
    ],
)
def test_exit_codes(
    suite: Path,
    run_cli: RunCli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verdicts: tuple[str | None, ...],
    strict: bool,
    code: int,
) -> None:
    """0; 2 where one failed; 3 where one is not restored, under --strict."""
    left = list(verdicts)

    def carried_out(experiment: Experiment, directory: Path, **_: Any) -> Finished:
        verdict = left.pop(0)
        if verdict is None:
            raise RunError("it failed", remedy="mend it.")
        return finished(directory, verdict)

    monkeypatch.setattr(suites, "run_experiment", carried_out)
    monkeypatch.setattr(suites, "prepare", lambda *_, **__: None)
    found, _, said = run_cli("run", suite, "--out", tmp_path / "out", *(["--strict"] if strict else []))
    assert found == code, said
    if None in verdicts:
        assert "second failed: it failed" in said
        assert "1 of 2 experiments failed: second" in said


def test_ctrl_c_stops_the_suite(suite: Path, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No further experiment is begun, and the message says how to go on."""

    def interrupted(*_: Any, **__: Any) -> Finished:
        raise KeyboardInterrupt

    monkeypatch.setattr(suites, "run_experiment", interrupted)
    monkeypatch.setattr(suites, "prepare", lambda *_, **__: None)
    code, _, said = run_cli("run", suite, "--out", tmp_path / "out")
    assert code == 130
    assert f"to continue with {tmp_path / 'out'}" in said


@pytest.mark.parametrize("content", ["notes.txt", "experiment.yaml", "file"])
def test_unrelated_folder_is_kept(suite: Path, tmp_path: Path, content: str) -> None:
    """Files of others, the run directory of one experiment, or a file where the folder should be."""
    out = tmp_path / "out"
    if content == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / content).write_text("mine")
    with pytest.raises(RunError, match=r"another|out is|holds"):
        run_suite(plan_suite(suite), out)
    assert (out if content == "file" else out / content).read_text() == "mine"
    assert not out.is_dir() or [file.name for file in out.iterdir()] == [content]


def test_only_is_for_suites(write: Callable[[str, str], Path], run_cli: RunCli) -> None:
    """Of a single experiment nothing can be left out."""
    code, _, said = run_cli("run", write("one.yaml", BASE), "--only", "first")
    assert code == 2
    assert "--only is for suites" in said


@pytest.mark.usefixtures("without_report")
def test_two_experiments_run_and_resume(suite: Path, tmp_path: Path, run_cli: RunCli) -> None:
    """Each has its run directory, suite.yaml says what belongs together, and a second time nothing is made again."""
    out = tmp_path / "out"
    code, printed, said = run_cli("run", suite, "--out", out)
    assert code == 0, said
    described = yaml.safe_load((out / "suite.yaml").read_text())
    assert (described["name"], described["table"], described["scale"]) == ("Two", "table1", None)
    assert [one["name"] for one in described["experiments"]] == ["first", "second"]
    results = {name: (out / name / "results.json").read_bytes() for name in ("first", "second")}
    assert b'"slerp@0.5"' in results["second"]
    assert b'"slerp@0.5"' not in results["first"]
    assert "the first" in printed
    assert "the second" in printed
    code, _, said = run_cli("run", suite, "--out", out, "--only", "second")
    assert code == 0, said
    assert f"Continuing {out / 'second'}" in said
    assert {name: (out / name / "results.json").read_bytes() for name in results} == results
    assert [one["name"] for one in yaml.safe_load((out / "suite.yaml").read_text())["experiments"]] == [
        "first",
        "second",
    ]


def test_check_writes_no_files_and_reports_everything(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preparation is asked of each, and every fault is reported."""
    asked: list[str] = []

    def prepared(experiment: Experiment, *_: Any, **__: Any) -> None:
        asked.append(experiment.name)
        raise DataError(f"{experiment.name} lacks its data")

    monkeypatch.setattr(suites, "prepare", prepared)
    with pytest.raises(ConfigError, match=r"(?s)first: the first lacks.*second: the second lacks"):
        check_suite(plan_suite(suite))
    assert asked == ["the first", "the second"]
