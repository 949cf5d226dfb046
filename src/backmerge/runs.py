"""Manage the run directory: private, content-addressed, and never half-written.

    RUN/
      experiment.yaml     the resolved configuration
      units/KEY.jsonl     one file per unit of work, written whole or not at all
      records/*.jsonl     all units merged, in key order, for reading
      tuned/             adapters, one folder a seed
      merged/            confirmed models; the others are in unconfirmed/
      digests.json        digests of the results, samples and records, to detect damage
      results.json        written last
      looks.jsonl         what was confirmed on which prompts, with the outcome
      log.txt             what was done, with times
      sessions.jsonl      what each session cost
      shards/I-of-N/      the log and the cost of each process that did a part

A unit's key is a hash of everything that its content depends on. So a unit that exists is done, and a unit with changed
inputs has another key. Resuming and sharing a directory need nothing else: two processes that do the same unit write
the same file, each through its own temporary file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from backmerge.errors import BackmergeError, DataError, RunError
from backmerge.outputs import DIGESTS, check_replaceable, digest_of, is_free, models_in
from backmerge.progress import say
from backmerge.records import (
    Completion,
    Unit,
    Value,
    Verdict,
    check_seal,
    damaged,
    from_dict,
    lines_of,
    read_lines,
    sealed,
    to_json,
)

PARTIAL = ".partial"
SETTINGS, RESULTS, SAMPLES = "experiment.yaml", "results.json", "samples.json"
EARLIER = "earlier"  # holds a numbered folder for each set of results that the same directory had before
# files that are made from the units and move with results.json, which is moved last
FINDINGS = ("records", "plots", "tables", "report.html", "check.md", "scores.csv", "summary.csv", SAMPLES, DIGESTS)
MOVING = ".moving"  # in such a folder until everything has been moved there
SHARDS = "shards"  # the folder for the logs of processes that share a run
# what `held` creates before the stages write experiment.yaml: a directory with nothing else is left from a killed run
OWN = frozenset({".lock", ".gitignore", "units"})
# what later sessions build on; everything else in a directory is quickly made again
WORK = (
    *("units/*", "answered*", "layers.journal", "workers/*", "tuned/*", "tuned/.*", "merged/*", "unconfirmed/*"),
    f"{EARLIER}/*",
)
# errors of file systems without locks, or without locks on directories: NFS requires a file that is open for writing
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF})
OCCUPIED = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR})
NAME_KEPT = 180  # most bytes of a folder's name that leave room for a temporary sibling's suffix
NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


def key_of(*parts: Any) -> str:
    """Return a short stable hash of plain data (dicts, lists, strings, numbers): XXH3-128 of its canonical JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def write_whole(path: Path, *content: str | bytes | memoryview) -> None:
    """Write a file from its parts, completely or not at all: temporary sibling, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{_unique()}{PARTIAL}")
    try:
        with temporary.open("wb") as stream:
            for part in content:
                stream.write(part.encode() if isinstance(part, str) else part)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_once(path: Path, *content: str | bytes | memoryview) -> bool:
    """Write a file unless it exists, and return whether this process wrote it; of several processes only one does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{_unique()}{PARTIAL}")
    try:
        write_whole(temporary, *content)
        try:
            os.link(temporary, path)  # a rename would replace an existing file
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if path.exists():
                return False
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)
    return True


def cut_torn_line(log: Path) -> None:
    """Cut off an incomplete last line that a killed process left in a log."""
    if not log.exists():
        return
    with log.open("rb+") as stream:
        content = stream.read()
        stream.truncate(content.rfind(b"\n") + 1)


def _unique() -> str:
    """Return a part of a name that no other process, thread or host uses."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def sync_directory(path: Path) -> None:
    """Make a rename in `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Make a temporary sibling to fill; it is renamed to `path` when the block succeeds, and removed otherwise.

    Args:
        path: Appears complete; parent folders that were made for it are removed if the block fails.
        replace: Whether a model that backmerge wrote there is replaced: moved aside first, removed last. Otherwise
            nothing is ever replaced, not even what appeared during the block.

    Raises:
        RunError: something is there that may not be replaced.
    """
    path = path.expanduser().resolve()  # a link's target is replaced, and "." has no name for a sibling
    with _parents_of(path):
        unique = _unique()
        temporary = path.with_name(f".{_stem(path)}.{unique}{PARTIAL}")
        with _locked(path.parent):  # until the new directory is locked, others could consider it abandoned
            _remove_abandoned(path)
            _check_name(path, replace=replace)
            temporary.mkdir()
            lock = os.open(temporary, os.O_RDONLY)
            _take(lock, fcntl.LOCK_EX)
        try:
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    with file.open("rb") as stream:
                        os.fsync(stream.fileno())
            aside = path.with_name(f".{_stem(path)}.{unique}.old{PARTIAL}")
            with _locked(path.parent):
                _check_name(path, replace=replace, is_late=True)  # it may have changed since the command began
                if not is_free(path):
                    path.rename(aside)
                try:
                    temporary.rename(path)  # replaces only an empty folder, and otherwise fails
                except OSError as error:
                    if error.errno in OCCUPIED:
                        raise _occupied(path, is_late=True) from error
                    raise
                finally:
                    if aside.exists() and is_free(path):
                        aside.rename(path)
            sync_directory(path.parent)
            shutil.rmtree(aside, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)


def _stem(path: Path) -> str:
    """Return the start of the names of temporary siblings; short, since a name has at most 255 bytes."""
    name = path.name
    return name if len(name.encode()) <= NAME_KEPT else xxhash.xxh3_128_hexdigest(name.encode())


def _check_name(path: Path, *, replace: bool, is_late: bool = False) -> None:
    if replace:
        check_replaceable(path)
    elif not is_free(path):
        raise _occupied(path, is_late=is_late)


def _occupied(path: Path, *, is_late: bool) -> RunError:
    if is_late:
        return RunError(
            f"{path} was written by another command while this one was running, and is kept",
            remedy="give another --out; what this command made was removed.",
        )
    return RunError(f"{path} already exists, and was not changed", remedy="give another --out.")


@contextlib.contextmanager
def _parents_of(path: Path) -> Iterator[None]:
    """Make the folders above a path; those that were made and are still empty are removed if the block fails."""
    with contextlib.ExitStack() as undo:
        for parent in reversed([parent for parent in path.parents if not parent.exists()]):
            undo.callback(_remove_if_empty, parent)  # called in reverse order: the innermost first
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
        undo.pop_all()


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):  # it is in use now, or was never made
        directory.rmdir()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        _take(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, how: int) -> bool | None:
    """Take a lock, and return whether it succeeded; `None` if the file system has no such locks."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


@contextlib.contextmanager
def claimed(place: Path) -> Iterator[bool]:
    """Claim a file for one process at a time, as far as locks reach; yields whether nobody else has claimed it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("a+") as lock:
        yield _take(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB) is not False


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes left for `path`; a living process holds a lock on its own."""
    # `lam-0` and `lam-0.2` have separate siblings: a glob pattern for the first would also match the second's
    ours = re.compile(rf"\.{re.escape(_stem(path))}\.\d+-[0-9a-f]+(\.old)?{re.escape(PARTIAL)}")
    for leftover in [entry for entry in path.parent.iterdir() if ours.fullmatch(entry.name)]:
        if leftover.name.endswith(f".old{PARTIAL}"):
            if path.exists():  # otherwise this is the only copy: killed between two renames
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.replace(path)
            continue
        descriptor = os.open(leftover, os.O_RDONLY)
        try:
            if _take(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(leftover, ignore_errors=True)
        finally:
            os.close(descriptor)


def indented(values: Any) -> str:
    """Return plain data as indented JSON text.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_results(run: Path, text: str) -> Path:
    """Write `results.json`, after the digests of the results, the samples and the records.

    Args:
        run: The run directory.
        text: Content of the file.

    Returns:
        The file.
    """
    files = [run / SAMPLES, *sorted((run / "records").glob("*.jsonl"))]
    digests = {str(file.relative_to(run)): digest_of(file) for file in files if file.is_file()}
    digests[RESULTS] = xxhash.xxh3_128_hexdigest(text.encode())
    write_whole(run / DIGESTS, json.dumps(digests, indent=2) + "\n")
    write_whole(run / RESULTS, text)
    return run / RESULTS


def _is_whole(records: Sequence[Completion | Verdict | Value], examples: Sequence[str] | None) -> bool:
    """Return whether records cover exactly these examples, each equally often."""
    counts = Counter(record.example for record in records)
    return examples is None or (set(counts) == set(examples) and len(set(counts.values())) <= 1)


class RunDirectory:
    """One experiment's directory, held by one process, or shared by several that each do a part.

    Args:
        path: Made (mode 0700) if absent.
        part: The name of a process that does a part, such as `2-of-8`: its logs are separate, since appending to one
            file from several hosts loses lines.
    """

    def __init__(self, path: Path, *, part: str | None = None) -> None:
        self.path = path
        self.logs = path if part is None else path / SHARDS / part
        self.units = path / "units"
        self.records = path / "records"
        self.tuned = path / "tuned"
        self.merged = path / "merged"
        self.unconfirmed = path / "unconfirmed"

    @contextlib.contextmanager
    def held(self, *, is_shared: bool = False) -> Iterator[None]:
        """Make the directory, and lock it against a second process.

        If a user error ends the block before any work is done, a directory made for it is removed again.

        Args:
            is_shared: Also admit other sharing processes; half-written files may then be theirs, and are kept.

        Raises:
            RunError: the path is something else, or another process is using it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file, not a run directory", remedy="give another --out.")
        if self.path.is_dir() and not self._is_ours() and self._holds_foreign_files():
            raise RunError(
                f"{self.path} has files, but is not a run directory of backmerge",
                remedy="give another --out; nothing was changed.",
            )
        made = [place for place in (self.path, *self.path.absolute().parents) if not place.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.path.chmod(0o700)  # also if it already existed, empty
        except OSError as error:
            raise RunError(
                f"cannot make {self.path} a private directory: {error}", remedy="give another --out."
            ) from error
        try:
            with self._locked_for(is_shared=is_shared):
                yield
        except BackmergeError:
            if made and not is_shared and not self._holds_work():
                shutil.rmtree(self.path, ignore_errors=True)
                with contextlib.suppress(OSError):  # others have put something there meanwhile
                    for parent in made[1:]:
                        parent.rmdir()
            raise

    @contextlib.contextmanager
    def _locked_for(self, *, is_shared: bool) -> Iterator[None]:
        # open for both: network file systems need reading for a shared lock, and writing for an exclusive one
        with (self.path / ".lock").open("a+") as lock:
            kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
            is_ours = _take(lock.fileno(), kind | fcntl.LOCK_NB)
            if is_ours is False:
                raise RunError(
                    f"another process is using {self.path}" + (", and does not share it" if is_shared else ""),
                    remedy="wait for it, or give another --out.",
                )
            if is_ours and not is_shared:
                self._remove_partial()
            elif is_ours is None and not is_shared:
                say(f"{self.path} is on a file system without locks: make sure that no other process uses it.")
            (self.path / ".gitignore").write_text("*\n")
            self.units.mkdir(exist_ok=True)
            yield

    def _is_ours(self) -> bool:
        """Return whether a run began here: an `experiment.yaml` without units may be the user's file.

        A damaged `experiment.yaml` may be deleted, so a run may be without it.
        """
        ours = [(self.path / name).exists() for name in (".lock", "units", SHARDS)]
        return any(ours) if (self.path / SETTINGS).exists() else all(ours[:2])

    def _holds_foreign_files(self) -> bool:
        return any(file.name not in OWN and not file.name.endswith(PARTIAL) for file in self.path.iterdir())

    def _holds_work(self) -> bool:
        """Return whether there is work for a later session to resume, or a log that explains why a worker died."""
        return any(next(self.path.glob(pattern), None) is not None for pattern in WORK)

    def _remove_partial(self) -> None:
        """Remove what a killed process left half-written; we hold the lock, so nobody is writing it now."""
        # listed first: removing files while walking the tree fails
        for leftover in list(self.path.rglob(f"*{PARTIAL}")):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)

    def begin(self, settings: str, inputs: Any, stale: Iterable[Path] = ()) -> None:
        """Write `experiment.yaml`, after moving results of other inputs to `earlier/N`, with their models.

        Nothing is deleted: `earlier/N` is a run directory without units, whose report can be made again. If the process
        is killed in between, each file is in one of the two places, and the next process continues.

        Args:
            settings: The run's settings, as YAML.
            inputs: Everything that the results depend on, as plain data; `results.json` repeats it under `inputs`.
            stale: More folders that belong to other settings, such as tuned models.
        """
        leaving = [place for place in stale if place.exists()]
        if self._results_are_of_others(inputs):
            leaving += [self.path / name for name in FINDINGS]
            leaving += [model for place in (self.merged, self.unconfirmed) for model in models_in(place)]
            leaving += [self.path / RESULTS]
        self.set_aside(leaving, with_settings=True)
        write_whole(self.path / SETTINGS, settings)

    def set_aside(self, places: Iterable[Path], *, with_settings: bool = False) -> None:
        """Move files and folders of this run, if they exist, to `earlier/N`, under the same names.

        Args:
            places: The files and folders.
            with_settings: Whether they were made with the present `experiment.yaml`, which is then copied there. A
                model that a stopped run left may be of other settings; its manifest has its recipe.
        """
        leaving = [place for place in places if place.exists()]
        folder = self._earlier(leaving, resumes=with_settings)
        if not leaving:
            (folder / MOVING).unlink(missing_ok=True)  # a killed process had moved everything
            return
        folder.mkdir(parents=True, exist_ok=True)
        if with_settings:
            (folder / MOVING).touch()
            with contextlib.suppress(FileNotFoundError):  # the user may have deleted a damaged one
                write_whole(folder / SETTINGS, (self.path / SETTINGS).read_bytes())
        for place in leaving:
            kept = folder / place.relative_to(self.path)
            kept.parent.mkdir(parents=True, exist_ok=True)
            place.replace(kept)
            sync_directory(kept.parent)
        for place in (self.merged, self.unconfirmed):
            with contextlib.suppress(OSError):  # absent, or the user keeps something there
                place.rmdir()
        (folder / MOVING).unlink(missing_ok=True)
        what = ", ".join(str(place.relative_to(self.path)) for place in leaving)
        if with_settings:
            say(f"Settings or inputs in {self.path} changed since the last run: its results are kept in {folder}.")
        else:
            say(f"A stopped run left {what} in {self.path}, which is not what this run writes: it is kept in {folder}.")
        self.log(f"moved to {folder.relative_to(self.path)}: {what}")

    def _results_are_of_others(self, inputs: Any) -> bool:
        """Return whether there are results of other inputs."""
        try:
            found = json.loads((self.path / RESULTS).read_bytes())
        except FileNotFoundError:
            return False
        except ValueError:
            return True  # damaged
        return not isinstance(found, dict) or found.get("inputs") != inputs

    def _earlier(self, leaving: Sequence[Path], *, resumes: bool) -> Path:
        """Return the folder to move to: a new one, or the last one if a killed process did not finish with it."""
        numbers = [int(place.name) for place in (self.path / EARLIER).glob("*") if place.name.isdecimal()]
        last = self.path / EARLIER / str(max(numbers, default=0))
        is_taken = any((last / place.relative_to(self.path)).exists() for place in leaving)
        if resumes and (last / MOVING).exists() and not is_taken:
            return last
        return self.path / EARLIER / str(max(numbers, default=0) + 1)

    def unit(
        self,
        stage: str,
        key: str,
        kind: type[Unit],
        make: Callable[[], Iterable[Unit]],
        examples: Sequence[str] | None = None,
    ) -> list[Unit]:
        """Return the records of a unit: read if they exist, otherwise made and stored.

        Args:
            stage: The kind of the records.
            key: A hash of everything that they depend on.
            kind: Type of the records.
            make: Makes them.
            examples: The ids that they must cover, each equally often; not checked if not given.

        Raises:
            DataError: the file was damaged after it was written, or the new records are invalid.
        """
        if self.has_unit(stage, key):
            return self.read_unit(stage, key, kind, examples)
        return self.keep_unit(stage, key, kind, make(), examples)

    def read_unit(self, stage: str, key: str, kind: type[Unit], examples: Sequence[str] | None = None) -> list[Unit]:
        """Return the records of an existing unit.

        Raises:
            DataError: the file was damaged after it was written, or was deleted.
        """
        path = self._unit_path(stage, key)
        try:
            check_seal(path)
            records = list(read_lines(kind, path))
        except FileNotFoundError as error:
            raise DataError(
                f"{path} was deleted while this command was running",
                remedy="run the command again: it makes the file again.",
            ) from error
        if not _is_whole(records, examples):
            raise damaged(path, "it does not contain each example of its unit the same number of times")
        return records

    def rows(self, stage: str, key: str, make: Callable[[], Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Return a unit of plain data instead of records: read if it exists, otherwise made and stored.

        Raises:
            DataError: the file was damaged after it was written.
        """
        path = self._unit_path(stage, key)
        if not path.exists():
            write_whole(path, sealed("".join(json.dumps(row, allow_nan=False) + "\n" for row in make())))
        check_seal(path, is_always_there=True)
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:-1]]

    def keep_unit(
        self, stage: str, key: str, kind: type[Unit], made: Iterable[Unit], examples: Sequence[str] | None = None
    ) -> list[Unit]:
        """Check new records, write them as a unit, and return them.

        Raises:
            DataError: a record is invalid, or they do not match the examples; then nothing is written.
        """
        records: list[Unit] = []
        for record in made:
            try:
                # through its JSON line: this command works with exactly what a later one reads
                records.append(from_dict(kind, json.loads(to_json(record))))
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"the new record for '{record.example}' is not a valid {kind.__name__.lower()}: {error}",
                    remedy="correct your own judge, metric or engine that made it, and run again.",
                ) from error
        if not _is_whole(records, examples):
            raise DataError(
                f"the new {stage} do not contain each example the same number of times",
                remedy="correct your own judge, metric or engine that made them, and run again.",
            )
        write_whole(self._unit_path(stage, key), sealed(lines_of(records)))
        return records

    def _unit_path(self, stage: str, key: str) -> Path:
        return self.units / f"{stage}-{key}.jsonl"

    def has_unit(self, stage: str, key: str) -> bool:
        """Return whether a unit is done."""
        return self._unit_path(stage, key).exists()

    def write_json(self, name: str, values: Any) -> Path:
        """Write plain data as an indented JSON file in the run directory."""
        path = self.path / name
        write_whole(path, indented(values))
        return path

    def log(self, line: str) -> None:
        """Append a line with the time to `log.txt`."""
        self.logs.mkdir(parents=True, exist_ok=True)
        with (self.logs / "log.txt").open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def append(self, name: str, values: Any) -> None:
        """Append plain data as a line of JSON to a log, after cutting off an incomplete last line."""
        self.logs.mkdir(parents=True, exist_ok=True)
        cut_torn_line(self.logs / name)
        with (self.logs / name).open("ab") as stream:
            stream.write(json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
