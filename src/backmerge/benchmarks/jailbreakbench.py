"""JailbreakBench: 100 harmful behaviours, and 100 harmless ones on the same subjects.

Data: `JailbreakBench/JBB-Behaviors` on the hub (splits `harmful` and `benign`), from Chao et al. (arXiv 2404.01318),
MIT licence; `Index`, `Goal`, `Target`, `Behavior`, `Category`, `Source`. Your own copy: harmful-behaviors.csv and
benign-behaviors.csv, or the folder that holds both.

Worked example: row 12 of the harmful half asks for something harmful, and row 12 of the harmless half asks about the
same subject. The harmful `Goal` is judged for harm, the harmless one for refusal. The two form a pair and are
put on the same side of the split. `Target`, the beginning of a compliant answer, is not used.
"""

from __future__ import annotations

from pathlib import Path

from backmerge.benchmarks.files import data_rows
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, Kind, options_of
from backmerge.errors import DataError
from backmerge.records import Example, Message

NEEDS = "the hub, or NAME=FOLDER with harmful-behaviors.csv and benign-behaviors.csv"

REMEDY = "give harmful-behaviors.csv and benign-behaviors.csv as their authors published them."


def jailbreakbench(settings: BenchmarkSettings) -> Benchmark:
    """JailbreakBench's 100 harmful behaviours, for ASR.

    Raises:
        DataError: the hub or the file cannot be read, or a row has no such column.
    """
    return _half(settings, "jailbreakbench", "safety", "harmful")


def jailbreakbench_benign(settings: BenchmarkSettings) -> Benchmark:
    """JailbreakBench's 100 harmless behaviours on the same subjects, for over-refusal.

    Raises:
        DataError: see `jailbreakbench`.
    """
    return _half(settings, "jailbreakbench-benign", "over_refusal", "benign")


def _half(settings: BenchmarkSettings, name: str, kind: Kind, split: str) -> Benchmark:
    options_of(settings, {})
    rows = data_rows(
        _file(settings.data, split), "JailbreakBench", "JailbreakBench/JBB-Behaviors", split=split, config="behaviors"
    )
    examples = []
    for place, row in rows:
        goal, index = row.get("Goal"), row.get("Index")
        if not goal or index in (None, ""):
            raise DataError(f"{place}: no text under 'Goal' or 'Index'", remedy=REMEDY)
        examples.append(
            Example(
                f"jailbreakbench-{split}-{index}",
                (Message("user", str(goal)),),
                category=row.get("Category") or None,
                pair=f"jailbreakbench-{index}",
            )
        )
    return Benchmark(name, kind, tuple(examples), max_new_tokens=512)


def _file(data: str | None, split: str) -> str | None:
    """Return the half's file: the given one, or the one in the given folder."""
    if data is None:
        return None
    path = Path(data).expanduser()
    if not path.is_dir():
        other = "benign" if split == "harmful" else "harmful"
        if path.name.startswith(other):
            raise DataError(f"{path} is JailbreakBench's {other} half, but the {split} one is needed", remedy=REMEDY)
        return data
    name = f"{split}-behaviors.csv"
    found = next((file for file in (path / name, path / "data" / name) if file.is_file()), None)
    if found is None:
        raise DataError(f"the folder {path} has no {name}", remedy=REMEDY)
    return str(found)
