"""The examples to tune on, from a named data set or a user's file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from backmerge.benchmarks.files import from_file
from backmerge.errors import DataError
from backmerge.records import Example
from backmerge.registry import DATASETS, is_plugin, resolve


def load_examples(name: str, *, allow_plugins: bool = False) -> Sequence[Example]:
    """Examples with references, which are the answers to learn.

    Raises:
        ConfigError: there is no data set of that name.
        DataError: the file is missing, or a row has no prompt or no answer.
    """
    path = Path(name).expanduser()
    if name not in DATASETS.entries and not (is_plugin(name) and not path.exists()):
        if path.is_file():
            return from_file(path, "utility").examples
        if path.suffix or "/" in name:
            raise DataError(f"there is no file '{name}'", remedy="give a .jsonl or .csv file, or a data set's name.")
    examples: Sequence[Example] = resolve(DATASETS, name, allow_plugins=allow_plugins)()
    return examples
