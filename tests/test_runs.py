"""Run directories: private, held by one process, and never half-written."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge import runs
from backmerge.errors import DataError, RunError
from backmerge.measuring.recorded import read_records
from backmerge.outputs import check_digests, listed_files
from backmerge.records import Value, Verdict
from backmerge.runs import (
    PARTIAL,
    RunDirectory,
    claimed,
    key_of,
    whole_directory,
    write_once,
    write_results,
    write_whole,
)

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("abλ\n\u2028\0"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abλ", max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


class Killed(BaseException):
    """What stands for the end of the process."""


def files_under(path: Path) -> list[str]:
    """Every file and folder below, hidden ones too."""
    return sorted(str(inner.relative_to(path)) for inner in path.rglob("*"))


@given(value=PLAIN)
def test_keys_are_of_the_value(value: object) -> None:
    """Equal data have equal keys, also after a way through JSON, and in any order of a mapping's keys."""
    again = json.loads(json.dumps(value))
    assert key_of(value) == key_of(again)
    if isinstance(again, dict):
        assert key_of(value) == key_of(dict(reversed(again.items())))
    assert key_of(value) != key_of([value])
    assert key_of(value) != key_of(value, value)


def test_keys_do_not_change_between_versions() -> None:
    """Units of an older run are found again: the key of known data, written down."""
    assert key_of({"b": [1, 2.5], "a": "λ"}, None) == "3e652315c8e62b6ffdcbf4c5994e5cec"


def test_a_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the rename, the old text stands, and nothing is next to it."""
    path = tmp_path / "deep" / "file.txt"
    write_whole(path, "old λ\n")
    assert path.read_text(encoding="utf-8") == "old λ\n"

    def killed(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(runs.os, "fsync", killed)
    with pytest.raises(Killed):
        write_whole(path, "new\n")
    monkeypatch.undo()
    assert path.read_text(encoding="utf-8") == "old λ\n"
    assert files_under(tmp_path) == ["deep", "deep/file.txt"]
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "half of a pair: \ud800")
    assert files_under(tmp_path) == ["deep", "deep/file.txt"]


def write_manifest(directory: Path) -> None:
    """Make a directory one that backmerge wrote."""
    manifest = {"backmerge": "0", "files": listed_files(directory)}
    (directory / "backmerge.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Threads that write the same file each have a temporary one: what is there in the end is one of theirs, whole."""
    path = tmp_path / "file.txt"
    texts = [str(i) * 20_000 for i in range(8)]
    threads = [threading.Thread(target=write_whole, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert files_under(tmp_path) == ["file.txt"]


def test_a_directory_is_whole_or_absent(tmp_path: Path) -> None:
    """Killed while it is filled, nothing is there; a good one takes its name at the end only."""
    target = tmp_path / "deep" / "model"

    def fill(text: str, *, dies: bool) -> None:
        with whole_directory(target, replace=True) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / "weights").write_text(text)
            write_manifest(temporary)
            assert not target.exists() or (target / "inner" / "weights").read_text() == "old"
            if dies:
                raise Killed

    with pytest.raises(Killed):
        fill("half", dies=True)
    assert files_under(tmp_path) == []
    fill("old", dies=False)
    with pytest.raises(Killed):
        fill("half", dies=True)
    assert (target / "inner" / "weights").read_text() == "old"
    fill("new", dies=False)
    assert (target / "inner" / "weights").read_text() == "new"
    written = ["deep/model", "deep/model/backmerge.json", "deep/model/inner", "deep/model/inner/weights"]
    assert files_under(tmp_path) == ["deep", *written]


def test_a_failed_exchange_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the new one cannot take the name, the old one gets it back."""
    target = tmp_path / "model"
    with whole_directory(target) as temporary:
        (temporary / "weights").write_text("old")
        write_manifest(temporary)
    rename = Path.rename

    def fails(self: Path, to: Path) -> Path:
        if to == target and (self / "weights").read_text() == "new":
            raise OSError("no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no"), whole_directory(target, replace=True) as temporary:
        (temporary / "weights").write_text("new")
    assert (target / "weights").read_text() == "old"
    assert files_under(tmp_path) == ["model", "model/backmerge.json", "model/weights"]


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    """A half-filled directory whose process is gone goes with the next try; one that is being filled stays."""
    target = tmp_path / "model"
    code = (
        "import os, sys, pathlib; from backmerge.runs import whole_directory\n"
        "with whole_directory(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    (temporary / 'half').write_text('x'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    (abandoned,) = tmp_path.iterdir()
    assert abandoned.name.endswith(PARTIAL)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(whole_directory(target))
        assert not abandoned.exists()
        with whole_directory(target) as second:
            assert first.is_dir()
            (second / "weights").write_text("second")
        with pytest.raises(RunError, match="was written by another command while this one was running"):
            stack.close()
    assert files_under(tmp_path) == ["model", "model/weights"]


def test_a_directory_killed_between_two_renames_comes_back(tmp_path: Path) -> None:
    """Moved aside and not yet replaced, the old directory is the only copy: the next try starts from it."""
    target = tmp_path / "model"
    (tmp_path / f".model.1-a.old{PARTIAL}").mkdir()
    (tmp_path / f".model.1-a.old{PARTIAL}" / "weights").write_text("old")
    write_manifest(tmp_path / f".model.1-a.old{PARTIAL}")
    with pytest.raises(RunError, match="already exists"), whole_directory(target):
        pass
    with whole_directory(target, replace=True) as temporary:
        assert (target / "weights").read_text() == "old"
        shutil.copy(target / "weights", temporary)
    assert (target / "weights").read_text() == "old"


def test_the_present_directory_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.` can be written to like any other."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with whole_directory(Path()) as temporary:
        (temporary / "weights").write_text("new")
    assert (tmp_path / "here" / "weights").read_text() == "new"


@pytest.mark.parametrize("exists", [False, True])
def test_a_run_directory_is_private(tmp_path: Path, exists: bool) -> None:
    """Law 13: mode 0700, also where an open folder was there before, and ignored by git."""
    path = tmp_path / "runs" / "mine"
    if exists:
        path.mkdir(parents=True, mode=0o755)
    with RunDirectory(path).held():
        assert path.stat().st_mode & 0o777 == 0o700
        assert (path / ".gitignore").read_text() == "*\n"
        assert (path / "units").is_dir()


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    """While one process holds it, another is told so; once it has ended, by whatever end, the next may."""
    code = (
        "import sys; from pathlib import Path\n"
        "from backmerge.runs import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1])).held():\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    path = tmp_path / "run"
    other = subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process is using"), RunDirectory(path).held():
            pass
        (path / "experiment.yaml").write_text("name: x\n")
    finally:
        other.kill()
        other.communicate()
    with RunDirectory(path).held(), pytest.raises(RunError, match="another process"), RunDirectory(path).held():
        pass


def refuse_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A file system that has no locks, or none of directories, and says so by this error."""

    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)


def test_several_share_a_run(tmp_path: Path) -> None:
    """Any number of processes may share it, and leave alone what another has half-written; then one has it alone."""
    path = tmp_path / "run"
    with RunDirectory(path).held(is_shared=True):
        half = path / "units" / f"a.jsonl.1-a{PARTIAL}"
        half.write_text("half")
        with RunDirectory(path).held(is_shared=True):
            (path / "experiment.yaml").write_text("name: x\n")
            with pytest.raises(RunError, match="another process"), RunDirectory(path).held():
                pass
        assert half.exists()
    with RunDirectory(path).held():
        assert not half.exists()
        with pytest.raises(RunError, match="does not share it"), RunDirectory(path).held(is_shared=True):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
def test_without_locks_nothing_of_another_is_removed(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the file system has no locks nobody can tell who is alive: half-written things stay, and it is said."""
    refuse_locks(monkeypatch, number)
    run = RunDirectory(tmp_path / "run")
    half = run.units / f"a.jsonl.1-a{PARTIAL}"
    filled = run.tuned / f".seed-1.1-a{PARTIAL}"
    with run.held(is_shared=True):
        (run.path / "experiment.yaml").write_text("name: x\n")
        half.write_text("half")
        filled.mkdir(parents=True)
        with whole_directory(run.tuned / "seed-1") as temporary:
            (temporary / "weights").write_text("new")
        with claimed(run.path / "seed-1.lock") as is_free:
            assert is_free
    assert capsys.readouterr().err == ""
    with run.held():
        assert half.exists()
        assert filled.exists()
        assert (run.tuned / "seed-1" / "weights").read_text() == "new"
    assert "without locks" in capsys.readouterr().err


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not an answer about locks passes as it is."""
    refuse_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), RunDirectory(tmp_path / "run").held(is_shared=True):
        pass


def test_a_claim_is_of_one(tmp_path: Path) -> None:
    """While one has claimed a place another has not; then it may."""
    place = tmp_path / "deep" / "seed-1.lock"
    with claimed(place) as is_first, claimed(place) as is_second:
        assert is_first
        assert not is_second
    with claimed(place) as is_free:
        assert is_free


@pytest.mark.parametrize("has_links", [True, False])
def test_the_first_writes(tmp_path: Path, has_links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is there stays as it is, with links and without; nothing is next to it."""

    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not has_links:
        monkeypatch.setattr(os, "link", refused)
    path = tmp_path / "deep" / "file.txt"
    assert write_once(path, "first λ\n")
    assert not write_once(path, "second\n")
    assert path.read_text(encoding="utf-8") == "first λ\n"
    assert files_under(tmp_path) == ["deep", "deep/file.txt"]


def test_of_many_writers_one_is_first(tmp_path: Path) -> None:
    """Of threads that write a file at once exactly one is told that it did, and its text is there."""
    path, firsts = tmp_path / "file.txt", []

    def write(number: int) -> None:
        if write_once(path, str(number) * 1000):
            firsts.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() == str(firsts[0]) * 1000
    assert len(firsts) == 1


def test_a_torn_last_line_is_cut(tmp_path: Path) -> None:
    """Law 11: what a killed process left of a line is gone with the next one; whole lines stand."""
    run = RunDirectory(tmp_path)
    file = tmp_path / "sessions.jsonl"
    run.append("sessions.jsonl", {"n": 1, "what": "λ"})
    run.append("sessions.jsonl", {"n": 2})
    whole = file.read_bytes()
    assert [json.loads(line)["n"] for line in whole.splitlines()] == [1, 2]
    file.write_bytes(whole + '{"n": 3, "what": "λ'.encode()[:-1])
    run.append("sessions.jsonl", {"n": 4})
    assert file.read_bytes() == whole + b'{"n": 4}\n'
    file.write_bytes(b'{"n"')
    run.append("sessions.jsonl", {"n": 5})
    assert file.read_bytes() == b'{"n": 5}\n'


def test_a_run_that_was_killed_at_once_can_go_on(tmp_path: Path) -> None:
    """Killed after the directory was made and before its configuration was written, the same command works again."""
    run = RunDirectory(tmp_path / "run")
    with run.held():
        (run.path / f"experiment.yaml.1-a{PARTIAL}").write_text("half")
    with run.held():
        assert files_under(run.path) == [".gitignore", ".lock", "units"]


def test_a_run_whose_damaged_settings_were_deleted_continues(tmp_path: Path) -> None:
    """Messages tell users to delete a damaged `experiment.yaml`: the run is then still a run, also with results."""
    run = RunDirectory(tmp_path / "run")
    with run.held():
        run.begin("a: 1\n", {"a": 1})
        write_results(run.path, json.dumps({"inputs": {"a": 1}}))
    (run.path / "experiment.yaml").unlink()
    with run.held():
        run.begin("a: 2\n", {"a": 2})
    assert "results.json" in files_under(run.path / "earlier" / "1")


@pytest.mark.parametrize("name", ["thesis.tex", ".git", "records", "results.json"])
def test_a_folder_of_something_else_is_refused_untouched(tmp_path: Path, name: str) -> None:
    """A folder that holds other files is not made a run directory, and nothing in it changes, not even its mode."""
    path = tmp_path / "thesis"
    path.mkdir(mode=0o755)
    (path / name).write_text("years of work")
    (path / f"notes{PARTIAL}").write_text("a draft")
    with pytest.raises(RunError, match=r"not a run directory of backmerge"), RunDirectory(path).held():
        pass
    assert files_under(path) == sorted([name, f"notes{PARTIAL}"])
    assert path.stat().st_mode & 0o777 == 0o755


def test_file_is_refused_as_a_run_directory(tmp_path: Path) -> None:
    """A file in its place, or on the way to it, is one clear error."""
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match=r"is a file|cannot make"), RunDirectory(path).held():
            pass


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    """Half-written files and folders go when the directory is next held, at any depth, within one another, as links."""
    run = RunDirectory(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("x")
    with run.held():
        (run.path / "experiment.yaml").write_text("name: x\n")
        (run.units / f"a.jsonl.1-a{PARTIAL}").write_text("half")
        (run.units / "b.jsonl").write_text("whole")
        nested = run.tuned / f".seed-1.1-a{PARTIAL}"
        nested.mkdir(parents=True)
        (nested / f"weights.1-b{PARTIAL}").write_text("half")
        (run.path / f"link{PARTIAL}").symlink_to(elsewhere)
    with run.held():
        left = files_under(run.path)
    assert not [name for name in left if name.endswith(PARTIAL)]
    assert "units/b.jsonl" in left
    assert (elsewhere / "kept").exists()


def verdicts() -> list[Verdict]:
    """Two verdicts."""
    return [Verdict("a", True, False), Verdict("b", None, None, "unparsed")]


def test_a_unit_is_made_once(tmp_path: Path) -> None:
    """What is there is read and not made again, in this process and the next; another key is another unit."""
    run = RunDirectory(tmp_path / "run")
    made = []

    def make() -> list[Verdict]:
        made.append(1)
        return verdicts()

    with run.held():
        assert not run.has_unit("verdicts", "k1")
        assert run.unit("verdicts", "k1", Verdict, make) == verdicts()
        assert run.has_unit("verdicts", "k1")
    again = RunDirectory(tmp_path / "run")
    assert again.unit("verdicts", "k1", Verdict, make) == verdicts()
    assert len(made) == 1
    again.unit("verdicts", "k2", Verdict, make)
    assert len(made) == 2


def test_a_unit_that_dies_is_not_there(tmp_path: Path) -> None:
    """Killed while its records come in one by one, a unit leaves nothing, and is made whole the next time."""
    run = RunDirectory(tmp_path / "run")

    def dies() -> Iterator[Verdict]:
        yield verdicts()[0]
        raise Killed

    with run.held():
        with pytest.raises(Killed):
            run.unit("verdicts", "k", Verdict, dies)
        assert not run.has_unit("verdicts", "k")
        assert list(run.units.iterdir()) == []
        assert run.unit("verdicts", "k", Verdict, verdicts) == verdicts()


def test_results_hold_numbers_only(tmp_path: Path) -> None:
    """NaN is not JSON: it is refused before the file is touched."""
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.write_json("samples.json", {"value": 0.5, "name": "λ"})
    with pytest.raises(ValueError, match="JSON"):
        run.write_json("samples.json", {"value": float("nan")})
    assert json.loads((run.path / "samples.json").read_text(encoding="utf-8")) == {"value": 0.5, "name": "λ"}


def test_the_log_grows(tmp_path: Path) -> None:
    """Each line is kept, with its time."""
    run = RunDirectory(tmp_path)
    run.log("first")
    run.log("second λ")
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line[20:] for line in lines] == ["first", "second λ"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_may_not_be_written(tmp_path: Path) -> None:
    """A folder without leave to write is one clear error."""
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(RunError, match="cannot make"), RunDirectory(tmp_path / "closed" / "run").held():
        pass


@pytest.mark.parametrize(
    "how",
    [
        lambda lines: lines[1:],
        lambda lines: [lines[0], *lines],
        lambda lines: lines[:1],
        lambda _: [],
        lambda lines: [lines[0].replace("true", "false"), *lines[1:]],
        lambda lines: [lines[0].replace("true", '"no"'), *lines[1:2]],
        lambda lines: [lines[0].replace('"a"', '"nobody"'), *lines[1:2]],
        lambda lines: [*lines[:2], lines[2][:-3]],
    ],
    ids=["first gone", "twice", "half", "empty", "flipped", "another type", "another id", "torn seal"],
)
def test_a_damaged_unit_is_one_clear_error(tmp_path: Path, how: Callable[[list[str]], list[str]]) -> None:
    """With a seal any change is seen; without one, as in earlier versions, what does not fit its examples is."""
    run = RunDirectory(tmp_path / "run")
    verdicts = [Verdict("a", harmful=True, refusal=False), Verdict("b", harmful=False, refusal=True)]
    with run.held():
        assert run.unit("verdicts", "k", Verdict, lambda: verdicts, ["a", "b"]) == verdicts
        (file,) = run.units.iterdir()
        lines = file.read_text().splitlines()
        file.write_text("".join(f"{line}\n" for line in lines[:2]))
        assert run.unit("verdicts", "k", Verdict, lambda: verdicts, ["a", "b"]) == verdicts
        file.write_text("".join(f"{line}\n" for line in how(lines)))
        with pytest.raises(DataError, match=r"is damaged|not a verdict record"):
            run.unit("verdicts", "k", Verdict, lambda: verdicts, ["a", "b"])


@pytest.mark.parametrize("value", [7.0, float("nan"), "0.5"])
def test_unsound_values_are_refused_before_they_are_written(value: Any, tmp_path: Path) -> None:
    """A metric of the user's own that is wrong stops the run, and leaves no unit that stops each later one."""
    run = RunDirectory(tmp_path / "run")
    with run.held(), pytest.raises(DataError, match="the new record for 'a' is not a valid value"):
        run.keep_unit("values", "k", Value, [Value("a", "accuracy", value)], ["a"])
    with run.held(), pytest.raises(DataError, match="each example the same number of times"):
        run.keep_unit("values", "k", Value, [Value("a", "accuracy", 1.0)], ["a", "b"])
    assert list(run.units.iterdir()) == []


def test_a_unit_that_vanishes_is_an_error(tmp_path: Path) -> None:
    """A file that was there a moment ago counts neither as empty nor as not yet made."""
    with pytest.raises(DataError, match="was deleted while this command was running"):
        RunDirectory(tmp_path / "run").read_unit("verdicts", "k", Verdict, ["a"])


def test_a_directory_made_for_nothing_is_removed(tmp_path: Path) -> None:
    """A user error before any work leaves no folder; one after it keeps what is done."""
    run = RunDirectory(tmp_path / "runs" / "mine")
    with pytest.raises(RunError, match="wrong"), run.held():
        raise RunError("wrong")
    assert list(tmp_path.iterdir()) == []

    def fails_late() -> None:
        with run.held():
            run.unit("verdicts", "k", Verdict, lambda: [Verdict("a", harmful=True, refusal=False)])
            raise RunError("wrong")

    with pytest.raises(RunError, match="wrong"):
        fails_late()
    assert (run.units / "verdicts-k.jsonl").is_file()


def test_results_that_were_changed_are_found(tmp_path: Path) -> None:
    """Records, samples and results are held to their digests; runs without digests pass."""
    run = RunDirectory(tmp_path / "run")
    with run.held():
        write_whole(run.records / "verdicts.jsonl", '{"harmful": true}\n')
        run.write_json("samples.json", [])
        write_results(run.path, '{"scores": []}')
    check_digests(run.path)
    for file, content in (
        (run.records / "verdicts.jsonl", '{"harmful": false}\n'),
        (run.path / "results.json", "{}"),
        (run.path / "samples.json", ""),
        (run.path / "digests.json", "[1]"),
    ):
        before = file.read_text()
        file.write_text(content)
        with pytest.raises(RunError, match=f"{file.name} (was changed|is damaged)"):
            check_digests(run.path)
        file.write_text(before)
    (run.path / "digests.json").unlink()
    check_digests(run.path)


@pytest.mark.parametrize("line", ["{", "[1]", '{"model": 1}', "[" * 100_000, None])
def test_damaged_records_are_one_clear_error(tmp_path: Path, line: str | None) -> None:
    """Of a run without digests too: never a traceback."""
    run = RunDirectory(tmp_path / "run")
    with run.held():
        write_results(run.path, "{}")
        for name in ("completions", "verdicts") if line is not None else ():
            write_whole(run.records / f"{name}.jsonl", f"{line}\n")
    (run.path / "digests.json").unlink()
    with pytest.raises(RunError, match="missing or damaged"):
        read_records(run.path)


def test_an_answer_without_its_verdict_is_damage(tmp_path: Path) -> None:
    """Answers and verdicts are read together, so that one of either that is missing would shift all others."""
    run = RunDirectory(tmp_path / "run")
    place = {"model": "base", "benchmark": "b", "split": "whole", "kind": "safety", "example": "a"}
    answer = {"prompt": "p", "text": "t", "num_tokens": 1, "finished": True, "question": "q", "cluster": "c"}
    with run.held():
        write_whole(run.records / "completions.jsonl", json.dumps(place | answer) + "\n")
        write_whole(run.records / "verdicts.jsonl", "")
        write_results(run.path, "{}")
    with pytest.raises(RunError, match="base on b: the verdicts do not belong to its answers"):
        read_records(run.path)
