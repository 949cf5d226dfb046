"""The curve of the losses as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_losses(losses: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write `loss.png`: each step's loss, its running mean, and the loss on held-out rows.

    Args:
        losses: `step`, `loss` and `learning_rate`.
        validation: `step` and `loss`.
        file: The picture.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9.5, "axes.spines.top": False}):
        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.subplots()
        steps = [entry["step"] for entry in losses]
        values = [entry["loss"] for entry in losses]
        axes.plot(steps, values, color="#0072b2", alpha=0.3, linewidth=0.8)
        axes.plot(steps, _running_means(values, max(1, len(values) // 30)), color="#0072b2", label="training")
        if validation:
            xs, ys = [entry["step"] for entry in validation], [entry["loss"] for entry in validation]
            axes.plot(xs, ys, color="#d55e00", marker="o", markersize=3, label="held out")
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats a token)")
        rate = axes.twinx()
        rate.plot(steps, [entry["learning_rate"] for entry in losses], color="#8b909b", linestyle=":", linewidth=1)
        rate.set_ylabel("learning rate (dotted)", color="#8b909b")
        axes.legend(frameon=False)
        # without the version of the library that drew it: the same losses give the same file
        figure.savefig(file, dpi=120, metadata={"Software": None})


def _running_means(values: Sequence[float], width: int) -> list[float]:
    """Each value averaged with up to `width` − 1 before it."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]
