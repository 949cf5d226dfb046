"""States that a killed training goes on from: whole, of the same training, or not taken at all.

They lie in a hidden folder beside the result, whose name holds the training's key: one with other settings leaves them
alone. A state counts only once it carries its mark, which is written last; what a killed process left half-written
never does.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from backmerge.runs import sync_directory, write_whole

MARK = "complete"


def state_directory(result: Path, key: str) -> Path:
    """Where the states of a training lie whose result will be at `result`."""
    result = result.absolute()
    return result.with_name(f".{result.name}.training-{key[:8]}")


def left_by_others(directory: Path) -> list[Path]:
    """Folders with states of trainings for the same place, with other settings or other data."""
    beginning = directory.name.rpartition("-")[0]
    return sorted(place for place in directory.parent.glob(f"{beginning}-*") if place != directory)


def newest_complete(directory: Path, *, before: int) -> Path | None:
    """The state with the most steps, fewer than `before`, that is whole; the others are removed."""
    whole: list[tuple[int, Path]] = []
    for state in directory.glob("checkpoint-*"):
        step = int(state.name.rpartition("-")[2])
        if (state / MARK).is_file() and step < before:
            whole.append((step, state))
        else:
            shutil.rmtree(state)
    return max(whole)[1] if whole else None


def mark_complete(state: Path) -> None:
    """Say that a state is whole, once its bytes are on the disk."""
    for file in sorted(state.rglob("*")):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    sync_directory(state)
    write_whole(state / MARK, "")
