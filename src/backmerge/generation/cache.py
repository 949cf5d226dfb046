"""Completions of earlier runs: nothing is generated twice.

    CACHE/completions/SCOPE.jsonl     one line for each answered prompt: what was asked (a hash), and its completions

A scope is everything that answers depend on beside the prompt: weights, realisation and dtype (the variant's identity),
tokenizer and chat template, engine and its version, and the sampling. Lines are appended whole under a lock, so that
several runs share a cache; a line that a killed process tore is passed over.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
