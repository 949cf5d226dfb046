"""What a sweep over λ costs on one engine, and as six loads: `python -m benchmarks.sweep [--run DIR] [--prompts N]`.

Takes an adapter that `backmerge demo` trained on the embedded model (run first, if DIR holds none), or the models and
prompts that `--model BASE LORA PROMPTS` names (PROMPTS as --over-refusal takes it). Base and merges at six λs answer
the prompts, greedily, by each engine that is installed. Prints Markdown: seconds until the engine answers, seconds for
one λ and for six once it does, both starts included for six λs on one engine and for six engines of one λ each, tokens
a second, and how many completions are equal to transformers'. Each figure is the median over fresh engines.
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

from backmerge.benchmarks.catalogue import find_benchmark
from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import EXPERIMENT, benchmarks, model_directory
from backmerge.errors import GenerationError
from backmerge.generation.protocol import EngineSettings, Generator, Request, Sampling, made_engine
from backmerge.merging.recipe import Variant
from backmerge.records import Completion, Example
from benchmarks.measure import cpu_so_far

LAMS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
ONE = (0.4,)
VLLM = {"own_process": False, "kv_cache_gb": 1}
ENGINES_HERE: dict[str, tuple[str, dict[str, Any]]] = {
    "transformers": ("transformers", {}),
    "vllm, an adapter for each λ": ("vllm", {**VLLM, "realisation": "adapter"}),
    "vllm, live weights": ("vllm", {**VLLM, "realisation": "live"}),
}


class Timing(NamedTuple):
    """Seconds.

    Attributes:
        start: Until the first prompt of each λ is answered.
        asked: For all prompts of all λs after that.
        cpu: CPU seconds of both.
    """

    start: float
    asked: float
    cpu: float


class Work(NamedTuple):
    """What is asked.

    Attributes:
        base: The base.
        tuned: The adapter.
        examples: The prompts.
        warm_up: A prompt that is not among them, so that no cache of it helps them.
        sampling: Greedy.
    """

    base: Checkpoint
    tuned: AdapterOnBase
    examples: Sequence[Example]
    warm_up: Example
    sampling: Sampling

    def requests(self, lams: Sequence[float]) -> list[Request]:
        """The prompts for each λ, served as an adapter on its base is, unrounded."""
        variants = [Variant(self.base, self.tuned, lam=lam, dtype="F32") for lam in lams]
        return [Request(variant, self.examples, self.sampling) for variant in variants]


def asked(engine: Generator, all_requests: Sequence[Request]) -> list[list[Completion]]:
    """Completions by request."""
    found = dict(engine.generate_many(all_requests, lambda _: None))
    return [found[place] for place in range(len(all_requests))]


def timed(settings: EngineSettings, work: Work, lams: Sequence[float]) -> tuple[Timing, list[list[Completion]]]:
    """A fresh engine's seconds and completions."""
    engine = made_engine(settings)
    started, cpu = time.perf_counter(), cpu_so_far()
    asked(engine, [request._replace(examples=[work.warm_up]) for request in work.requests(lams)])
    ready = time.perf_counter()
    completions = asked(engine, work.requests(lams))
    done = time.perf_counter()
    engine.release()
    return Timing(ready - started, done - ready, cpu_so_far() - cpu), completions


def tuned_on(base: Checkpoint, run: Path) -> AdapterOnBase:
    """The first adapter of a demonstration, which is run if need be."""
    if not (run / "tuned").is_dir():
        from backmerge.config import load_yaml, validated
        from backmerge.pipeline.stages import run_experiment
        from backmerge.planning.settings import Experiment

        run_experiment(validated(Experiment, load_yaml(EXPERIMENT)), run)
    return AdapterOnBase(min((run / "tuned").iterdir()), base)


def work_of(given: argparse.Namespace) -> Work:
    """What the options name."""
    if given.model is not None:
        directory, adapter, prompts = given.model
        base = Checkpoint(Path(directory))
        found = find_benchmark(prompts, "over_refusal").examples[: given.prompts + 1]
        tuned = AdapterOnBase(Path(adapter), base)
        return Work(base, tuned, found[:-1], found[-1], Sampling(max_new_tokens=given.max_new_tokens))
    base = Checkpoint(model_directory())
    half = given.prompts // 2
    plans = benchmarks.plans().examples
    examples = (*plans[:half], *benchmarks.harmful().examples[: given.prompts - half])
    return Work(base, tuned_on(base, given.run), examples, plans[-1], Sampling(max_new_tokens=given.max_new_tokens))


def main() -> None:
    """Ask, time, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished run of the demonstration")
    parser.add_argument("--model", nargs=3, metavar=("BASE", "LORA", "PROMPTS"), help="instead of the demonstration's")
    parser.add_argument("--prompts", type=int, default=200, help="half of them harmful, of the demonstration's")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=200, help="of the engine transformers")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    work = work_of(given)
    print(f"{len(work.examples)} prompts, at most {given.max_new_tokens} tokens; {platform.machine()},")
    print(f"{os.cpu_count()} cores, float32; median of {given.repeats}\n")
    print(
        "| engine | start (s) | one λ (s) | six λs (s) | six on one engine | six engines | tokens/s | as transformers |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    reference: list[list[Completion]] = []
    for label, (name, engine_options) in ENGINES_HERE.items():
        settings = EngineSettings(
            name=name, device="cpu", dtype="float32", batch_size=given.batch_size, options=engine_options
        )
        ones: list[Timing] = []
        sixes: list[Timing] = []
        try:
            for _ in range(given.repeats):
                ones.append(timed(settings, work, ONE)[0])
                timing, completions = timed(settings, work, LAMS)
                sixes.append(timing)
        except GenerationError as error:
            print(f"| {label} | not measured: {error.message} | | | | | | |")
            continue
        reference = reference or completions
        pairs = [pair for both in zip(completions, reference, strict=True) for pair in zip(*both, strict=True)]
        start, one, six = (
            statistics.median(values)
            for values in ([t.start for t in (*ones, *sixes)], [t.asked for t in ones], [t.asked for t in sixes])
        )
        together = statistics.median([timing.start + timing.asked for timing in sixes])
        apart = len(LAMS) * statistics.median([timing.start + timing.asked for timing in ones])
        cpu = statistics.median([timing.cpu for timing in sixes])
        cpu_apart = len(LAMS) * statistics.median([timing.cpu for timing in ones])
        speed = sum(one.num_tokens for all_of_lam in completions for one in all_of_lam) / six
        equal = sum(ours == theirs for ours, theirs in pairs)
        whole = f"{together:.1f} s, CPU {cpu:.1f} | {apart:.1f} s, CPU {cpu_apart:.1f}"
        print(
            f"| {label} | {start:.1f} | {one:.2f} | {six:.2f} | {whole} | {speed:.0f} | {equal} of {len(pairs)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
