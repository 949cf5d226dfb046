"""What each executor costs before a unit does anything: its start, and its share of each unit.

    python benchmarks/scale.py [--ray]

Units that do nothing are carried out twice over: few, which shows the start, and many, which shows each one's share.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backmerge.execution import ExecutionSettings, Work, executor_of

FEW, MANY = 2, 2002


def nothing(spec: Mapping[str, Any], advance: Any) -> int:
    """Tell one step and give back what was given."""
    advance(1)
    return int(spec["x"])


def seconds(executor: str, num_units: int, shared: Path) -> float:
    """Wall time of so many units on two workers."""
    settings = ExecutionSettings(executor=executor, num_workers=2, num_gpus=0, ray_address="local")
    works = [Work(str(x), {"x": x}) for x in range(num_units)]
    started = time.perf_counter()
    with executor_of("scale:nothing", settings, shared=shared) as opened:
        results = opened.carry_out(works, advance=lambda *_: None, on_done=lambda *_: None)
    assert results == list(range(num_units))
    return time.perf_counter() - started


def main() -> None:
    """Print one row per executor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ray", action="store_true", help="Ray too, which must be installed.")
    executors = ["in-process", "pool", *(["ray"] if parser.parse_args().ray else [])]
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, two workers\n")
    print("| executor | start, s | a unit, ms |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for executor in executors:
            few, many = (min(seconds(executor, number, Path(folder)) for _ in range(2)) for number in (FEW, MANY))
            print(f"| {executor} | {few:.2f} | {max(many - few, 0) / (MANY - FEW) * 1000:.2f} |", flush=True)


if __name__ == "__main__":
    main()
