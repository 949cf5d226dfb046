"""Run units in worker processes of this machine, each with its own GPUs.

The standard library's pools fail as a whole when one of their processes dies, import the caller's main program again,
and leave behind what a killed worker has started; hence this loop.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from multiprocessing import connection as pipes
from pathlib import Path
from typing import Any

from backmerge.errors import RunError
from backmerge.execution.dispatch import ExecutionSettings, Executor
from backmerge.execution.work import OnDone, ProgressAggregator, Work, from_plain
from backmerge.execution.worker import receive, send

VARIABLE = "CUDA_VISIBLE_DEVICES"
THREADS = "OMP_NUM_THREADS"


def visible_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return this process's GPUs as in `CUDA_VISIBLE_DEVICES` (numbers, or ids of whole or partitioned GPUs)."""
    listed = environment.get(VARIABLE)
    if listed is not None:
        names = (name.strip() for name in listed.split(","))
        # like CUDA, ignore everything after an invalid entry
        return tuple(takewhile(lambda name: name not in {"", "-1"}, names))
    import torch

    return tuple(str(number) for number in range(torch.cuda.device_count()))


def workers_for(gpus: Sequence[str], per_worker: float) -> int:
    """Return for how many workers there are GPUs; one if a worker needs none, or more than there are."""
    return max(1, int(len(gpus) / per_worker + 1e-9)) if per_worker > 0 else 1


def gpus_of(worker: int, gpus: Sequence[str], per_worker: float) -> tuple[str, ...]:
    """Return the GPUs of one worker: neighbours, or one that several share; surplus workers start again at the first.

    Args:
        worker: Counted from 0.
        gpus: All of them.
        per_worker: GPUs for each worker; a fraction of one lets several workers share it.
    """
    if per_worker <= 0 or not gpus:
        return ()
    if per_worker <= 1:
        return (gpus[int(worker * per_worker + 1e-9) % len(gpus)],)
    whole = min(int(per_worker), len(gpus))
    first = worker % (len(gpus) // whole) * whole
    return tuple(gpus[first : first + whole])


def threads_of(num_workers: int) -> int:
    """Return each worker's share of the threads that this process would use; with all of them, workers would wait."""
    import torch

    return max(1, torch.get_num_threads() // num_workers)


POLL = 0.2  # seconds between two checks for dead workers
GRACE = 3.0  # seconds that stopped workers have to clean up
# the import path is passed on, since the caller may have changed its own
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from backmerge.execution.worker import main; main(int(sys.argv[2]), sys.argv[3])"
)


class Pool(Executor):
    """Does units in worker processes; their output goes to files in the folder `workers`.

    What the function keeps in a worker, such as an engine with its model, stays there between units and calls.
    """

    def __init__(self, function: str, settings: ExecutionSettings, shared: Path) -> None:
        super().__init__(function, settings, shared)
        self._workers: list[_Worker] = []

    def _carry_out(self, works: Sequence[Work], told: ProgressAggregator, on_done: OnDone) -> list[Any]:
        todo = deque(range(len(works)))
        died: Counter[int] = Counter()
        results: dict[int, Any] = {}
        try:
            self._start(len(works))
            while len(results) < len(works):
                pipes.wait([worker.connection for worker in self._workers], POLL)
                for number, worker in enumerate(self._workers):
                    is_dead = worker.is_dead()  # checked first: then all that it sent is in the pipe
                    for message in worker.messages():
                        _take(message, worker, works, results, told, on_done)
                    if is_dead:
                        _note_death(worker, works, died, self.settings.retries, told)
                        if worker.unit is not None:
                            todo.appendleft(worker.unit)
                        worker.stop()
                        self._workers[number] = worker.replaced()
                    elif worker.is_ready and worker.unit is None and todo:
                        worker.begin(todo.popleft(), works)
        finally:
            if len(results) < len(works):  # units are still running
                self.release()
        return [results[unit] for unit in range(len(works))]

    def _start(self, num_units: int) -> None:
        """Start workers for that many units, at most as many as the settings allow; existing workers count."""
        gpus = visible_gpus(os.environ)
        per_worker = (1.0 if gpus else 0.0) if self.settings.num_gpus is None else self.settings.num_gpus
        most_workers = self.settings.num_workers or workers_for(gpus, per_worker)
        num_workers = min(most_workers, num_units)
        logs = self.shared / "workers"
        logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        for number in range(len(self._workers), num_workers):
            environment = dict(os.environ)
            if gpus:
                environment[VARIABLE] = ",".join(gpus_of(number, gpus, per_worker))
            if most_workers > 1:
                environment.setdefault(THREADS, str(threads_of(most_workers)))
            self._workers.append(_Worker(self.function, environment, logs / f"worker-{number + 1}.log"))

    def release(self) -> None:
        """End all worker processes and everything that they started."""
        workers, self._workers = self._workers, []
        try:
            for worker in workers:
                worker.ask_to_stop()
            deadline = time.monotonic() + GRACE
            while time.monotonic() < deadline and any(worker.process.poll() is None for worker in workers):
                time.sleep(0.02)
        finally:  # also after a second Ctrl-C
            for worker in workers:
                worker.stop()


def _take(
    message: Mapping[str, Any],
    worker: _Worker,
    works: Sequence[Work],
    results: dict[int, Any],
    told: ProgressAggregator,
    on_done: OnDone,
) -> None:
    """Handle a worker's message; raises the error of its unit, if it failed."""
    if "ready" in message:
        worker.is_ready = True
        return
    unit = worker.unit
    assert unit is not None
    work = works[unit]
    if "failed" in message:
        raise from_plain(message["failed"], work.key)
    told.reached(work.key, message["steps"], message.get("note", ""))
    if "done" in message:
        worker.unit = None
        results[unit] = message["done"]
        on_done(work, message["done"])


def _note_death(
    worker: _Worker, works: Sequence[Work], died: Counter[int], retries: int, told: ProgressAggregator
) -> None:
    unit = -1 if worker.unit is None else worker.unit  # -1: before it got a unit
    died[unit] += 1
    how, remedy = worker.how_it_died()
    if died[unit] <= retries:
        told.note(f"a worker ended {how}; its unit is run again")
        return
    what = "a worker process ended" if unit < 0 else f"the unit '{works[unit].key}' made its worker process end"
    raise RunError(
        f"{what} {died[unit]} times, the last time {how}",
        remedy=f"{remedy}its output is in {worker.log}. Finished work is kept.",
    )


class _Worker:
    """One worker process and our end of its pipe."""

    def __init__(self, function: str, environment: Mapping[str, str], log: Path) -> None:
        self.function = function
        self.environment = environment
        self.log = log
        self.unit: int | None = None
        self.is_ready = False
        self.connection, theirs = pipes.Pipe()
        with theirs, log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, json.dumps(sys.path), str(theirs.fileno()), function],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                env=dict(environment),
                start_new_session=True,
            )

    def begin(self, unit: int, works: Sequence[Work]) -> None:
        self.unit = unit
        with contextlib.suppress(OSError):  # it just died; the main loop notices that
            send(self.connection, dict(works[unit].spec))

    def messages(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(EOFError, OSError):
            while self.connection.poll():
                yield receive(self.connection)

    def is_dead(self) -> bool:
        return self.process.poll() is not None

    def how_it_died(self) -> tuple[str, str]:
        """Return how the process ended, and what to do about it if that is known."""
        code = self.process.wait()
        if code >= 0:
            return f"with exit code {code}", ""
        remedy = ""
        if -code == signal.SIGKILL:
            remedy = "if memory ran out (the system then kills processes), use fewer workers or a smaller batch; "
        return f"by {signal.Signals(-code).name}", remedy

    def replaced(self) -> _Worker:
        return _Worker(self.function, self.environment, self.log)

    def ask_to_stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()

    def stop(self) -> None:
        """Kill the worker and everything that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.connection.close()
