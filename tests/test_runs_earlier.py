"""Where a run directory keeps what earlier settings made: `earlier/N`."""

import json
from pathlib import Path

import pytest

from backmerge import runs
from backmerge.runs import RunDirectory, write_results


class Killed(BaseException):
    """Ends the process at a chosen place."""


def test_models_left_by_stopped_runs_are_each_kept_apart(tmp_path: Path) -> None:
    """Two leftovers of one name are in two folders, neither of which claims settings that may be another run's."""
    run = RunDirectory(tmp_path / "run")
    with run.held():
        for number in (1, 2):
            run.begin(f"a: {number}\n", {"a": 1})
            model = run.unconfirmed / "t1"
            model.mkdir(parents=True)
            (model / "weights").write_text(str(number))
            run.set_aside([model])
        write_results(run.path, json.dumps({"inputs": {"a": 1}}))
        run.begin("a: 3\n", {"a": 3})
    earlier = run.path / "earlier"
    assert [(earlier / str(n) / "unconfirmed" / "t1" / "weights").read_text() for n in (1, 2)] == ["1", "2"]
    assert sorted(path.parent.name for path in earlier.glob("*/experiment.yaml")) == ["3"]
    assert (earlier / "3" / "experiment.yaml").read_text() == "a: 2\n"


def test_nothing_joins_what_a_killed_run_had_moved_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the last move, the folder is done: what the next change moves gets its own."""
    run, sync = RunDirectory(tmp_path / "run"), runs.sync_directory
    tuned = run.tuned / "seed-1"

    def killed(path: Path) -> None:
        sync(path)
        if path.name == "tuned":
            raise Killed

    with run.held():
        run.begin("a: 1\n", {})
        tuned.mkdir(parents=True)
        with monkeypatch.context() as patch:
            patch.setattr(runs, "sync_directory", killed)
            with pytest.raises(Killed):
                run.begin("a: 2\n", {}, [tuned])
        run.begin("a: 1\n", {"a": 1})
        write_results(run.path, json.dumps({"inputs": {"a": 1}}))
        run.begin("a: 1\n", {"a": 2})
    first, second = (run.path / "earlier" / number for number in "12")
    assert sorted(path.relative_to(first).as_posix() for path in first.rglob("*")) == [
        "experiment.yaml", "tuned", "tuned/seed-1",
    ]  # fmt: skip
    assert (second / "results.json").exists()
