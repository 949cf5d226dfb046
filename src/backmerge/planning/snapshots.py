"""The path of the tuning itself: the models after so many steps, and averages of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from backmerge.checkpoints.adapter import open_weights
from backmerge.checkpoints.reader import Checkpoint, Weights
from backmerge.errors import RunError
from backmerge.merging.methods.task_vectors import task_arithmetic
from backmerge.merging.recipe import Variant

SNAPSHOTS = "snapshots"  # as fine-tuning names the folder, with `step-N` in it


def steps_kept(tuned: Sequence[Weights]) -> list[int]:
    """The steps at which a snapshot of every tuned model was kept.

    Raises:
        RunError: there are none.
    """
    found = [{int(place.name.removeprefix("step-")) for place in _folder(each).glob("step-*")} for each in tuned]
    steps = sorted(set.intersection(*found)) if found else []
    if not steps:
        raise RunError(
            "no snapshots of the tuning were kept",
            remedy="set finetune.keep_every to a number of steps; it trains anew, and keeps them.",
        )
    return steps


def snapshot_of(tuned: Weights, base: Checkpoint, step: int) -> Weights:
    """The model after so many steps."""
    return open_weights(_folder(tuned) / f"step-{step}", base)


def averaged(tuned: Weights, base: Checkpoint, step: int, decay: float) -> Variant:
    """The exponential moving average of the snapshots up to a step: m ← decay·m + (1 - decay)·snapshot, m₁ the first.

    An average of deltas is the delta of the average, so that it is a recipe as any other.
    """
    steps = [kept for kept in steps_kept([tuned]) if kept <= step]
    shares = [(1.0 if place == 0 else 1 - decay) * decay ** (len(steps) - 1 - place) for place in range(len(steps))]
    snapshots = tuple(snapshot_of(tuned, base, kept) for kept in steps)
    if len(snapshots) == 1:
        return Variant(base, snapshots[0])
    return Variant(base, snapshots, task_arithmetic, 1.0, {"weight": shares})


def _folder(tuned: Weights) -> Path:
    return tuned.directory / SNAPSHOTS
