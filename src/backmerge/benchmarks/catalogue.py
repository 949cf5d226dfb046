"""From what a user writes (a benchmark's name, or a file) to a benchmark of the kind that is needed."""

from __future__ import annotations

from pathlib import Path

from backmerge.benchmarks.files import from_file
from backmerge.benchmarks.protocol import Benchmark, Kind
from backmerge.errors import ConfigError, DataError
from backmerge.registry import BENCHMARKS, is_plugin, resolve


def find_benchmark(name: str, kind: Kind, *, allow_plugins: bool = False) -> Benchmark:
    """The benchmark of that name, or of the prompts in that file.

    Raises:
        ConfigError: there is no such name, or it is of another kind.
        DataError: the file is missing or cannot be read.
    """
    path = Path(name).expanduser()
    if name not in BENCHMARKS.entries and not (is_plugin(name) and not path.exists()):
        if path.is_file():
            return from_file(path, kind)
        if path.suffix or "/" in name:
            raise DataError(f"there is no file '{name}'", remedy="give a .jsonl or .csv file, or a benchmark's name.")
    benchmark: Benchmark = resolve(BENCHMARKS, name, allow_plugins=allow_plugins)()
    if benchmark.kind != kind:
        raise ConfigError(
            f"'{name}' measures {benchmark.kind}, and is asked for as {kind}",
            remedy=f"put it under {benchmark.kind}.",
        )
    return benchmark
