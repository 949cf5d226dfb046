"""Whether anything beats a well-chosen Linear on the embedded model: `python -m benchmarks.beyond_linear [--at DIR]`.

Makes the base as it was before its alignment, which the restoring methods ask for; carries out
`experiments/beyond_linear.yaml`; and prints its comparison as a table. About 300,000 answers: half an hour on one core.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from backmerge.demo.build import Schedule, build

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "beyond_linear.yaml"
SEED = 1  # of the embedded model


def percent(level: dict[str, Any] | None) -> str:
    """A rate in percent with its interval."""
    return "–" if level is None else f"{level['mean'] * 100:.1f} [{level['low'] * 100:.1f}, {level['high'] * 100:.1f}]"


def front(results: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Recipes by rising ASR, each with more utility than all before it."""
    found: dict[str, dict[str, float]] = {}
    kinds = {(b["name"], b["metric"]): b["kind"] for b in results["benchmarks"]}
    for row in results["summary"]:
        kind = kinds.get((row["benchmark"], row["metric"]))
        if row["split"] == "selection" and kind in ("utility", "safety"):
            found.setdefault(row["point"], {})[kind] = row["mean"]
    kept: list[tuple[str, float, float]] = []
    for point, at in sorted(found.items(), key=lambda item: (item[1]["safety"], -item[1]["utility"])):
        if not kept or at["utility"] > kept[-1][1]:
            kept.append((point, at["utility"], at["safety"]))
    return kept


def main() -> None:
    """Build, run, and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--at", type=Path, default=Path("runs"), help="where model and run are kept")
    at = parser.parse_args().at
    unaligned, run = at / "unaligned", at / "beyond-linear"
    if not (unaligned / "model.safetensors").exists():
        build(SEED, unaligned, Schedule(alignment=0))
    sets = [f"merge.{place}.models.unaligned={unaligned}" for place in (7, 8, 9)]
    command = [sys.executable, "-m", "backmerge", "run", str(EXPERIMENT), "--out", str(run)]
    subprocess.run([*command, *(part for one in sets for part in ("--set", one))], check=True)

    results = json.loads((run / "results.json").read_text())
    print("| family | recipe | utility | ASR | over-refusal | utility less Linear's | p (Holm) | verdict |")
    print("|---|---|--:|--:|--:|--:|--:|---|")
    for row in results["comparison"]["rows"]:
        against = row["utility_difference"]
        difference = (
            "–"
            if against is None
            else (f"{against['difference'] * 100:+.1f} [{against['low'] * 100:+.1f}, {against['high'] * 100:+.1f}]")
        )
        p = "–" if row["p_adjusted"] is None else f"{row['p_adjusted']:.3f}"
        setting = row["setting"] if row["lam"] is None else f"λ = {row['lam']:g}"
        recipe = "none passed" if row["point"] is None else f"{setting or row['point'].partition('@')[2] or '–'}"
        levels = " | ".join(percent(row[what]) for what in ("utility", "asr", "over_refusal"))
        print(f"| {row['series']} | {recipe} | {levels} | {difference} | {p} | {row['verdict']} |")

    print("\nThe front on the selection prompts: what nothing excels in one without falling short in the other.\n")
    print("| recipe | utility | ASR |")
    print("|---|--:|--:|")
    for point, utility, asr in front(results):
        print(f"| {point} | {utility * 100:.1f} | {asr * 100:.1f} |")


if __name__ == "__main__":
    main()
