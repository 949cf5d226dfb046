"""How the demonstration fares on five bases of one recipe: `python -m benchmarks.bases [--at DIR]`.

Builds the bases with seeds 1 to 5 (about four minutes each on one core; one that is in DIR already is kept), carries
out the demonstration's experiment on each, and prints the tables of the embedded model's card.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from backmerge.demo import EXPERIMENT

SEEDS = (1, 2, 3, 4, 5)
AT_ONCE = 2  # each on one core


def results_of(seed: int, at: Path) -> dict[str, Any]:
    """The demonstration's results on the base of one seed."""
    base, run = at / f"base-{seed}", at / f"run-{seed}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not (base / "model.safetensors").exists():
        build = [sys.executable, "-m", "backmerge.demo.build", "--seed", str(seed), "--out", str(base)]
        subprocess.run(build, check=True, env=environment, capture_output=True)
    demo = [sys.executable, "-m", "backmerge", "run", str(EXPERIMENT), "--set", f"base={base}", "--out", str(run)]
    subprocess.run(demo, check=True, env=environment, capture_output=True)
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found


def mean(results: dict[str, Any], point: str, metric: str, split: str) -> dict[str, Any]:
    """The summary of a metric at a point, over the tuning seeds."""
    found: dict[str, Any] = next(
        row for row in results["summary"] if (row["point"], row["metric"], row["split"]) == (point, metric, split)
    )
    return found


def percent(row: dict[str, Any]) -> str:
    """The mean in percent, with the standard deviation over seeds."""
    spread = "" if row["spread"] is None else f" ± {row['spread'] * 100:.1f}"
    return f"{row['mean'] * 100:.1f}{spread}"


def main() -> None:
    """Build, run, and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--at", type=Path, default=Path("runs/bases"), help="where bases and runs are kept")
    at = parser.parse_args().at
    at.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        all_results = dict(zip(SEEDS, pool.map(lambda seed: results_of(seed, at), SEEDS), strict=True))

    print("| seed | base ASR | tuned ASR | tuned parts | λ | parts kept | merged ASR | merged other | verdict |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|---|")
    for seed, results in all_results.items():
        chosen = results["choice"]["point"]
        cells = [percent(mean(results, "base", "asr", "confirmation"))]
        cells += [percent(mean(results, "tuned", metric, "confirmation")) for metric in ("asr", "parts")]
        if chosen is None:
            cells += ["none", "", "", ""]
        else:
            kept = results["confirmation"]["kept_gain"]
            cells += [f"{results['choice']['lam']:g}", f"{kept * 100:.1f}"]
            cells += [percent(mean(results, chosen, metric, "confirmation")) for metric in ("asr", "other")]
        print(f"| {seed} | {' | '.join(cells)} | {results['confirmation']['verdict']} |")

    points = sorted(all_results[SEEDS[0]]["points"], key=lambda point: float(point["lam"]))
    print("\n| seed | | " + " | ".join(f"{point['lam']:g}" for point in points) + " |")
    print("|---|---|" + "--:|" * len(points))
    for seed, results in all_results.items():
        for metric in ("parts", "exact_match", "asr", "other", "over_refusal"):
            cells = [f"{mean(results, point['point'], metric, 'selection')['mean'] * 100:.1f}" for point in points]
            print(f"| {seed} | {metric} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
