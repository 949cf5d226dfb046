"""Time merges of synthetic checkpoints: ours, mergekit's, and the machine's floor: `python -m benchmarks.merge`.

One run alternates the three, each as a whole process on a warm page cache, and prints medians as a Markdown table. By
default the checkpoints have 2 GB each, and 26 GB of disk are used; peak memory is also taken at 0.5, 2 and 4 GB.
`make bench-merge` is the same; `--ours-only --cases linear --gigabytes 0.2 --repeats 1 --memory-gigabytes ""` is quick.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import yaml

from benchmarks import floor
from benchmarks.comparison import free_unsampled
from benchmarks.measure import Cost, combined, cost_of
from benchmarks.merge_cases import CASES, Case, Inputs, Outputs
from benchmarks.peer import VERSION, mergekit_python
from benchmarks.synthetic import LLAMA_3_8B, Shape, shape_of, write_adapter, write_models

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
MAX_ANONYMOUS = 300e6  # bytes
SAME_MEMORY = 1.1  # peaks of different sizes of model may differ by this factor
READ_ONCE = 1.05  # bytes read over the inputs' bytes, imports taken off: headers are read apart


class Trial(NamedTuple):
    """One repeat of a case."""

    ours: Cost
    theirs: Cost | None
    floor: Cost


class Bench:
    """The runs of one benchmark, in one scratch folder.

    Args:
        scratch: Where models, outputs and logs go.
        peer: The interpreter that has mergekit; `None` to leave it out.
        options: Of our program, whatever the case.
        is_frugal: Whether the disk gets back all of an output but what is compared, before the next one is written.
    """

    def __init__(self, scratch: Path, peer: Path | None, options: Sequence[str], *, is_frugal: bool = False) -> None:
        self.scratch = scratch
        self.is_frugal = is_frugal
        self.peer = peer
        self.options = options
        self.log = scratch / "log"

    def trial(self, case: Case, inputs: Inputs) -> Trial:
        """Ours, mergekit's and the floor, once; both results are checked, then dropped."""
        ours, theirs, least = (self.scratch / name for name in ("ours", "theirs", "floor"))
        with _dropped(ours), _dropped(theirs):
            program = [sys.executable, "-m", "backmerge", *case.command(inputs, ours), *self.options]
            our_cost = self._measured(program)
            if self.is_frugal:
                free_unsampled(ours)
            their_cost = self._merged_by_peer(case, inputs, theirs) if self.peer else None
            if their_cost:
                case.check(inputs, Outputs(case.our_outputs(ours), sorted(theirs.iterdir())), case.lams)
        with _dropped(least):
            folders = [str(folder) for folder in case.read(inputs)]
            command = [sys.executable, floor.__file__, str(least), str(len(case.lams)), *folders]
            return Trial(our_cost, their_cost, self._measured(command))

    def importing(self, repeats: int) -> Cost:
        """The median cost of `import torch` alone."""
        command = [sys.executable, "-c", "import torch"]
        return median([self._measured(command) for _ in range(repeats)])

    def _merged_by_peer(self, case: Case, inputs: Inputs, out: Path) -> Cost:
        """Run mergekit with its defaults; merged adapters are kept from one λ to the next, the first pays for it."""
        assert self.peer is not None
        costs = []
        with _dropped(self.scratch / "lora-cache") as cache:
            for lam in case.lams:
                file = self.scratch / "mergekit.yml"
                file.write_text(yaml.safe_dump(case.configuration(inputs, lam)))
                program = [str(self.peer), "-m", "mergekit.scripts.run_yaml", str(file), str(out / f"lam-{lam:g}")]
                costs.append(self._measured([*program, "--copy-tokenizer", "--lora-merge-cache", str(cache)]))
        return combined(costs)

    def _measured(self, command: Sequence[str]) -> Cost:
        os.sync()  # nobody waits for what another left to be written
        return cost_of(command, ENVIRONMENT, self.log)


@contextmanager
def _dropped(place: Path) -> Iterator[Path]:
    """A place that is empty before and gone after."""
    shutil.rmtree(place, ignore_errors=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def median(costs: Sequence[Cost]) -> Cost:
    """The median of each figure separately; of peaks the largest."""
    return Cost(
        statistics.median(cost.wall for cost in costs),
        statistics.median(cost.cpu for cost in costs),
        max(cost.peak_anonymous for cost in costs),
        max(cost.num_read for cost in costs),
    )


def medians(trials: Sequence[Trial]) -> Trial:
    """The median of each side."""
    theirs = [trial.theirs for trial in trials if trial.theirs]
    return Trial(
        median([trial.ours for trial in trials]),
        median(theirs) if theirs else None,
        median([trial.floor for trial in trials]),
    )


def make_inputs(place: Path, shape: Shape, cases: Sequence[Case], distance: float) -> Inputs:
    """The models that the cases need, each read once, so that all find them in the page cache."""
    base, tuned = write_models(place, shape, max(case.num_tuned for case in cases), distance)
    adapter = place / "adapter"
    if any(not case.num_tuned for case in cases):
        write_adapter(adapter, base, shape, distance)
    os.sync()
    for file in place.glob("*/*.safetensors"):
        with file.open("rb", buffering=0) as source:
            while source.read(floor.BUFFER):
                pass
    return Inputs(base, tuned, adapter)


def num_bytes(folders: Sequence[Path]) -> int:
    """Of the weight files."""
    return sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))


def targets(case: Case, found: Trial, imports: Cost, inputs: Inputs) -> dict[str, bool]:
    """Each aim of a case, with what was found, and whether it is met."""
    ours, theirs, least = found
    met = {f"{ours.peak_anonymous / 1e6:.0f} ≤ {MAX_ANONYMOUS / 1e6:.0f} MB": ours.peak_anonymous <= MAX_ANONYMOUS}
    if theirs and case.cpu_ratio:
        ratio = theirs.cpu / ours.cpu
        met[f"CPU {ratio:.1f} ≥ {case.cpu_ratio:g}×"] = ratio >= case.cpu_ratio
    if theirs and case.wall_ratio:
        ratio = theirs.wall / ours.wall
        met[f"wall {ratio:.1f} ≥ {case.wall_ratio:g}×"] = ratio >= case.wall_ratio
    if case.floor_ratio:
        ratio = (ours.wall - imports.wall) / least.wall
        met[f"floor {ratio:.2f} ≤ {case.floor_ratio:g}×"] = ratio <= case.floor_ratio
    if case.reads_once:
        share = (ours.num_read - imports.num_read) / num_bytes(case.read(inputs))
        # much less than once is no success: it would have been read through mappings, unseen
        met[f"read {share:.2f} times"] = 1 / READ_ONCE <= share <= READ_ONCE
    return met


def print_table(found: dict[str, Trial], imports: Cost, inputs: Inputs) -> bool:
    """Print the cases as Markdown; whether every aim is met."""
    print("\n| case | ours: wall s / CPU s / peak MB | mergekit | ratio: wall / CPU / peak | floor s | ", end="")
    print("(ours − `import torch`) / floor | aims |\n|---|--:|--:|--:|--:|--:|---|")
    all_met = True
    for case in (case for case in CASES if case.name in found):
        ours, theirs, least = trial = found[case.name]
        met = targets(case, trial, imports, inputs)
        all_met &= all(met.values())
        aims = "; ".join(f"{aim}: {'met' if is_met else '**missed**'}" for aim, is_met in met.items())
        pairs = zip(theirs[:3], ours[:3], strict=True) if theirs else ()
        ratio = " / ".join(f"{their / our:.1f}" for their, our in pairs)
        above = (ours.wall - imports.wall) / least.wall
        print(
            f"| {case.name} | {_cells(ours)} | {_cells(theirs)} | {ratio} | {least.wall:.2f} | {above:.2f} | {aims} |"
        )
    return all_met


def print_memory(peaks: dict[float, float], imports: Cost) -> bool:
    """Print peak memory by the size of the model; whether it is flat."""
    print("\n| checkpoint, GB | peak anonymous MB |\n|--:|--:|")
    for gigabytes, peak in peaks.items():
        print(f"| {gigabytes:g} | {peak / 1e6:.0f} |")
    is_flat = max(peaks.values()) <= SAME_MEMORY * min(peaks.values()) and max(peaks.values()) <= MAX_ANONYMOUS
    print(f"\nLinear; {imports.peak_anonymous / 1e6:.0f} MB of it is `import torch`. ", end="")
    print(f"At most {MAX_ANONYMOUS / 1e6:.0f} MB and within 10 % of each other: {'met' if is_flat else '**missed**'}.")
    return is_flat


def _cells(cost: Cost | None) -> str:
    return f"{cost.wall:.2f} / {cost.cpu:.2f} / {cost.peak_anonymous / 1e6:.0f}" if cost else ""


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--gigabytes", type=float, default=2, help="size of each checkpoint (2)")
    parser.add_argument("--llama-3-8b", action="store_true", help="checkpoints of Llama-3-8B's shapes, 16 GB each")
    parser.add_argument("--memory-gigabytes", default="0.5,2,4", help='sizes at which memory is taken; "" for none')
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (3)")
    parser.add_argument("--cases", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--distance", type=float, default=0.02, help="norm of a delta over that of the weights (0.02)")
    parser.add_argument("--frugal", action="store_true", help="keep of an output only what is compared; needs Linux")
    parser.add_argument("--far", action="store_true", help="models that have nothing in common, so that slerp bends")
    parser.add_argument("--ours-only", action="store_true", help="leave mergekit out, and the comparison with it")
    parser.add_argument("--mergekit-python", type=Path, help="an interpreter with mergekit; default: .venv-mergekit's")
    parser.add_argument("--scratch", type=Path, help="where models and outputs go; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write every figure there")
    options = parser.parse_args()
    if unknown := set(options.cases.split(",")) - set(names):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return options


def main() -> None:
    """Make the models, time the cases, print the tables; exit with 1 where an aim is missed."""
    options = parsed()
    cases = [case for case in CASES if case.name in options.cases.split(",")]
    distance = math.inf if options.far else options.distance
    peer = None if options.ours_only else mergekit_python(options.mergekit_python)
    if options.scratch:
        options.scratch.mkdir(parents=True, exist_ok=True)
    trials: dict[str, list[Trial]] = {case.name: [] for case in cases}
    peaks: dict[float, float] = {}
    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=options.scratch) as folder:
        scratch = Path(folder)
        shape = LLAMA_3_8B if options.llama_3_8b else shape_of(options.gigabytes)
        # the base, the tuned models, and what both tools write; of ours little is left when the other writes
        sides = 1.25 if options.frugal else 2
        copies = 1 + max(case.num_tuned for case in cases) + sides * max(len(case.lams) for case in cases)
        if shutil.disk_usage(scratch).free < copies * shape.num_bytes:
            sys.exit(
                f"{scratch} has not the {copies * shape.num_bytes / 1e9:.0f} GB free that this takes: give --scratch"
            )
        allowed = ["--allow-unrelated"] if options.far else []
        bench = Bench(scratch, peer, allowed, is_frugal=options.frugal)
        imports = bench.importing(options.repeats)
        with _dropped(scratch / "models") as place:
            inputs = make_inputs(place, shape, cases, distance)
            _say(f"{num_bytes([inputs.base]) / 1e9:.2f} GB each; `import torch` {_cells(imports)}")
            for repeat in range(options.repeats):
                for case in cases:
                    trials[case.name].append(trial := bench.trial(case, inputs))
                    sides = (f"{side} {_cells(cost)}" for side, cost in trial._asdict().items() if cost)
                    _say(f"{repeat + 1}: {case.name}: {'; '.join(sides)}")
            print_head(imports, inputs, options, peer)
            all_met = print_table({name: medians(found) for name, found in trials.items()}, imports, inputs)
        for gigabytes in (float(part) for part in options.memory_gigabytes.split(",") if part):
            with _dropped(scratch / "models") as place:
                linear = CASES[0]
                inputs = make_inputs(place, shape_of(gigabytes), [linear], distance)
                peaks[gigabytes] = Bench(scratch, None, allowed).trial(linear, inputs).ours.peak_anonymous
    if peaks:
        all_met &= print_memory(peaks, imports)
    if options.json:
        raw = {
            name: [{side: c and c._asdict() for side, c in t._asdict().items()} for t in trials[name]]
            for name in trials
        }
        figures = {"machine": machine(), "import torch": imports._asdict(), "trials": raw, "peaks": peaks}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(not all_met)


def print_head(imports: Cost, inputs: Inputs, options: argparse.Namespace, peer: Path | None) -> None:
    """Say on what and with what it was measured."""
    print(f"\n{machine()}. Checkpoints of {num_bytes([inputs.base]) / 1e9:.2f} GB in bfloat16, ", end="")
    print(
        f"{'unrelated' if options.far else f'deltas of {options.distance:.1%} of the norm'}, page cache warm. ", end=""
    )
    print(f"Medians of {options.repeats}, of memory the largest; whole processes, imports included: ", end="")
    print(
        f"`import torch` alone is {_cells(imports)}. The floor reads the inputs, writes the outputs and syncs.", end=""
    )
    print(f" mergekit {VERSION}: its defaults on the CPU." if peer else "")


def machine() -> str:
    """Cores, processor and versions, in a line."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "")
    from importlib.metadata import version

    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} cores ({platform.machine()}, {model}), Python {platform.python_version()}, torch {version('torch')}"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
