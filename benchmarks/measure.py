"""What a command costs: wall and CPU seconds, peak anonymous memory, bytes read. Linux only."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

EVERY = 0.02  # seconds between samples of memory
LAST_LINES = 2000  # characters of a failed command's output that are shown


class Cost(NamedTuple):
    """Of one whole process, its children included.

    Attributes:
        wall: Seconds from start to exit.
        cpu: Seconds of user and system time.
        peak_anonymous: Bytes of memory that no file backs (RssAnon), the most of any sample, summed over the tree.
        num_read: Bytes that the process itself asked for by read calls; what it reads through a mapping is not seen.
    """

    wall: float
    cpu: float
    peak_anonymous: int
    num_read: int


def cost_of(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Cost:
    """Run a command to its end and measure it.

    Args:
        command: Program and arguments.
        environment: Added to this process's own.
        log: Takes its output.

    Raises:
        RuntimeError: it failed; the message holds the end of its output.
    """
    with log.open("wb") as output:
        started = time.monotonic()
        child = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        peak = 0
        # WNOWAIT leaves the ended process for a last look at what it read
        while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            peak = max(peak, sum(_anonymous(pid) for pid in _tree(child.pid)))
            time.sleep(EVERY)
        wall = time.monotonic() - started
    num_read = _num_read(child.pid)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        end = log.read_text(errors="replace")[-LAST_LINES:]
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}:\n{end}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, peak, num_read)


def combined(costs: Sequence[Cost]) -> Cost:
    """The cost of commands one after the other."""
    return Cost(
        sum(cost.wall for cost in costs),
        sum(cost.cpu for cost in costs),
        max(cost.peak_anonymous for cost in costs),
        sum(cost.num_read for cost in costs),
    )


def cpu_so_far() -> float:
    """Seconds of user and system time of this process and its descendants until now, ended ones included."""
    ticks = 0
    for pid in _tree(os.getpid()):
        try:
            line = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        # after the name, which may hold spaces: fields 14 to 17 are own and waited-for children's times
        ticks += sum(map(int, line.rpartition(")")[2].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _tree(pid: int) -> list[int]:
    """A process and its descendants; those that have ended meanwhile are left out."""
    found = [pid]
    for parent in found:  # grows while it is walked
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                continue
    return found


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def _num_read(pid: int) -> int:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))
