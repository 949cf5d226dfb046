"""What holds for worker processes alone: they die, are stopped, print, and see their own GPUs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from backmerge.errors import GenerationError, RunError
from backmerge.execution import ExecutionSettings, Executor, Work, executor_of
from execution import units

DRIVER = """
import sys
from pathlib import Path
from backmerge.execution import ExecutionSettings, Work, executor_of
settings = ExecutionSettings(executor="pool", num_workers=2, num_gpus=0)
works = [Work(str(x), {"directory": sys.argv[1]}) for x in range(4)]
try:
    with executor_of(sys.argv[2], settings, shared=Path(sys.argv[1])) as executor:
        executor.carry_out(works, advance=print, on_done=print)
except KeyboardInterrupt:
    sys.exit(130)
"""


def carry(function: Any, works: list[Work], shared: Path, advance: Any = lambda *_: None, **settings: Any) -> list[Any]:
    """On two workers, unless told otherwise."""
    with pool(function, shared, **settings) as executor:
        return executor.carry_out(works, advance=advance, on_done=lambda *_: None)


def pool(function: Any, shared: Path, **settings: Any) -> Executor:
    """Two workers, unless told otherwise."""
    given = ExecutionSettings(**({"executor": "pool", "num_workers": 2, "num_gpus": 0} | settings))
    return executor_of(function, given, shared=shared)


def alive(pid: int) -> bool:
    """Whether a process is at work; one that is dead but not yet reaped is not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def pids(directory: Path) -> list[int]:
    """Of those that noted theirs."""
    return [int(file.stem) for file in directory.glob("*.pid")]


def wait_for(condition: Any, seconds: float = 30) -> None:
    """Until it holds; a failure if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_a_killed_workers_unit_is_done_again(tmp_path: Path) -> None:
    """Each unit once or, where its worker was killed, more often; steps are reported once, and deaths are said."""
    told: list[int] = []
    notes: list[str] = []

    def advance(steps: int, note: str = "", /) -> None:
        told.append(steps)
        notes.append(note)

    works = [Work(f"k{x}", {"x": x, "deaths": 2 if x == 1 else 0, "directory": str(tmp_path)}) for x in range(3)]
    results = carry(units.die, works, tmp_path, advance=advance)
    assert results == [{"x": 0, "tries": 1}, {"x": 1, "tries": 3}, {"x": 2, "tries": 1}]
    assert sum(told) == 9
    assert notes.count("a worker ended by SIGKILL; its unit is run again") == 2


def test_a_unit_that_kills_its_workers_is_named(tmp_path: Path) -> None:
    """After so many retries, with what killed it and where its output is."""
    works = [Work("unit-5", {"x": 5, "deaths": 9, "directory": str(tmp_path)})]
    with pytest.raises(RunError, match=r"unit-5.* 2 times, the last time by SIGKILL") as caught:
        carry(units.die, works, tmp_path, retries=1)
    assert (tmp_path / "5.tries").read_text() == "xx"
    assert "memory" in str(caught.value.remedy)
    assert str(tmp_path / "workers" / "worker-1.log") in str(caught.value.remedy)


def test_a_worker_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    """A function that is not there is not tried for ever."""
    with pytest.raises(RunError, match="a worker process ended 1 times, the last time with exit code 1"):
        carry("execution.units:missing", [Work("a", {})], tmp_path, retries=0)
    assert "no attribute 'missing'" in (tmp_path / "workers" / "worker-1.log").read_text()


def test_an_error_stops_the_others_and_leaves_no_process(tmp_path: Path) -> None:
    """A failed unit does not wait for one that takes a minute."""
    started, before = time.monotonic(), children()
    with pytest.raises(GenerationError):
        carry(units.fail, [Work("a", {}), Work("b", {"how": "ours"})], tmp_path)
    assert time.monotonic() - started < 20
    assert set(children()) <= set(before)


def children() -> list[int]:
    """The living children of this process."""
    with contextlib.suppress(FileNotFoundError):
        found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return [int(pid) for pid in found if alive(int(pid))]
    return []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
@pytest.mark.parametrize("function", [units.wait_long, units.ignore_signals], ids=lambda f: f.__name__)
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_no_process_outlives_the_driver(tmp_path: Path, function: Any, sent: signal.Signals) -> None:
    """Ctrl-C, or any end of the driver, stops workers and what they started, within seconds."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (tmp_path / "driver.log").open("wb") as output:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(tmp_path), f"{function.__module__}:{function.__name__}"],
            env={**os.environ, "PYTHONPATH": path},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_for(lambda: len(pids(tmp_path)) == 4)
        assert all(alive(pid) for pid in pids(tmp_path))
        driver.send_signal(sent)
        code = driver.wait(timeout=15)
        assert code == (130 if sent == signal.SIGINT else -sent)
        wait_for(lambda: not any(alive(pid) for pid in pids(tmp_path)), seconds=5)
        is_tidied = function is units.wait_long and sent == signal.SIGINT
        assert len(list(tmp_path.glob("*.tidied"))) == (2 if is_tidied else 0)
    finally:
        driver.kill()
        driver.wait()
        for pid in pids(tmp_path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_worker_output_goes_to_separate_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The bar is not torn, what is printed is in a private file, and nobody waits for what is typed."""
    assert carry(units.speak, [Work("a", {})], tmp_path) == [""]
    assert capfd.readouterr() == ("", "")
    log = tmp_path / "workers" / "worker-1.log"
    assert set(log.read_text().splitlines()) == {"kite on standard output", "kite of a program"}
    assert log.parent.stat().st_mode & 0o777 == 0o700


def test_workers_see_the_environment_and_their_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU each, of those that the driver sees."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setenv("KITE", "red")
    names = ["CUDA_VISIBLE_DEVICES", "KITE"]
    works = [Work(str(x), {"names": names, "directory": str(tmp_path)}) for x in range(2)]
    results = carry(units.environment, works, tmp_path, num_workers=None, num_gpus=None)
    assert sorted(result["CUDA_VISIBLE_DEVICES"] for result in results) == ["4", "6"]
    assert {result["KITE"] for result in results} == {"red"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"


@pytest.mark.parametrize(("own", "num_workers", "expected"), [(None, 2, "3"), (None, 8, "1"), ("5", 2, "5")])
def test_workers_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str | None, num_workers: int, expected: str
) -> None:
    """Each computes with its share of them, at least one; the user's own number stands."""
    monkeypatch.setattr("torch.get_num_threads", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    works = [Work(str(x), {"names": ["OMP_NUM_THREADS"], "directory": str(tmp_path)}) for x in range(2)]
    results = carry(units.environment, works, tmp_path, num_workers=num_workers)
    assert [result["OMP_NUM_THREADS"] for result in results] == [expected] * 2


def test_no_more_workers_are_started_than_there_are_units(tmp_path: Path) -> None:
    """And none runs in the driver."""
    results = carry(units.place, [Work("a", {}), Work("b", {})], tmp_path, num_workers=8)
    assert os.getpid() not in results
    assert len(list((tmp_path / "workers").iterdir())) == 2


def do(executor: Executor, *works: Work) -> list[Any]:
    """Do units of an executor that is open."""
    return executor.carry_out(works, advance=lambda *_: None, on_done=lambda *_: None)


def test_workers_are_kept_between_calls_and_end_with_the_block(tmp_path: Path) -> None:
    """More units start more workers; those released, or stopped by a failure, are started again when needed."""
    a, b = Work("a", {}), Work("b", {})
    before = set(children())

    def num_workers() -> int:
        return len(set(children()) - before)

    with pool(units.place, tmp_path) as executor:
        assert num_workers() == 0
        (first,) = do(executor, a)
        assert do(executor, b) == [first]
        assert first in do(executor, a, b)
        assert num_workers() == 2
        executor.release()
        assert num_workers() == 0
        assert do(executor, a) != [first]
    assert num_workers() == 0
    with pool(units.fail, tmp_path) as executor:
        for works in ([Work("a", {"how": "ours"}), Work("b", {})], [Work("a", {"how": "ours"})]):
            with pytest.raises(GenerationError):
                do(executor, *works)
            assert num_workers() == 0


def test_an_idle_worker_that_died_is_replaced(tmp_path: Path) -> None:
    """The system may have killed it between two calls."""
    with pool(units.place, tmp_path, retries=1) as executor:
        (killed,) = do(executor, Work("a", {}))
        os.kill(killed, signal.SIGKILL)
        assert do(executor, Work("a", {})) != [killed]
