"""What takes space in a run directory, and removing what its results do not need."""

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
    """A kind of content of a run directory.

    Attributes:
        name: For `--all-but`.
        what: In words.
        lost: What is no longer possible, or made anew, once it is gone.
        patterns: Of its files and folders, from the run directory on.
        is_needed: Whether it stays unless another choice is made.
        is_work: Whether an unfinished run goes on from it.
        has_models: Whether only folders that hold a model of ours are meant.
    """

    name: str
    what: str
    lost: str
    patterns: tuple[str, ...]
    is_needed: bool = True
    is_work: bool = False
    has_models: bool = False


# what lies within another part comes first
PARTS = (
    Part("partial", "what killed processes left half-written", "nothing", (f"**/*{PARTIAL}",), is_needed=False),
    Part(
        "units",
        "answers, verdicts and values, as they were made",
        "the same command makes its answers anew",
        ("units/*.jsonl", "answered*.jsonl", "layers.journal", "workers"),
        is_needed=False,
        is_work=True,
    ),
    Part("records", "the same for reading", "no `score`, `label` or --against-run of this run", ("records",)),
    Part(
        "training",
        "states that an interrupted tuning goes on from",
        "an interrupted tuning begins anew",
        ("tuned/.*.training-*",),
        is_needed=False,
        is_work=True,
    ),
    Part("snapshots", "the tuning after so many steps", "the path is trained anew", ("tuned/*/snapshots",)),
    Part("tuned", "tuned models", "they are trained anew", ("tuned/*",), is_work=True, has_models=True),
    Part(
        "unconfirmed",
        "merged models that are not confirmed",
        "the same command writes them anew",
        ("unconfirmed/*",),
        is_needed=False,
        has_models=True,
    ),
    Part("merged", "merged models that are confirmed", "they are written anew", ("merged/*",), has_models=True),
    Part(
        "report",
        "report, tables and plots",
        "`backmerge report` makes them again",
        ("report.html", "scores.csv", "summary.csv", "plots", "tables"),
    ),
    Part("earlier", "results and models of other settings", "they are gone", (f"{EARLIER}/*",)),
)


class Space(NamedTuple):
    """What one part takes.

    Attributes:
        part: Which.
        paths: Its files and folders.
        num_bytes: Of all files in them that are of no part before.
    """

    part: Part
    paths: tuple[Path, ...]
    num_bytes: int


def space_of(run: Path) -> list[Space]:
    """What each part of a run directory takes, the parts that there are; reads only.

    Raises:
        RunError: the folder is no run directory.
    """
    if not (run / "experiment.yaml").is_file():
        raise RunError(
            f"{run} is no run directory: it has no experiment.yaml", remedy="give one run; nothing was touched."
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
    """The parts that go: all but `kept`, or by default what the results do not need.

    Raises:
        ConfigError: there is no part of such a name.
    """
    if kept is None:
        return [space for space in spaces if not space.part.is_needed]
    names = [part.name for part in PARTS]
    for name in kept:
        if name not in names:
            raise ConfigError(
                f"a run has no part named '{name}'{closest(name, names)}", remedy=f"its parts: {', '.join(names)}."
            )
    stays = {*kept, *(("tuned",) if "snapshots" in kept else ())}  # they lie in the tuned models' folders
    return [space for space in spaces if space.part.name not in stays]


def check_finished(run: Path, leaving: Sequence[Space]) -> None:
    """That what goes is not the work of a run that is not finished.

    Raises:
        RunError: it is.
    """
    work = [space.part.name for space in leaving if space.part.is_work]
    if work and not (run / "results.json").is_file():
        raise RunError(
            f"{run} is not finished: its {' and '.join(work)} are the work that is done, and it goes on from them",
            remedy=f"give its command again, or keep them: --all-but {','.join(work)}; nothing was touched.",
        )


def clean(run: Path, kept: Sequence[str] | None) -> int:
    """Remove the parts; gives the bytes that were freed. The directory is held against other processes meanwhile.

    Raises:
        BackmergeError: it is no run directory, not finished, or in use.
    """
    directory = RunDirectory(run)
    before = to_remove(space_of(run), kept)
    check_finished(run, before)
    partial = sum(space.num_bytes for space in before if space.part.name == "partial")
    with directory.held():  # which removes what is half-written
        leaving = [space for space in to_remove(space_of(run), kept) if space.part.name != "partial"]
        check_finished(run, leaving)
        for space in leaving:
            for path in space.paths:
                _remove(path)
        told = ", ".join(f"{space.part.name} ({size_text(space.num_bytes)})" for space in before) or "nothing"
        directory.log(f"cleaned: {told}")
    return partial + sum(space.num_bytes for space in leaving)


def cached_answers() -> list[Path]:
    """The files of the cache of answers; nothing else in its folder is ours to remove."""
    folder = cache_directory() / "completions"
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if re.fullmatch(r"[0-9a-f]{32}\.jsonl", file.name))


def clean_cache() -> int:
    """Remove all cached answers; gives the bytes that were freed."""
    files = cached_answers()
    freed = bytes_of(files)
    for file in files:
        file.unlink(missing_ok=True)
    return freed


def bytes_of(files: Sequence[Path]) -> int:
    """The bytes of all these files."""
    return sum(map(_size, files))


def _paths(run: Path, part: Part) -> Iterator[Path]:
    inside = run.resolve()
    for pattern in part.patterns:
        for path in sorted(run.glob(pattern)):
            # a folder that leads elsewhere is not emptied there
            if path.is_symlink() or not path.resolve().is_relative_to(inside):
                continue
            if not part.has_models or (path / MANIFEST).is_file():
                yield path


def _files(path: Path) -> Iterator[Path]:
    """The file, or all that are in the folder; links count as separate files."""
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
