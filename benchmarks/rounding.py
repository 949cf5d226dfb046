"""What rounding to bfloat16 does to a merged model's scores: `python -m benchmarks.rounding [--run DIR]`.

Takes the three adapters that `backmerge demo` trained on the embedded model (run first, if DIR holds none), merges
each at several λs as float32, as bfloat16 rounded to the nearest, and as bfloat16 rounded stochastically with five
seeds, and prints the scores of all prompts of the demonstration's benchmarks as Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import EXPERIMENT, model_directory
from backmerge.generation.protocol import EngineSettings
from backmerge.merging.recipe import Variant
from backmerge.merging.to_disk import write_merged
from backmerge.pipeline.single import SingleEvaluation, evaluate_model
from backmerge.planning.settings import EvaluateSettings

LAMS = (0.05, 0.35)
SEEDS = (0, 1, 2, 3, 4)
SETTINGS = EvaluateSettings(
    utility=("demo-plans",), safety=("demo-harmful",), judge="demo-rule", engine=EngineSettings(device="cpu")
)
METRICS = ("parts", "asr")


def ways(variant: Variant) -> Iterator[tuple[str, Variant]]:
    """The same merge, held in different numbers."""
    from dataclasses import replace

    yield "float32", variant
    yield "bfloat16, nearest", replace(variant, dtype="BF16")
    for seed in SEEDS:
        yield "bfloat16, stochastic", replace(variant, dtype="BF16", rounding="stochastic", seed=seed)


def measured(variant: Variant, scratch: Path) -> tuple[dict[str, float], float | None]:
    """Scores in [0, 1] by metric, and the share of the change that rounding lost."""
    written = write_merged(variant, scratch / "model")
    results = evaluate_model(SingleEvaluation(model=str(written.directory), evaluate=SETTINGS), scratch / "run")
    return {row["metric"]: row["value"] for row in results["scores"]}, written.rounding_loss


def main() -> None:
    """Merge, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished run of the demonstration")
    run = parser.parse_args().run
    if not (run / "tuned").is_dir():
        from backmerge.config import load_yaml, validated
        from backmerge.pipeline.stages import run_experiment
        from backmerge.planning.settings import Experiment

        run_experiment(validated(Experiment, load_yaml(EXPERIMENT)), run)
    base = Checkpoint(model_directory())
    adapters = [AdapterOnBase(path, base) for path in sorted((run / "tuned").iterdir())]
    print(f"| λ | held as | change lost | {' | '.join(METRICS)} |")
    print("|--:|---|--:|" + "--:|" * len(METRICS))
    for lam in LAMS:
        rows: dict[str, list[tuple[dict[str, float], float | None]]] = {}
        for adapter in adapters:
            for name, variant in ways(Variant(base, adapter).at(lam)):
                with tempfile.TemporaryDirectory() as scratch:
                    rows.setdefault(name, []).append(measured(variant, Path(scratch)))
        for name, found in rows.items():
            cells = []
            for metric in METRICS:
                values = [100 * scores[metric] for scores, _ in found]
                cells.append(f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
            lost = statistics.mean(100 * (loss or 0.0) for _, loss in found)
            print(f"| {lam} | {name} | {lost:.1f} % | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
