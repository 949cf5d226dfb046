"""Steps and learning rates: those of the closed form, also where the snapshot is taken."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import model_directory
from backmerge.demo.benchmarks import plan_examples
from backmerge.errors import ConfigError
from backmerge.finetuning import trainer
from backmerge.finetuning.datasets import TrainingData
from backmerge.finetuning.settings import (
    Batches,
    FinetuneSettings,
    batches,
    learning_rate_at,
    num_steps,
    schedule_steps,
)
from backmerge.finetuning.trainer import train_model

PAPER = FinetuneSettings(dataset="code")


@pytest.mark.parametrize(
    ("examples", "batch_size", "step", "share"),
    [(9000, 8, 500, 0.993), (9000, 4, 500, 0.741), (1990, 8, 200, 0.917), (1990, 4, 200, 0.997)],
)
def test_the_papers_snapshots(examples: int, batch_size: int, step: int, share: float) -> None:
    """The share of the peak at the paper's snapshots: 500 steps of 9,000 rows, 200 of the tools task's 1,990."""
    settings = PAPER.model_copy(update={"batch_size": batch_size, "snapshot_steps": step})
    assert num_steps(settings, examples) == step
    rate = learning_rate_at(step, settings, schedule_steps(settings, examples))
    assert rate / settings.learning_rate == pytest.approx(share, abs=5e-4)  # given to three digits


def test_a_snapshot_is_taken_from_the_middle_of_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after 7 of 30 steps, each step's rate is that of the whole schedule, and not of one of 7 steps."""
    rates: list[float] = []

    class Watching(TrainerCallback):  # type: ignore[misc] # transformers is not typed
        def __init__(self, _: object) -> None: ...

        def on_step_end(self, *_: object, optimizer: torch.optim.Optimizer, **_rest: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(trainer, "Telling", Watching)
    settings = FinetuneSettings(dataset="demo-plans", batch_size=4, snapshot_steps=7, learning_rate=1e-3)
    data = TrainingData(plan_examples()[:40], (), {}, ())
    train_model(Checkpoint(model_directory()), data, settings, 1, tmp_path / "a", lambda *_: None)
    # 30 steps, 3 of them warm-up; the rate after step n is the closed form's at n
    closed = [1e-3 * (n / 3 if n < 3 else 0.5 * (1 + math.cos(math.pi * (n - 3) / 27))) for n in range(1, 8)]
    # the same formula in double precision, so only the order of operations can differ
    assert rates == pytest.approx(closed, rel=1e-12)
    assert [learning_rate_at(n, settings, 30) for n in range(1, 8)] == pytest.approx(closed, rel=1e-12)


def test_a_snapshot_beyond_the_schedule_is_refused() -> None:
    """Too few rows for the snapshot's step are reported with the schedule's length."""
    with pytest.raises(ConfigError, match="500, but the whole schedule has only 15 steps") as caught:
        num_steps(PAPER.model_copy(update={"snapshot_steps": 500}), 40)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("world", "batch", "micro", "expected"),
    [
        ("1", 8, None, Batches(8, 1, 1)),
        ("1", 8, 2, Batches(2, 4, 1)),
        ("2", 8, None, Batches(4, 1, 2)),
        ("2", 8, 2, Batches(2, 2, 2)),
        ("4", 8, 8, Batches(2, 1, 4)),
    ],
)
def test_a_steps_examples_stay_as_many_on_several_devices(
    world: str, batch: int, micro: int | None, expected: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Devices times examples at once times batches added up is the batch size."""
    monkeypatch.setenv("WORLD_SIZE", world)
    spread = batches(FinetuneSettings(dataset="x", batch_size=batch, micro_batch_size=micro))
    assert spread == expected
    assert math.prod(spread) == batch


@pytest.mark.parametrize(("world", "batch", "micro"), [("3", 8, None), ("2", 12, 4)])
def test_what_cannot_be_shared_evenly_is_refused(
    world: str, batch: int, micro: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that the processes cannot share, or a share that the small batches do not fill, is an error."""
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ConfigError, match=f"{world} processes"):
        batches(FinetuneSettings(dataset="x", batch_size=batch, micro_batch_size=micro))
