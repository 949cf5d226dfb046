"""List what takes up space in a run directory, and remove what its results do not need."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from backmerge.errors import ConfigError, RunError
from backmerge.generation.cache import cache_directory
from backmerge.outputs import MANIFEST
from backmerge.progress import size_text
from backmerge.registry import closest
from backmerge.runs import EARLIER, PARTIAL, RunDirectory


class Part(NamedTuple):
    """A part of a run directory.

    Attributes:
        name: Its name for `--all-but`.
        what: A description.
        lost: What is lost, or must be made again, once it is removed.
        patterns: Patterns of its files and folders, relative to the run directory.
        is_needed: Whether it is kept unless the user says otherwise.
        is_work: Whether an unfinished run continues from it.
        has_models: Whether it includes only folders with a model that backmerge wrote.
    """

    name: str
    what: str
    lost: str
    patterns: tuple[str, ...]
    is_needed: bool = True
    is_work: bool = False
    has_models: bool = False


# parts inside another part come first
PARTS = (
    Part("partial", "half-written files of killed processes", "nothing", (f"**/*{PARTIAL}",), is_needed=False),
    Part(
        "units",
        "answers, verdicts and values, one file per unit",
        "the same command generates its answers again",
        ("units/*.jsonl", "answered*.jsonl", "layers.journal", "workers"),
        is_needed=False,
        is_work=True,
    ),
    Part("records", "the same, for reading", "`score`, `label` and --against-run cannot use this run", ("records",)),
    Part(
        "training",
        "states from which an interrupted tuning continues",
        "an interrupted tuning starts again",
        ("tuned/.*.training-*",),
        is_needed=False,
        is_work=True,
    ),
    Part("snapshots", "snapshots of the tuning", "the tuned models are trained again", ("tuned/*/snapshots",)),
    Part("tuned", "tuned models", "they are trained again", ("tuned/*",), is_work=True, has_models=True),
    Part(
        "unconfirmed",
        "merged models that are not confirmed",
        "the same command writes them again",
        ("unconfirmed/*",),
        is_needed=False,
        has_models=True,
    ),
    Part("merged", "merged models that are confirmed", "they are written again", ("merged/*",), has_models=True),
    Part(
        "report",
        "report, tables and plots",
        "`backmerge report` makes them again",
        ("report.html", "scores.csv", "summary.csv", "plots", "tables"),
    ),
    Part("earlier", "results and models of other settings", "they are lost", (f"{EARLIER}/*",)),
)


class Space(NamedTuple):
    """The size of one part.

    Attributes:
        part: The part.
        paths: Its files and folders.
        num_bytes: Size of all files in them that do not belong to an earlier part.
    """

    part: Part
    paths: tuple[Path, ...]
    num_bytes: int


def space_of(run: Path) -> list[Space]:
    """Return the size of each part that a run directory has; reads only.

    Raises:
        RunError: the folder is not a run directory.
    """
    if not (run / "experiment.yaml").is_file():
        raise RunError(
            f"{run} is not a run directory: it has no experiment.yaml",
            remedy="give a run directory; nothing was changed.",
        )
    found: list[Space] = []
    counted: set[Path] = set()
    for part in PARTS:
        paths = tuple(_paths(run, part))
        files = {file for path in paths for file in _files(path)} - counted
        counted |= files
        if paths:
            found.append(Space(part, paths, sum(map(_size, files))))
    return found


def to_remove(spaces: Sequence[Space], kept: Sequence[str] | None) -> list[Space]:
    """Return the parts to remove: all but `kept`, or by default those that the results do not need.

    Raises:
        ConfigError: a part does not exist.
    """
    if kept is None:
        return [space for space in spaces if not space.part.is_needed]
    names = [part.name for part in PARTS]
    for name in kept:
        if name not in names:
            raise ConfigError(
                f"a run has no part named '{name}'{closest(name, names)}", remedy=f"its parts: {', '.join(names)}."
            )
    stays = {*kept, *(("tuned",) if "snapshots" in kept else ())}  # snapshots are in the tuned models' folders
    return [space for space in spaces if space.part.name not in stays]


def check_finished(run: Path, leaving: Sequence[Space]) -> None:
    """Check that nothing that an unfinished run needs is removed.

    Raises:
        RunError: something is.
    """
    work = [space.part.name for space in leaving if space.part.is_work]
    if work and not (run / "results.json").is_file():
        raise RunError(
            f"{run} is not finished: its {' and '.join(work)} contain its work so far, from which it continues",
            remedy=f"run its command again, or keep them: --all-but {','.join(work)}; nothing was changed.",
        )


def clean(run: Path, kept: Sequence[str] | None) -> int:
    """Remove the parts; return the bytes that were freed. The directory is locked meanwhile.

    Raises:
        BackmergeError: it is not a run directory, not finished, or in use.
    """
    directory = RunDirectory(run)
    before = to_remove(space_of(run), kept)
    check_finished(run, before)
    partial = sum(space.num_bytes for space in before if space.part.name == "partial")
    with directory.held():  # this also removes half-written files
        leaving = [space for space in to_remove(space_of(run), kept) if space.part.name != "partial"]
        check_finished(run, leaving)
        for space in leaving:
            for path in space.paths:
                _remove(path)
        told = ", ".join(f"{space.part.name} ({size_text(space.num_bytes)})" for space in before) or "nothing"
        directory.log(f"cleaned: {told}")
    return partial + sum(space.num_bytes for space in leaving)


def cached_answers() -> list[Path]:
    """Return the files of the cache of answers; other files in its folder must not be removed."""
    folder = cache_directory() / "completions"
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if re.fullmatch(r"[0-9a-f]{32}\.jsonl", file.name))


def clean_cache() -> int:
    """Remove all cached answers; return the bytes that were freed."""
    files = cached_answers()
    freed = bytes_of(files)
    for file in files:
        file.unlink(missing_ok=True)
    return freed


def bytes_of(files: Sequence[Path]) -> int:
    """Return the total size of the files in bytes."""
    return sum(map(_size, files))


def _paths(run: Path, part: Part) -> Iterator[Path]:
    inside = run.resolve()
    for pattern in part.patterns:
        for path in sorted(run.glob(pattern)):
            # a link to another folder is not emptied
            if path.is_symlink() or not path.resolve().is_relative_to(inside):
                continue
            if not part.has_models or (path / MANIFEST).is_file():
                yield path


def _files(path: Path) -> Iterator[Path]:
    """Yield the file, or all files in the folder; links count as separate files."""
    if not path.is_dir() or path.is_symlink():
        yield path
        return
    yield from (file for file in path.rglob("*") if file.is_symlink() or file.is_file())


def _size(file: Path) -> int:
    return file.lstat().st_size if file.is_symlink() or file.exists() else 0


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
