"""Time the demonstration from a clean start: `python -m benchmarks.demo` (or `make bench`)."""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BUDGETS = {(): 240, ("--fast",): 75}  # seconds on 2 cores


def timed(options: tuple[str, ...]) -> dict[str, object]:
    """Wall and CPU seconds of one demonstration, and its peak resident memory so far, in GB."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "backmerge", "demo", *options, "--out", str(Path(scratch) / "run")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "command": " ".join(["backmerge demo", *options]),
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "budget_s": BUDGETS[options],
        "share_of_budget": round(wall / BUDGETS[options], 2),
        "peak_resident_gb": round(after.ru_maxrss / 1e6, 2),  # kilobytes, on Linux
    }


def main() -> None:
    """Print one JSON line per demonstration, and the machine."""
    print(json.dumps({"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}))
    for options in BUDGETS:
        print(json.dumps(timed(options)), flush=True)


if __name__ == "__main__":
    main()
