"""What a server has answered, kept line by line, so that a restart asks only for the rest."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from backmerge.errors import DataError, GenerationError

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
        """Wait for the disk, and let others write; done by itself, without the wait, when the log is let go."""
        with self._lock:
            if self._closer.alive:
                os.fsync(self._descriptor)
                self._closer()


def _unwritable(path: Path, error: OSError) -> GenerationError:
    return GenerationError(
        f"{path}, where answers are kept, cannot be written: {error.strerror}",
        remedy="make room, or give another file as the option 'log'; what it holds whole is not asked again.",
    )
