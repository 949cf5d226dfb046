"""The run directory: private, content-addressed, and never half-written.

    RUN/
      experiment.yaml     the resolved configuration
      units/KEY.jsonl     one file per unit of work, written whole or not at all
      records/*.jsonl     the units as one view, in key order, for reading
      tuned/             adapters, one folder a seed
      merged/            models whose safety is confirmed; the others stay in unconfirmed/
      results.json        written last
      log.txt             what was done, with times

A unit's key is a hash of everything that its content depends on, so a unit that exists is done, and one whose inputs
changed has another key. That is all there is to resuming.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from backmerge.errors import RunError
from backmerge.records import Record, lines_of, read_lines

PARTIAL = ".partial"
# what `held` makes before the stages write experiment.yaml: a directory with nothing else was left by a killed run
OWN = frozenset({".lock", ".gitignore", "units"})


def key_of(*parts: Any) -> str:
    """A short stable hash of plain data (dicts, lists, strings, numbers): 128-bit XXH3 of its canonical JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all: temporary sibling, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{_unique()}{PARTIAL}")
    try:
        with temporary.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def _unique() -> str:
    """A name's part that no other process, thread or host takes."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def sync_directory(path: Path) -> None:
    """Make a rename in `path` last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A temporary sibling to fill; it takes the name `path` when the block ends well, and is removed otherwise.

    A directory that was at `path` is replaced: moved aside first, removed last. What a killed process left half-filled
    for the same path is removed first; one that a living process fills is left alone.
    """
    path = path.absolute()  # "." has no name to put beside it
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = _unique()
    temporary = path.with_name(f".{path.name}.{unique}{PARTIAL}")
    with _locked(path.parent):  # between making a directory and locking it nobody may take it for abandoned
        _remove_abandoned(path)
        temporary.mkdir()
        lock = os.open(temporary, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        aside = path.with_name(f".{path.name}.{unique}.old{PARTIAL}")
        with _locked(path.parent):
            if path.exists():
                path.replace(aside)
            try:
                temporary.replace(path)
            except OSError:
                if aside.exists():
                    aside.replace(path)
                raise
        sync_directory(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """Clear what killed processes left beside `path`: a living one holds a lock on its own."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        if leftover.name.endswith(f".old{PARTIAL}"):
            if path.exists():  # otherwise it is the only copy: killed between two renames
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.replace(path)
            continue
        descriptor = os.open(leftover, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)


class RunDirectory:
    """One experiment's directory, held by one process at a time.

    Args:
        path: Made (mode 0700) if absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.units = path / "units"
        self.records = path / "records"
        self.tuned = path / "tuned"
        self.merged = path / "merged"
        self.unconfirmed = path / "unconfirmed"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the directory, and hold it against a second process.

        Raises:
            RunError: the path is something else, or another process is at work in it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file, not a run directory", remedy="give another --out.")
        if self.path.is_dir() and not (self.path / "experiment.yaml").exists() and self._holds_foreign_files():
            raise RunError(
                f"{self.path} holds files but no experiment.yaml, so it is not a run directory",
                remedy="give another --out; nothing was touched.",
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.path.chmod(0o700)  # also one that was there, empty, before
        except OSError as error:
            raise RunError(
                f"cannot make {self.path} a private directory: {error}", remedy="give another --out."
            ) from error
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(
                    f"another process is at work in {self.path}", remedy="wait for it, or give another --out."
                ) from error
            self._remove_partial()
            (self.path / ".gitignore").write_text("*\n")
            self.units.mkdir(exist_ok=True)
            yield

    def _holds_foreign_files(self) -> bool:
        return any(file.name not in OWN and not file.name.endswith(PARTIAL) for file in self.path.iterdir())

    def _remove_partial(self) -> None:
        """Clear what a killed process left half-written; we hold the lock, so nobody is writing it now."""
        # listed first: walking a tree while it is removed fails
        for leftover in list(self.path.rglob(f"*{PARTIAL}")):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)

    def unit(self, stage: str, key: str, kind: type[Record], make: Callable[[], Iterable[Record]]) -> list[Record]:
        """The records of a unit: read if it is there, else made and kept."""
        path = self.units / f"{stage}-{key}.jsonl"
        if not path.exists():
            write_whole(path, lines_of(make()))
        return list(read_lines(kind, path))

    def has_unit(self, stage: str, key: str) -> bool:
        """Whether a unit is done."""
        return (self.units / f"{stage}-{key}.jsonl").exists()

    def write_json(self, name: str, values: Any) -> Path:
        """Write plain data as an indented JSON file in the run directory."""
        path = self.path / name
        write_whole(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return path

    def log(self, line: str) -> None:
        """Append a line with the time to `log.txt`."""
        with (self.path / "log.txt").open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
