"""Units of work for the tests, in a module that every worker can import."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import backmerge.errors
from backmerge.progress import Advance
from backmerge.runs import write_whole


class OwnError(backmerge.errors.GenerationError):
    """An error of a user's own, whose arguments are not those of ours."""

    def __init__(self, number: int) -> None:
        super().__init__(f"kite {number}", remedy="tape", example="7")
        self.number = number


def square(spec: Mapping[str, Any], advance: Advance) -> dict[str, Any]:
    """Tell three steps, write the square into a file, and give it with what the unit was told."""
    for _ in range(3):
        advance(1, "squaring")
    write_whole(Path(spec["directory"]) / f"{spec['x']}.txt", f"{spec['x'] ** 2}\n")
    return {"square": spec["x"] ** 2, "spec": dict(spec)}


def fail(spec: Mapping[str, Any], advance: Advance) -> None:
    """Fail in the way that is asked for; others wait."""
    match spec.get("how"):
        case "ours":
            raise backmerge.errors.GenerationError("no answer", remedy="ask again", example="17")
        case "own":
            raise OwnError(3)
        case "disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "units/x.jsonl")
        case "fault":
            raise ZeroDivisionError("λ by nothing")
        case _:
            time.sleep(60)


def no_plain_data(spec: Mapping[str, Any], advance: Advance) -> object:
    """Give what JSON does not hold."""
    return object()


def die(spec: Mapping[str, Any], advance: Advance) -> dict[str, Any]:
    """Tell two steps of three and be killed, so many times; then do the unit."""
    tries = Path(spec["directory"]) / f"{spec['x']}.tries"
    with tries.open("a") as stream:
        stream.write("x")
    advance(1)
    advance(1)
    if len(tries.read_text()) <= spec["deaths"]:
        time.sleep(0.3)  # the driver hears of the steps
        os.kill(os.getpid(), signal.SIGKILL)
    advance(1)
    return {"x": spec["x"], "tries": len(tries.read_text())}


def slow_square(spec: Mapping[str, Any], advance: Advance) -> dict[str, Any]:
    """Note that it is begun, tell three steps over three seconds, and give the square and the node."""
    with (Path(spec["directory"]) / f"{spec['x']}.begun").open("a") as stream:
        stream.write("x")
    for _ in range(3):
        time.sleep(1)
        advance(1)
    import ray

    return {"square": spec["x"] ** 2, "node": ray.get_runtime_context().get_node_id()}


def wait_alone(spec: Mapping[str, Any], advance: Advance) -> None:
    """Note the process's id, and work for a minute."""
    (Path(spec["directory"]) / f"{os.getpid()}.pid").touch()
    time.sleep(60)


def wait_long(spec: Mapping[str, Any], advance: Advance) -> None:
    """Start a program, note both processes' ids, and work for a minute."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    for pid in (os.getpid(), child.pid):
        (Path(spec["directory"]) / f"{pid}.pid").touch()
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        (Path(spec["directory"]) / f"{os.getpid()}.tidied").touch()


def ignore_signals(spec: Mapping[str, Any], advance: Advance) -> None:
    """Work on for a minute, whatever asks to stop."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wait_long(spec, advance)


def speak(spec: Mapping[str, Any], advance: Advance) -> str:
    """Write to both streams, also as a program does, and read what is typed."""
    print("kite on standard output")  # noqa: T201
    subprocess.run([sys.executable, "-c", "import sys; print('kite of a program', file=sys.stderr)"], check=True)
    return sys.stdin.read()


def environment(spec: Mapping[str, Any], advance: Advance) -> dict[str, str | None]:
    """The variables that are asked for, once two workers have a unit."""
    here = Path(spec["directory"])
    (here / f"{os.getpid()}.began").touch()
    deadline = time.monotonic() + 30
    while len(list(here.glob("*.began"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    return {name: os.environ.get(name) for name in spec["names"]}


def place(spec: Mapping[str, Any], advance: Advance) -> int:
    """The process that the unit runs in."""
    return os.getpid()
