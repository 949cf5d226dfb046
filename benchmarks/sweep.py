"""What a sweep over λ costs, in evaluations at one λ: `python -m benchmarks.sweep [--run DIR] [--prompts N]`.

Takes an adapter that `backmerge demo` trained on the embedded model (run first, if DIR holds none), asks base and
merges at six λs the demonstration's prompts, greedily, by each engine that is installed, and prints Markdown: seconds
until the engine answers, seconds for one λ and for six once it does, their ratios, and on how many completions the
engines agree, token for token. Each figure is the median over fresh engines.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import EXPERIMENT, benchmarks, model_directory
from backmerge.errors import GenerationError
from backmerge.generation.protocol import EngineSettings, Request, Sampling, answers, release
from backmerge.merging.recipe import Variant
from backmerge.records import Completion, Example
from backmerge.registry import ENGINES, resolve

LAMS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
ONE = (0.4,)
GREEDY = Sampling(max_new_tokens=64)
VLLM = {"own_process": False, "kv_cache_gb": 1}
ENGINES_HERE: dict[str, tuple[str, dict[str, Any]]] = {
    "transformers": ("transformers", {}),
    "vllm, an adapter for each λ": ("vllm", {**VLLM, "realisation": "adapter"}),
    "vllm, live weights": ("vllm", {**VLLM, "realisation": "live"}),
}
# a prompt that is not among the others, so that no cache of it helps them
WARM_UP = (benchmarks.plans().examples[-1],)


class Timing(NamedTuple):
    """Seconds.

    Attributes:
        start: Until the first prompt of each λ is answered.
        asked: For all prompts of all λs after that.
    """

    start: float
    asked: float


def requests(
    base: Checkpoint, tuned: AdapterOnBase, lams: Sequence[float], examples: Sequence[Example]
) -> list[Request]:
    """The prompts for each λ."""
    return [Request(Variant(base, tuned, lam=lam), examples, GREEDY) for lam in lams]


def asked(engine: Any, all_requests: Sequence[Request]) -> list[list[Completion]]:
    """Completions by request."""
    found = dict(answers(engine, all_requests, lambda _: None))
    return [found[place] for place in range(len(all_requests))]


def timed(settings: EngineSettings, all_requests: Sequence[Request]) -> tuple[Timing, list[list[Completion]]]:
    """A fresh engine's seconds and completions."""
    engine = resolve(ENGINES, settings.name)(settings)
    started = time.perf_counter()
    asked(engine, [request._replace(examples=WARM_UP) for request in all_requests])
    ready = time.perf_counter()
    completions = asked(engine, all_requests)
    done = time.perf_counter()
    release(engine)
    return Timing(ready - started, done - ready), completions


def tuned_on(base: Checkpoint, run: Path) -> AdapterOnBase:
    """The first adapter of a demonstration, which is run if need be."""
    if not (run / "tuned").is_dir():
        from backmerge.config import load_yaml, validated
        from backmerge.pipeline.stages import run_experiment
        from backmerge.planning.settings import Experiment

        run_experiment(validated(Experiment, load_yaml(EXPERIMENT)), run)
    return AdapterOnBase(min((run / "tuned").iterdir()), base)


def main() -> None:
    """Ask, time, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished run of the demonstration")
    parser.add_argument("--prompts", type=int, default=200, help="half of them harmful")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    base = Checkpoint(model_directory())
    tuned = tuned_on(base, options.run)
    half = options.prompts // 2
    examples = (*benchmarks.plans().examples[:half], *benchmarks.harmful().examples[: options.prompts - half])
    print(f"{len(examples)} prompts; {platform.machine()}, {os.cpu_count()} cores, float32\n")
    print("| engine | start (s) | one λ (s) | six λs (s) | six / one | six / one, with start | equal to transformers |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    reference: list[list[Completion]] = []
    for label, (name, engine_options) in ENGINES_HERE.items():
        settings = EngineSettings(name=name, device="cpu", dtype="float32", batch_size=200, options=engine_options)
        ones: list[Timing] = []
        sixes: list[Timing] = []
        try:
            for _ in range(options.repeats):
                ones.append(timed(settings, requests(base, tuned, ONE, examples))[0])
                timing, completions = timed(settings, requests(base, tuned, LAMS, examples))
                sixes.append(timing)
        except GenerationError as error:
            print(f"| {label} | not measured: {error.message} | | | | | |")
            continue
        reference = reference or completions
        pairs = [pair for both in zip(completions, reference, strict=True) for pair in zip(*both, strict=True)]
        start, one, six = (
            statistics.median(values)
            for values in ([t.start for t in (*ones, *sixes)], [t.asked for t in ones], [t.asked for t in sixes])
        )
        ratios = f"{six / one:.2f} | {(start + six) / (start + one):.2f}"
        equal = sum(ours == theirs for ours, theirs in pairs)
        print(f"| {label} | {start:.1f} | {one:.2f} | {six:.2f} | {ratios} | {equal} of {len(pairs)} |", flush=True)


if __name__ == "__main__":
    main()
