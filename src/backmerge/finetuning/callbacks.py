"""Callbacks between the Trainer's steps: progress, snapshots, averages, complete checkpoints, early stopping."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from backmerge.progress import Advance
from backmerge.runs import sync_directory, write_whole


class Telling(TrainerCallback):  # type: ignore[misc] # transformers is not typed
    """Reports each finished step, and its loss."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - the Trainer's own signature
        """Called by the Trainer; in a resumed training some steps are already done."""
        if state.global_step:
            self.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Called by the Trainer."""
        self.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Called by the Trainer."""
        if logs and "loss" in logs:
            self.advance(0, f"loss {logs['loss']:.3f}")


class StopAt(TrainerCallback):  # type: ignore[misc]
    """Ends the training at the snapshot, in the middle of its schedule."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Called by the Trainer."""
        if state.global_step >= self.step:
            control.should_training_stop = True


class SaveWhenAsked(TrainerCallback):  # type: ignore[misc]
    """On Ctrl-C or SIGTERM, finishes the step, saves, and ends the training; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.is_asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Called by the Trainer."""
        if self.is_asked:
            control.should_save = True
            control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen for signals within the block, if that is possible: in the main thread of a single process."""
        if threading.current_thread() is not threading.main_thread() or PartialState().num_processes > 1:
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: object) -> None:  # noqa: ARG001 - the signal module's own signature
            if self.is_asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.is_asked = True

        try:
            for number in before:
                signal.signal(number, ask)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class KeepEvery(TrainerCallback):  # type: ignore[misc]
    """Writes each k-th step's weights to `directory/step-N`.

    Attributes:
        save: Writes the model to a folder; all processes call it together.
    """

    def __init__(self, every: int, directory: Path) -> None:
        self.every = every
        self.directory = directory
        self.save: Callable[[Path], None] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Called by the Trainer."""
        if state.global_step % self.every == 0:
            assert self.save is not None
            self.save(self.directory / f"step-{state.global_step}")


class MovingAverage(TrainerCallback):  # type: ignore[misc]
    """Keeps an exponential moving average of the trained weights.

    average ← d·average + (1 − d)·weights after each step, d = min(decay, (1 + step)/(10 + step)), so that the start
    does not dominate the first steps. For LoRA it averages the factors, whose product is not quite the averaged delta.

    Source: Polyak and Juditsky (1992); the growing decay is that of TensorFlow's ExponentialMovingAverage with
    `num_updates`.
    """

    def __init__(self, model: Any, decay: float, checkpoint: Path | None) -> None:
        self.model = model
        self.decay = decay
        self.checkpoint = checkpoint
        self.averages: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Called by the Trainer, after the weights are sharded and those of a resumed training are loaded."""
        kept = load_file(self.checkpoint / self._file()) if self.checkpoint is not None else {}
        self.averages = {
            name: kept[name].to(local(p).device) if kept else local(p).detach().float().clone()
            for name, p in self._trained()
        }

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Called by the Trainer."""
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, parameter in self._trained():
            self.averages[name].lerp_(local(parameter).float(), 1 - decay)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Called by the Trainer: each process stores its own shard next to the checkpoint."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save_file({name: a.contiguous().cpu() for name, a in self.averages.items()}, checkpoint / self._file())

    @torch.no_grad()
    def put_in_place(self) -> None:
        """Overwrite the trained weights with their averages."""
        for name, parameter in self._trained():
            local(parameter).copy_(self.averages[name])

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def _file(self) -> str:
        return f"average-{PartialState().process_index}.safetensors"


class MarkComplete(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint as complete once all processes have written theirs; must be the last callback."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Called by the Trainer."""
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def local(parameter: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a parameter; all of it if nothing is sharded."""
    shard = getattr(parameter, "to_local", None)
    return parameter if shard is None else shard()


def draw_losses(losses: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write `loss.png`: each step's loss, its running mean, and the loss on held-out rows.

    Args:
        losses: `step`, `loss` and `learning_rate`.
        validation: `step` and `loss`.
        file: The image file.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9.5, "axes.spines.top": False}):
        figure = Figure(figsize=(7, 3.5))
        axes = figure.add_axes((0.09, 0.13, 0.82, 0.83))  # the labels are known: a layout engine would draw it twice
        steps = [entry["step"] for entry in losses]
        values = [entry["loss"] for entry in losses]
        axes.plot(steps, values, color="#0072b2", alpha=0.3, linewidth=0.8)
        axes.plot(steps, _running_means(values, max(1, len(values) // 30)), color="#0072b2", label="training")
        if validation:
            xs, ys = [entry["step"] for entry in validation], [entry["loss"] for entry in validation]
            axes.plot(xs, ys, color="#d55e00", marker="o", markersize=3, label="held out")
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per token)")
        rate = axes.twinx()
        rate.plot(steps, [entry["learning_rate"] for entry in losses], color="#8b909b", linestyle=":", linewidth=1)
        rate.set_ylabel("learning rate (dotted)", color="#8b909b")
        axes.legend(frameon=False)
        # without the version of the library that drew it, so that the same losses give the same file
        figure.savefig(file, dpi=120, metadata={"Software": None})


def _running_means(values: Sequence[float], width: int) -> list[float]:
    """Return each value averaged with up to `width` − 1 values before it."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


MARK = "complete"


def state_directory(result: Path, key: str) -> Path:
    """Return the folder for the states of a training with its result at `result`."""
    result = result.absolute()
    return result.with_name(f".{result.name}.training-{key[:8]}")


def left_by_others(directory: Path) -> list[Path]:
    """Return folders with states of trainings for the same result, with other settings or other data."""
    beginning = directory.name.rpartition("-")[0]
    return sorted(place for place in directory.parent.glob(f"{beginning}-*") if place != directory)


def newest_complete(directory: Path, *, before: int) -> Path | None:
    """Return the complete state with the most steps, fewer than `before`; remove the others."""
    whole: list[tuple[int, Path]] = []
    for state in directory.glob("checkpoint-*"):
        step = int(state.name.rpartition("-")[2])
        if (state / MARK).is_file() and step < before:
            whole.append((step, state))
        else:
            shutil.rmtree(state)
    return max(whole)[1] if whole else None


def mark_complete(state: Path) -> None:
    """Mark a state as complete, after its bytes are on the disk."""
    for file in sorted(state.rglob("*")):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    sync_directory(state)
    write_whole(state / MARK, "")
