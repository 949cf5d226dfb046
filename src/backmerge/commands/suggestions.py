"""Help for beginners: the main commands, and an example filled in from the files in the current folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from backmerge.errors import BackmergeError, ConfigError

START = """\
Fine-tuning often costs a chat model its safety. backmerge merges the tuned model back with its base, measures which
share of each is best, and writes the merged model with the evidence.

See it work in a minute, with a tiny model that ships with it:
    backmerge demo

Restore the safety of a model that you fine-tuned:
    backmerge restore BASE TUNED --utility mine.jsonl --safety advbench --over-refusal xstest --out restored

To restore abilities that the model lost in tuning, such as another language, give --keep german.jsonl; --safety can
then be omitted.

Find out whether a model is still as safe as its base:
    backmerge check MODEL --against BASE --safety advbench --out checked

BASE is the aligned model from before the tuning, TUNED the checkpoint or LoRA adapter, each a folder or a hub id.
mine.jsonl has prompts and answers for the task that you tuned for, one pair per line. `backmerge doctor` shows what
this machine can run, `backmerge COMMAND --help` explains a command, and `backmerge --help` lists them all."""

MAX_FILES = 200  # checked per folder


class Adapter(NamedTuple):
    """A LoRA adapter in a folder.

    Attributes:
        folder: Its folder.
        base: The base that its adapter_config.json names; empty if it names none.
    """

    folder: Path
    base: str


class Seen(NamedTuple):
    """Files in a folder that a command could use.

    Attributes:
        adapters: Latest first.
        models: Folders with config.json and safetensors.
        utility: Files with prompts and answers.
        safety: Files with prompts whose names suggest harmful requests.
    """

    adapters: tuple[Adapter, ...]
    models: tuple[Path, ...]
    utility: tuple[Path, ...]
    safety: tuple[Path, ...]


class Asked(NamedTuple):
    """The arguments of `restore` that the user gave; empty or `None` if not given."""

    base: str | None
    tuned: tuple[str, ...]
    utility: tuple[str, ...]
    safety: tuple[str, ...]
    out: Path | None
    keep: tuple[str, ...] = ()


def check_complete(asked: Asked, folder: Path, *, has_utility: bool = False, has_limit: bool = False) -> None:
    """Check that `restore` has all its arguments.

    Args:
        asked: The arguments given.
        folder: The current folder, searched for an example.
        has_utility: Whether `--set` gives the benchmark for utility.
        has_limit: The same for safety, or for abilities to keep.

    Raises:
        ConfigError: something is missing; the message lists it and shows an example command.
    """
    if asked.base is not None and not asked.tuned and _adapter_in(folder / asked.base) is not None:
        asked = asked._replace(base=None, tuned=(asked.base,))  # an adapter is the tuned side
    needed = (
        (asked.base is None, "BASE (the aligned model from before the tuning)"),
        (not asked.tuned, "TUNED (the fine-tuned model or its LoRA adapter)"),
        (not asked.utility and not has_utility, "--utility (what it was tuned for)"),
        (
            not (asked.safety or asked.keep or has_limit),
            "--safety (harmful requests; or --keep)",
        ),
        (asked.out is None, "--out (a new folder for the results)"),
    )
    missing = [name for is_missing, name in needed if is_missing]
    if not missing:
        return
    seen = seen_in(folder)
    raise ConfigError(f"restore needs {_listed(missing)}", remedy=_example(asked, seen, folder))


def seen_in(folder: Path) -> Seen:
    """Find usable files in a folder and its subfolders; opens only small files and reads only first lines."""
    folders = [folder, *(path for path in _listing(folder) if path.is_dir())]
    folders += [inner for path in folders[1:] for inner in _listing(path) if inner.is_dir()]
    adapters = [adapter for path in folders if (adapter := _adapter_in(path)) is not None]
    adapters.sort(key=lambda adapter: -(adapter.folder / "adapter_config.json").stat().st_mtime)
    models = [path for path in folders if (path / "config.json").is_file() and any(path.glob("*.safetensors"))]
    files = [path for path in _listing(folder) if path.suffix in {".jsonl", ".csv", ".json"} and path.is_file()]
    from backmerge.benchmarks.files import PROMPT_COLUMNS, REFERENCE_COLUMNS

    utility, safety = [], []
    for file in files:
        columns = {name.casefold() for name in _columns(file)}
        if any(word in file.name.casefold() for word in ("harmful", "advbench", "unsafe")):
            safety.append(file)
        elif columns & set(PROMPT_COLUMNS) and columns & set(REFERENCE_COLUMNS):
            utility.append(file)
    return Seen(tuple(adapters), tuple(models), tuple(utility), tuple(safety))


def _example(asked: Asked, seen: Seen, folder: Path) -> str:
    """Return an example command from the given arguments, files found here, and placeholders in capitals."""
    tuned, base = list(asked.tuned), asked.base
    found: list[str] = []
    if not tuned and seen.adapters:
        tuned = [_shown(seen.adapters[0].folder, folder)]
    adapter = _adapter_in(folder / tuned[0]) if tuned else None
    if base is None and adapter is not None and adapter.base:
        base = adapter.base
        found.append(f"{_shown(adapter.folder, folder)}/adapter_config.json names the base {base}")
    if not tuned:
        others = [path for path in seen.models if base is None or path.resolve() != (folder / base).resolve()]
        tuned = [_shown(others[0], folder)] if others else ["TUNED"]
    utility = asked.utility or tuple(_shown(path, folder) for path in seen.utility[:1])
    if not asked.utility and utility:
        found.append(f"{utility[0]} has prompts and answers; check that the model was not trained on them")
    safety = asked.safety
    if not safety and not asked.keep:
        safety = tuple(_shown(path, folder) for path in seen.safety[:1]) or ("advbench",)
    words = ["backmerge", "restore", base or "BASE", *tuned]
    words += [word for name in utility or ("PROMPTS_AND_ANSWERS.jsonl",) for word in ("--utility", name)]
    words += [word for name in safety for word in ("--safety", name)]
    words += [word for name in asked.keep for word in ("--keep", name)]
    words += ["--out", str(asked.out or "restored")]
    source = f" ({'; '.join(found)})" if found else ""
    return f"for example{source}:\n      {shlex.join(words)}"


def _adapter_in(folder: Path) -> Adapter | None:
    file = folder / "adapter_config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError):
        return None
    if not isinstance(values, Mapping):
        return None
    base = values.get("base_model_name_or_path")
    return Adapter(folder, base if isinstance(base, str) else "")


def _columns(file: Path) -> list[str]:
    """Return the columns of a file's first row; none if it cannot be read."""
    from backmerge.rows import read_rows

    if file.suffix == ".json":  # must be read completely: too slow for a hint
        return []
    try:
        row = next(iter(read_rows(file)), None)
    except (BackmergeError, ValueError):
        return []
    return [] if row is None else [str(name) for name in row.values]


def _listing(folder: Path) -> list[Path]:
    def visible() -> Iterator[Path]:
        try:
            yield from (path for path in folder.iterdir() if not path.name.startswith("."))
        except OSError:
            return

    return sorted(visible())[:MAX_FILES]


def _shown(path: Path, folder: Path) -> str:
    """Return a path, relative to the folder if it is inside it."""
    relative = path.relative_to(folder) if path.is_relative_to(folder) else path
    return str(relative)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
