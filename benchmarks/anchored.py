"""What `anchored` costs at Llama-3-8B's shapes, on random weights and inputs: `python -m benchmarks.anchored`.

Of each kind of layer two are measured, each kind in another process: gathering the second moments of its inputs,
merging full checkpoints, and merging a LoRA of rank 16. The whole model is 32 times the sum over the kinds. The forward
pass and the base's answers come on top; they cost what any generation of that length costs.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from backmerge.merging.method import find_method
from backmerge.merging.methods.anchored import through_inputs
from backmerge.merging.randomness import TensorRandom
from backmerge.merging.second_moments import MAX_DIRECTIONS, SecondMoments
from benchmarks.measure import cost_of

LAYERS = 32
PROMPTS, TOKENS = 64, 100  # of each prompt with its answer
RANK = 16
# a kind of input: its elements, and the outputs of the weights that take it
KINDS = {
    "attention (q, k, v)": (4096, (4096, 1024, 1024)),
    "attention (o)": (4096, (4096,)),
    "mlp (gate, up)": (4096, (14336, 14336)),
    "mlp (down)": (14336, (4096,)),
}
LAMS = (0.25, 0.5)  # of one pass


class Seconds(NamedTuple):
    """Time of one layer of a kind: of one core, whatever else the machine does; of a GPU, on the clock.

    Attributes:
        gather: Second moments of all tokens, and their directions.
        dense: Merges of its weights as checkpoints, at one λ.
        lora: Merges of its LoRAs, at one λ.
    """

    gather: float
    dense: float
    lora: float


def measured(kind: str, num_layers: int, device: str) -> list[Seconds]:
    """Time layers of a kind."""
    width, outputs = KINDS[kind]
    clock = time.process_time if device == "cpu" else time.perf_counter
    anchored = find_method("anchored")
    found = []
    for seed in range(num_layers):
        generator = torch.Generator(device).manual_seed(seed)
        # a spectrum that falls off, as inputs of layers have
        scales = torch.logspace(0.5, -1.5, width, device=device)
        inputs = [torch.randn(TOKENS, width, generator=generator, device=device) * scales for _ in range(PROMPTS)]
        started = clock()
        moments = SecondMoments(width)
        for rows in inputs:
            moments.add(rows)
        guard = moments.found()
        gathered = clock()
        del moments, inputs
        dense = lora = 0.0
        for rows in outputs:
            base = torch.randn(rows, width, generator=generator, device=device) * 0.02
            tuned = base + torch.randn(rows, width, generator=generator, device=device) * 0.001
            begun = clock()
            merged = anchored(base, tuned, TensorRandom(0, "t"), {"guard_inputs": guard}, lam=LAMS[0])
            assert bool(merged.sum().isfinite())  # which waits for the device
            dense += clock() - begun
            factor = torch.randn(RANK, width).numpy()
            begun = clock()
            by_direction = through_inputs(guard, None, lam=LAMS[0])
            assert by_direction is not None
            by_direction.of_rows(factor)
            lora += clock() - begun
        found.append(Seconds(gathered - started, dense, lora))
    return found


def main() -> None:
    """Measure each kind in its own process, and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kind", choices=KINDS, help="only this, as JSON; what the others are run by")
    parser.add_argument("--layers", type=int, default=2, help="of each kind")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    if given.kind:
        print(json.dumps(measured(given.kind, given.layers, given.device)))
        return
    print(
        f"Llama-3-8B's shapes, {PROMPTS} prompts of {TOKENS} tokens, {MAX_DIRECTIONS} directions; device "
        f"{given.device}, one thread, {platform.machine()}, torch {torch.__version__}. Seconds of that "
        f"thread for one layer, mean of {given.layers}; one λ.\n"
    )
    print("| inputs | width | gather | merge, full | merge, LoRA of rank 16 | peak memory of the process |")
    print("|---|--:|--:|--:|--:|--:|")
    total = [0.0, 0.0, 0.0]
    with tempfile.TemporaryDirectory() as scratch:
        for kind, (width, _) in KINDS.items():
            log = Path(scratch) / "log"
            command = [sys.executable, "-m", "benchmarks.anchored", "--kind", kind, "--device", given.device]
            cost = cost_of([*command, "--layers", str(given.layers)], {"OMP_NUM_THREADS": "1"}, log)
            found = [Seconds(*one) for one in json.loads(log.read_text().splitlines()[-1])]
            means = [sum(column) / len(found) for column in zip(*found, strict=True)]
            total = [one + other for one, other in zip(total, means, strict=True)]
            peak = f"{cost.peak_anonymous / 1e9:.1f} GB"
            print(f"| {kind} | {width:,} | {' | '.join(f'{mean:.2f}' for mean in means)} | {peak} |")
    whole = " | ".join(f"{LAYERS * one / 60:.1f} min" for one in total)
    print(f"| all {LAYERS} layers, by extrapolation | | {whole} | |")
    widths = [width for width, _ in KINDS.values()]
    kept = sum(MAX_DIRECTIONS * width * 4 for width in widths) * LAYERS
    held = sum(8 * min(MAX_DIRECTIONS, width) * width for width in widths) * LAYERS
    print(f"\nThe file of statistics: {kept / 1e9:.1f} GB at most. Held while gathering: {held / 1e9:.1f} GB at most.")


if __name__ == "__main__":
    main()
