"""Going on where a training stopped: killed, asked to stop, or with other settings in between."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import model_directory
from backmerge.demo.benchmarks import plan_examples
from backmerge.finetuning import callbacks
from backmerge.finetuning.datasets import TrainingData
from backmerge.finetuning.settings import FinetuneSettings, LoraSettings
from backmerge.finetuning.trainer import train_model, training_key
from forked import started

SEED = 42
# dropout draws random numbers at every step, and the average remembers all of them: what resuming could lose
SETTINGS = FinetuneSettings(
    dataset="demo-plans",
    epochs=2,
    batch_size=4,
    learning_rate=8e-3,
    lora=LoraSettings(dropout=0.1),
    ema=0.9,
    save_every=3,
    keep_every=4,
    validate_every=5,
)
DATA = TrainingData(plan_examples()[:22], plan_examples()[22:30], {}, ())  # six steps an epoch, the last one short
STEPS = 12


def silent(*_: object) -> None:
    """Tell nobody."""


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    """The embedded model."""
    return Checkpoint(model_directory())


@pytest.fixture(scope="module")
def unbroken(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training leaves that nothing interrupts."""
    place = tmp_path_factory.mktemp("unbroken") / "a"
    train_model(base, DATA, SETTINGS, SEED, place, silent)
    return place


def contents(directory: Path) -> dict[str, bytes]:
    """Every file's bytes, by its path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def states(place: Path) -> list[Path]:
    """What trainings have left beside their result's place."""
    return sorted(path for path in place.parent.iterdir() if ".training-" in path.name)


class _Stopped(Exception):  # noqa: N818 - it stands for a process that is gone
    """As if the process were gone."""


def stop_at(step: int) -> Any:
    """An `advance` that ends the training there, with nothing saved."""
    done = 0

    def advance(steps: int, note: str = "", /) -> None:
        nonlocal done
        done += steps
        if done == step and steps:
            raise _Stopped

    return advance


def test_files_of_a_finished_training(unbroken: Path) -> None:
    """Every step's loss, held-out losses at their intervals, snapshots, and no state of the training itself."""
    losses = [json.loads(line) for line in (unbroken / "loss.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = [json.loads(line) for line in (unbroken / "validation_loss.jsonl").read_text("utf-8").splitlines()]
    assert [entry["step"] for entry in losses] == list(range(1, STEPS + 1))
    assert [entry["step"] for entry in held_out] == [5, 10, 12]
    assert all(entry["loss"] > 0 for entry in (*losses, *held_out))
    assert sorted(path.name for path in (unbroken / "snapshots").iterdir()) == ["step-12", "step-4", "step-8"]
    assert states(unbroken) == []


@pytest.mark.parametrize("step", [2, 5, 10])
def test_a_stopped_training_ends_in_the_same_bytes(step: int, unbroken: Path, base: Checkpoint, tmp_path: Path) -> None:
    """Stopped before its first state, in the first epoch or the second, it ends as if nothing had happened."""
    place = tmp_path / "a"
    with pytest.raises(_Stopped):
        train_model(base, DATA, SETTINGS, SEED, place, stop_at(step))
    assert not place.exists()
    told: list[int] = []
    train_model(base, DATA, SETTINGS, SEED, place, lambda steps, _="": told.append(steps))
    assert contents(place) == contents(unbroken)
    assert sum(told) == STEPS
    kept = (step - 1) // 3 * 3  # the states of every third step; that of the step it stopped in was not written
    assert told[0] == (kept or 1)
    assert states(place) == []


def test_killed_after_the_last_state_it_takes_no_step_too_many(base: Checkpoint, tmp_path: Path) -> None:
    """A snapshot whose step is one of those that are saved ends at that step, also where the kill came after it."""
    settings = SETTINGS.model_copy(update={"snapshot_steps": 6, "keep_every": None})
    train_model(base, DATA, settings, SEED, tmp_path / "whole", silent)

    def killed(_: object) -> None:
        raise _Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backmerge.finetuning.trainer._check_finite", lambda *_: killed(None))
        with pytest.raises(_Stopped):
            train_model(base, DATA, settings, SEED, tmp_path / "a", silent)
    assert (states(tmp_path / "a")[0] / "checkpoint-6" / "complete").is_file()
    train_model(base, DATA, settings, SEED, tmp_path / "a", silent)
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")


def test_asked_to_stop_in_the_last_step(base: Checkpoint, tmp_path: Path) -> None:
    """The model is written, and what would come after it is not begun."""
    settings = SETTINGS.model_copy(update={"steps": 2, "keep_every": None})

    def advance(steps: int, _: str = "") -> None:
        nonlocal done
        done += steps
        if done == 2 and steps:
            signal.raise_signal(signal.SIGINT)

    done = 0
    with pytest.raises(KeyboardInterrupt):
        train_model(base, DATA, settings, SEED, tmp_path / "a", advance)
    assert (tmp_path / "a" / "backmerge.json").is_file()


def train_slowly(place: Path) -> None:
    """Train with a pause after each step."""
    train_model(Checkpoint(model_directory()), DATA, SETTINGS, SEED, place, lambda *_: time.sleep(0.2))


def test_a_killed_process_goes_on_to_the_same_loss_curve(unbroken: Path, base: Checkpoint, tmp_path: Path) -> None:
    """Killed with SIGKILL once a state is there, the same call continues, with the same losses and the same bytes."""
    place = tmp_path / "a"
    process = started(train_slowly, place, log=tmp_path / "log")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".a.training-*/checkpoint-*/complete")):
        assert process.exitcode is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline, "no state appeared"
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not place.exists()
    assert states(place)
    train_model(base, DATA, SETTINGS, SEED, place, silent)
    assert (place / "loss.jsonl").read_bytes() == (unbroken / "loss.jsonl").read_bytes()
    assert contents(place) == contents(unbroken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves(number: int, unbroken: Path, base: Checkpoint, tmp_path: Path) -> None:
    """Ctrl-C, and what a cluster sends before it takes a machine away, end the step, save it, and lose nothing."""
    place, done = tmp_path / "a", 0

    def advance(steps: int, _: str = "") -> None:
        nonlocal done
        done += steps
        if done == 5 and steps:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train_model(base, DATA, SETTINGS, SEED, place, advance)
    assert signal.getsignal(number) is before
    assert sorted(path.name for path in states(place)[0].glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-5"]
    told: list[int] = []
    train_model(base, DATA, SETTINGS, SEED, place, lambda steps, _="": told.append(steps))
    assert told[0] == 5
    assert contents(place) == contents(unbroken)


def test_in_a_thread_signals_are_unchanged(base: Checkpoint, tmp_path: Path) -> None:
    """A training in another thread than the main one, where Python allows no handler, works as well."""
    settings = SETTINGS.model_copy(update={"steps": 1, "keep_every": None})
    worker = threading.Thread(target=train_model, args=(base, DATA, settings, SEED, tmp_path / "a", silent))
    worker.start()
    worker.join()
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()


def test_half_written_state_is_not_used(unbroken: Path, base: Checkpoint, tmp_path: Path) -> None:
    """A state without its mark, as a kill in the middle of writing leaves it, is passed over and removed."""
    place = tmp_path / "a"
    with pytest.raises(_Stopped):
        train_model(base, DATA, SETTINGS, SEED, place, stop_at(8))
    newest = states(place)[0] / "checkpoint-6"
    (newest / callbacks.MARK).unlink()
    (newest / "adapter_model.safetensors").write_bytes(b"torn")
    told: list[int] = []
    train_model(base, DATA, SETTINGS, SEED, place, lambda steps, _="": told.append(steps))
    assert told[0] == 3
    assert contents(place) == contents(unbroken)


def test_other_settings_start_again_and_lose_nothing(
    base: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With another learning rate the unfinished training is neither continued nor removed, and is reported."""
    place = tmp_path / "a"
    with pytest.raises(_Stopped):
        train_model(base, DATA, SETTINGS, SEED, place, stop_at(8))
    others = states(place)
    changed = SETTINGS.model_copy(update={"learning_rate": 1e-3, "keep_every": None})
    told: list[int] = []
    train_model(base, DATA, changed, SEED, place, lambda steps, _="": told.append(steps))
    assert told[0] == 1
    assert states(place) == others
    assert str(others[0]) in capsys.readouterr().err


def test_how_often_is_saved_changes_nothing_else(base: Checkpoint) -> None:
    """Another interval between states, or another place to report to, is still the same training."""
    key = training_key(base, DATA, SETTINGS, SEED)
    for values in ({"save_every": 50}, {"report_to": ("tensorboard",)}):
        assert training_key(base, DATA, SETTINGS.model_copy(update=values), SEED) == key
    for values in ({"ema": None}, {"keep_every": None}, {"snapshot_steps": 5}, {"mode": "full"}):
        assert training_key(base, DATA, SETTINGS.model_copy(update=values), SEED) != key
