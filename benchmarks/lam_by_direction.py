"""The picture of λ by direction: `python -m benchmarks.lam_by_direction [--guard STATS] --out FILE.png`.

Left: λ of a direction as a function of its variance on guard prompts. Right: the directions of a base's layers, those
that the guard uses most first, at λ = 0.5: the embedded model on its harmful requests, unless statistics are given.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from backmerge.merging.inputs import InputStatistics, lam_by_direction
from backmerge.merging.methods.anchored import RIDGE
from backmerge.reporting.drawing import BASE, SERIES, SOFT, TUNED, as_bytes, styled

LAMS = (0.1, 0.25, 0.5, 0.75)
LAM = 0.5


def shares_of(statistics: InputStatistics, name: str) -> np.ndarray:
    """λ of each direction of a layer, the guard's strongest first."""
    inputs = statistics.of(name)
    assert inputs is not None
    by_direction = lam_by_direction(inputs, lam=LAM, ridge=RIDGE)
    left = inputs.directions.shape[1] - len(inputs.variances)
    return np.concatenate([by_direction.shares, np.full(left, by_direction.rest)])


def drawn(statistics: InputStatistics) -> Figure:
    """Both panels."""
    with styled():
        figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        variances = np.logspace(-3, 3, 200)
        for lam, colour in zip(LAMS, (BASE, SERIES[0], SERIES[1], TUNED), strict=True):
            left.semilogx(variances, lam / (lam + (1 - lam) * ((1 - RIDGE) * variances + RIDGE)), color=colour)
            left.annotate(
                f"λ = {lam:g}", (1, lam), xytext=(-6, -9), textcoords="offset points", color=colour, ha="right"
            )
            left.plot(1, lam, "o", color=colour, markersize=4)
        ticks = [10.0**power for power in range(-3, 4)]
        left.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        left.set_title("Where the guard is strong, the base stays")
        left.set_xlabel("variance of a direction on guard prompts (mean 1)")
        left.set_ylabel("share of the tuned side in it")
        names = [name for name in sorted(statistics.names) if not name.endswith(("k_proj.weight", "v_proj.weight"))]
        for name in names:
            shares = shares_of(statistics, name)
            right.plot(np.linspace(0, 1, len(shares)), shares, color=SERIES[0], alpha=0.35, linewidth=1)
        right.axhline(LAM, color=SOFT, linestyle="--", linewidth=1)
        right.annotate("Linear", (0.02, LAM), xytext=(0, 4), textcoords="offset points", color=SOFT)
        right.set_title(f"One line a layer, at λ = {LAM:g}")
        right.set_xlabel("directions, the guard's strongest first (share of all)")
        right.set_ylim(0, 1.02)
        for axis in (left, right):
            axis.grid(visible=True)
    return figure


def main() -> None:
    """Gather if nothing is given, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--guard", type=Path, help="a file of `backmerge inputs`")
    parser.add_argument("--out", type=Path, default=Path("docs/images/lam-by-direction.png"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        file = given.guard or Path(scratch) / "guard.safetensors"
        if given.guard is None:
            command = [sys.executable, "-m", "backmerge", "inputs", "demo", "--guard", "demo-harmful"]
            subprocess.run([*command, "--device", "cpu", "--out", str(file)], check=True)
        given.out.write_bytes(as_bytes(drawn(InputStatistics(file)), "png"))


if __name__ == "__main__":
    main()
