"""Runs that are killed go on, and end as if nothing had been; changed settings redo what depends on them."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from backmerge.cli import app
from backmerge.demo import EXPERIMENT
from forked import command, started

SMALL = (
    "finetune.seeds=[1]",
    "finetune.steps=12",
    "merge.0.lam=[0.5]",
    "evaluate.limit=12",
    "evaluate.cache=false",  # what is resumed is the run, not the answers of another
    # so wide that every λ passes: the choice itself is not what is tested here
    "choice.margin=0.95",
    "choice.accept=[wide_margin,too_few_prompts,answers_cut,no_gain,nothing_to_restore]",
    "choice.over_refusal_margin=0.95",
)


def words(directory: Path) -> list[str]:
    """The small experiment, as a user would start it."""
    options = [part for override in SMALL for part in ("--set", override)]
    return ["run", str(EXPERIMENT), "--out", str(directory), *options]


def finish(directory: Path) -> None:
    """Run the small experiment to its end, in this process."""
    app(words(directory), standalone_mode=False)


def kill_when(directory: Path, has_happened: Callable[[], bool]) -> None:
    """Start the experiment, and kill it without warning once something has happened in its directory."""
    said = directory.with_suffix(".log")
    process = started(command, *words(directory), log=said)
    deadline = time.monotonic() + 120
    while not has_happened():
        assert process.exitcode is None, f"it ended before the moment came:\n{said.read_text()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()


COST = re.compile(rb'\s*(<section id="cost">.*?</section>)?\s*(?=<h3>Environment)', re.DOTALL)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a finished run but its lock and its log, and without what its sessions cost, also in the report."""
    apart = {"log.txt", ".lock", "sessions.jsonl"}
    files = (file for file in directory.rglob("*") if file.is_file() and file.name not in apart)
    return {str(file.relative_to(directory)): COST.sub(b"", file.read_bytes()) for file in files}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small experiment, undisturbed."""
    directory = tmp_path_factory.mktemp("reference") / "run"
    finish(directory)
    return directory


def test_killed_runs_end_the_same(reference: Path, tmp_path: Path) -> None:
    """Killed while tuning, in the sweep, and with the merged model written, a run still ends with the same bytes."""
    directory = tmp_path / "run"
    kill_when(directory, lambda: any((directory / "tuned").glob(".seed-1.*")))
    assert not (directory / "tuned" / "seed-1").exists()
    kill_when(directory, lambda: len(list((directory / "units").glob("*.jsonl"))) >= 4)
    assert not (directory / "results.json").exists()
    kill_when(directory, lambda: any((directory / "unconfirmed").glob("*")))
    assert not (directory / "results.json").exists()
    finish(directory)
    ours, theirs = contents(directory), contents(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_a_finished_run_generates_nothing(reference: Path) -> None:
    """Started again, a finished run reads what it has and leaves the same bytes."""
    before = contents(reference)
    finish(reference)
    assert contents(reference) == before
    assert (reference / "log.txt").read_text().splitlines()[-1].partition("; ")[2].startswith("0 answers generated")


def test_a_changed_choice_redoes_only_what_follows(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With another margin nothing is tuned or swept again, and the run says what changed."""
    import shutil

    directory = tmp_path / "run"
    shutil.copytree(reference, directory)
    app([*words(directory), "--set", "choice.margin=0.96"], standalone_mode=False)
    said = capsys.readouterr().err
    assert "Changed since the last time" in said
    assert "choice" in said
    assert "finetune" not in said.partition("Redone")[2]
    assert yaml.safe_load((directory / "experiment.yaml").read_text())["choice"]["margin"] == 0.96
    assert (directory / "log.txt").read_text().splitlines()[-1].partition("; ")[2].startswith("0 answers generated")


def test_a_changed_grid_generates_only_the_new_points(reference: Path, tmp_path: Path) -> None:
    """Another λ next to the old costs its own answers, and what the choice of it entails, only."""
    import shutil

    directory = tmp_path / "run"
    shutil.copytree(reference, directory)
    app([*words(directory), "--set", "merge.0.lam=[0.25, 0.5]"], standalone_mode=False)
    results = json.loads((directory / "results.json").read_text())
    assert {point["lam"] for point in results["points"]} == {0.0, 0.25, 0.5, 1.0}
    generated = int((directory / "log.txt").read_text().splitlines()[-1].partition("; ")[2].split()[0])
    assert generated in {36, 72}  # 12 prompts of three benchmarks; twice if it is then chosen, and so confirmed


def test_two_processes_do_not_share_a_run(reference: Path) -> None:
    """A second process is told that the first is at work."""
    from backmerge.errors import RunError
    from backmerge.runs import RunDirectory

    with RunDirectory(reference).held(), pytest.raises(RunError, match="another process"):
        finish(reference)
