"""Store answers so that nothing is generated twice: across runs, and for a server within a run.

    CACHE/completions/SCOPE.jsonl     one line for each answered prompt: a hash of the prompt, its completions, a digest
    RUN/answered.jsonl                one line for each answer of a server, stored as it arrives

A scope is everything that answers depend on apart from the prompt: weights, realisation, dtype (the variant's
identity), tokenizer and chat template, engine and its version, and the sampling. Several runs share the cache, and
append lines under a lock; a line that was torn by a kill or damaged is skipped. A server's log has one writer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from backmerge.errors import DataError, GenerationError, remedy_for
from backmerge.progress import say
from backmerge.records import Completion, Example, from_dict
from backmerge.runs import key_of

VARIABLE = "BACKMERGE_CACHE"
ASKING = ("*tokenizer*", "*.model", "chat_template*", "special_tokens_map.json", "vocab*", "merges.txt")


def cache_directory() -> Path:
    """Return `$BACKMERGE_CACHE`, or `backmerge` in the user's cache."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "backmerge"


def tokenizer_identity(directory: Path) -> str:
    """Return a hash of everything that decides how a conversation becomes tokens, and when an answer ends."""
    files = {file for pattern in (*ASKING, "generation_config.json") for file in directory.glob(pattern)}
    return key_of({file.name: key_of(file.read_bytes().hex()) for file in sorted(files) if file.is_file()})


class CompletionCache:
    """Answers that are stored across runs.

    Args:
        directory: The cache's folder; made, private, when the first answer is stored.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "completions"
        self._is_told = False

    def find(self, scope: str, examples: Sequence[Example]) -> dict[str, list[Completion]]:
        """Return completions by example id for those that were answered before; empty if the cache is unreadable."""
        try:
            known = dict(self._lines(scope))
        except OSError as error:
            self._tell(error)
            return {}
        found: dict[str, list[Completion]] = {}
        for example in examples:
            kept = known.get(asked(example))
            if kept is None:
                continue
            with contextlib.suppress(ValueError):  # a damaged line of an earlier version, which has no digest
                found[example.id] = [from_dict(Completion, {**values, "example": example.id}) for values in kept]
        return found

    def keep(self, scope: str, examples: Sequence[Example], completions: Sequence[Completion]) -> None:
        """Store the answers to these examples."""
        by_example: dict[str, list[Mapping[str, Any]]] = {example.id: [] for example in examples}
        for completion in completions:
            values = dataclasses.asdict(completion)
            by_example[values.pop("example")].append(values)
        lines = [_line(asked(example), by_example[example.id]) for example in examples]
        try:
            self._append(scope, "".join(lines).encode())
        except OSError as error:  # the answers are in the run; only later runs lack them
            self._tell(error)

    def _append(self, scope: str, lines: bytes) -> None:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._directory.chmod(0o700)  # also one that existed before
        with self._file(scope).open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            torn = stream.tell() > 0 and not self._ends_a_line(scope)
            stream.write((b"\n" if torn else b"") + lines)
            stream.flush()
            os.fsync(stream.fileno())

    def _tell(self, error: OSError) -> None:
        if not self._is_told:
            say(f"Answers cannot be stored for later runs: {self._directory}: {error.strerror}.")
            self._is_told = True

    def _file(self, scope: str) -> Path:
        return self._directory / f"{scope}.jsonl"

    def _ends_a_line(self, scope: str) -> bool:
        with self._file(scope).open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) == b"\n"

    def _lines(self, scope: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        file = self._file(scope)
        if not file.is_file():
            return
        with file.open("rb") as stream:
            for line in stream:
                try:
                    values = json.loads(line)
                    prompt, kept = values["asked"], values["completions"]
                    is_whole = values.get("digest") in (None, key_of(prompt, kept))
                except (ValueError, KeyError, TypeError, AttributeError):  # torn by a kill: ignored
                    continue
                if is_whole:
                    yield prompt, kept


def _line(prompt: str, completions: Sequence[Mapping[str, Any]]) -> str:
    values = {"asked": prompt, "completions": completions, "digest": key_of(prompt, completions)}
    return json.dumps(values, ensure_ascii=False) + "\n"


def asked(example: Example) -> str:
    """Return a hash of what a model sees of an example before its template is applied."""
    return key_of([[m.role, m.content] for m in example.messages], example.prefill, example.is_raw)


SYNC_SECONDS = 5.0


class AnswerLog:
    """An append-only JSON Lines file of answers, by key; one writer at a time.

    Every answer is written as a whole line at once, so that none is lost if this process dies. The file is synced to
    disk every few seconds and at the end, so that a power cut loses only seconds. A torn last line is cut off when the
    file is opened.

    Args:
        path: The file; made if missing, readable by its owner only.

    Raises:
        GenerationError: another process is writing to it, or it cannot be written.
        DataError: a line other than the last is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unwritable(path, error) from error
        self._closer = weakref.finalize(self, os.close, self._descriptor)
        try:
            self._answers = self._locked_content()
        except BaseException:  # boundary: the lock is released with the descriptor, whatever the reading raised
            self._closer()
            raise
        self._lock = threading.Lock()
        self._synced = time.monotonic()

    def _locked_content(self) -> dict[str, Any]:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise GenerationError(
                f"{self.path} is being written by another run",
                remedy="wait for that run, or give this one another file with the option 'log'.",
            ) from error
        content = self.path.read_bytes()
        answers: dict[str, Any] = {}
        good = 0  # bytes up to the end of the last whole line
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            is_last = good + len(line) == len(content)
            try:
                entry = json.loads(line)
                key, answer = entry["key"], entry["answer"]
                if entry.get("digest") not in (None, key_of(key, answer)):
                    raise ValueError("it was changed after it was written")
            except (ValueError, TypeError, KeyError) as error:
                if is_last:
                    break
                raise DataError(
                    f"{self.path}, line {number}: not a stored answer",
                    remedy="remove the line; its prompt is then sent again.",
                ) from error
            if not line.endswith(b"\n"):
                break
            answers[key] = answer
            good += len(line)
        if good < len(content):
            os.ftruncate(self._descriptor, good)
        return answers

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Any:
        """Return the answer under a key; `None` if there is none."""
        return self._answers.get(key)

    def add(self, key: str, answer: Any) -> None:
        """Store an answer, which is plain data; ignored after `close`."""
        values = {"key": key, "answer": answer, "digest": key_of(key, answer)}
        line = json.dumps(values, ensure_ascii=False, separators=(",", ":")) + "\n"
        with self._lock:
            if not self._closer.alive:
                return
            try:
                rest = memoryview(line.encode())
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
                if time.monotonic() - self._synced > SYNC_SECONDS:
                    os.fsync(self._descriptor)
                    self._synced = time.monotonic()
            except OSError as error:
                self._closer()  # a torn line must stay the last line
                raise _unwritable(self.path, error) from error
            self._answers[key] = answer

    def close(self) -> None:
        """Sync the file and release it for others; also done, without the sync, when the log is deleted."""
        with self._lock:
            if self._closer.alive:
                os.fsync(self._descriptor)
                self._closer()


def _unwritable(path: Path, error: OSError) -> GenerationError:
    elsewhere = "give another file with the option 'log'"
    return GenerationError(
        f"answers cannot be stored in {path}: {error.strerror}",
        remedy=f"{remedy_for(error, elsewhere) or f'{elsewhere}.'} Prompts with complete answers are not sent again.",
    )
