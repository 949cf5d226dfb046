"""Answers that are kept, so that nothing is generated twice: over runs, and of a server within a run.

    CACHE/completions/SCOPE.jsonl     one line for each answered prompt: what was asked (a hash), and its completions
    RUN/answered.jsonl                one line for each answer of a server, kept as it arrives, one by one

A scope is everything that answers depend on besides the prompt: weights, realisation, dtype (the variant's identity),
tokenizer and chat template, engine and its version, and the sampling. Several runs share the cache, whose lines are
appended under a lock; a line that a killed process tore is passed over. A server's log has one writer.
"""

from __future__ import annotations

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

from backmerge.errors import DataError, GenerationError
from backmerge.progress import say
from backmerge.records import Completion, Example, from_dict
from backmerge.runs import key_of

VARIABLE = "BACKMERGE_CACHE"
ASKING = ("*tokenizer*", "*.model", "chat_template*", "special_tokens_map.json", "vocab*", "merges.txt")


def cache_directory() -> Path:
    """`$BACKMERGE_CACHE`, or `backmerge` in the user's cache."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "backmerge"


def tokenizer_identity(directory: Path) -> str:
    """A hash of all that decides how a conversation becomes tokens, and when an answer ends."""
    files = {file for pattern in (*ASKING, "generation_config.json") for file in directory.glob(pattern)}
    return key_of({file.name: key_of(file.read_bytes().hex()) for file in sorted(files) if file.is_file()})


class CompletionCache:
    """Answers that are kept over runs.

    Args:
        directory: Made, private, when something is kept.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "completions"
        self._is_told = False

    def find(self, scope: str, examples: Sequence[Example]) -> dict[str, list[Completion]]:
        """Example id to its completions, for those that were answered before; nothing where it cannot be read."""
        try:
            known = dict(self._lines(scope))
        except OSError as error:
            self._tell(error)
            return {}
        found: dict[str, list[Completion]] = {}
        for example in examples:
            kept = known.get(asked(example))
            if kept is not None:
                found[example.id] = [from_dict(Completion, {**values, "example": example.id}) for values in kept]
        return found

    def keep(self, scope: str, examples: Sequence[Example], completions: Sequence[Completion]) -> None:
        """Add the answers to these examples."""
        by_example: dict[str, list[Mapping[str, Any]]] = {example.id: [] for example in examples}
        for completion in completions:
            values = dataclasses.asdict(completion)
            by_example[values.pop("example")].append(values)
        lines = [
            json.dumps({"asked": asked(e), "completions": by_example[e.id]}, ensure_ascii=False) + "\n"
            for e in examples
        ]
        try:
            self._append(scope, "".join(lines).encode())
        except OSError as error:  # the answers are in the run; only later runs miss them
            self._tell(error)

    def _append(self, scope: str, lines: bytes) -> None:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._directory.chmod(0o700)  # also one that was there before
        with self._file(scope).open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            torn = stream.tell() > 0 and not self._ends_a_line(scope)
            stream.write((b"\n" if torn else b"") + lines)
            stream.flush()
            os.fsync(stream.fileno())

    def _tell(self, error: OSError) -> None:
        if not self._is_told:
            say(f"Answers are not kept for later runs: {self._directory}: {error.strerror}.")
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
                    yield values["asked"], values["completions"]
                except (ValueError, KeyError, TypeError):  # torn by a kill: as if it were not there
                    continue


def asked(example: Example) -> str:
    """A hash of what a model sees of an example before its template is applied."""
    return key_of([[m.role, m.content] for m in example.messages], example.prefill, example.is_raw)


SYNC_SECONDS = 5.0


class AnswerLog:
    """An append-only JSON Lines file of answers, by key; one writer at a time.

    Every answer is handed to the system as a whole line at once, so that the death of this process loses none; the
    disk is waited for every few seconds and at the end, so that a power cut loses seconds. A last line that was torn is
    cut off when the file is opened.

    Args:
        path: The file; made if it is not there, readable by its owner only.

    Raises:
        GenerationError: another process writes to it, or it cannot be written.
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
        except BaseException:  # boundary: the lock goes with the descriptor, whatever befell the reading
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
                remedy="wait for that run, or give this one another file as the option 'log'.",
            ) from error
        content = self.path.read_bytes()
        answers: dict[str, Any] = {}
        good = 0  # bytes up to the end of the last whole line
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            is_last = good + len(line) == len(content)
            try:
                entry = json.loads(line)
                key, answer = entry["key"], entry["answer"]
            except (ValueError, TypeError, KeyError) as error:
                if is_last:
                    break
                raise DataError(
                    f"{self.path}, line {number}: not an answer that was kept",
                    remedy="take the line out; what it held is asked again.",
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
        """The answer under a key; `None` if there is none."""
        return self._answers.get(key)

    def add(self, key: str, answer: Any) -> None:
        """Keep an answer, which is plain data; after `close` it is let go."""
        line = json.dumps({"key": key, "answer": answer}, ensure_ascii=False, separators=(",", ":")) + "\n"
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
                self._closer()  # a torn line must stay the last
                raise _unwritable(self.path, error) from error
            self._answers[key] = answer

    def close(self) -> None:
        """Wait for the disk, and let others write; also done, without the wait, when the log is garbage-collected."""
        with self._lock:
            if self._closer.alive:
                os.fsync(self._descriptor)
                self._closer()


def _unwritable(path: Path, error: OSError) -> GenerationError:
    return GenerationError(
        f"{path}, where answers are kept, cannot be written: {error.strerror}",
        remedy="make room, or give another file as the option 'log'; what it holds whole is not asked again.",
    )
