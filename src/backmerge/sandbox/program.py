"""The sandbox: start a program at its level, watch it, and report how it ended."""

from __future__ import annotations

import functools
import itertools
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Literal, NamedTuple

from backmerge.errors import RunError
from backmerge.sandbox import inside, remote_call
from backmerge.sandbox.calls import call_filter
from backmerge.sandbox.interpreter import (
    ENVIRONMENT,
    OPTIONS,
    Interpreter,
    bubblewrap_command,
    bubblewrap_version,
    library_path,
    own_interpreter,
)
from backmerge.sandbox.watching import Ending, watch

Level = Literal["bubblewrap", "process"]
Status = Literal["ok", "failed", "timed out", "killed"]

# Dynamic users of systemd, which own no files. Each run takes the next one, so that none counts another's processes.
_FIRST_UID, _NUM_UIDS = 61184, 4336
_REMOTE = "_backmerge_remote"  # a name that no program uses
_uids = itertools.count(secrets.randbelow(_NUM_UIDS))


class Limits(NamedTuple):
    """The resources that a program may use.

    Attributes:
        wall_seconds: From start to end, including the sandbox's own time.
        cpu_seconds: For each process.
        memory_bytes: Address space of each process.
        output_bytes: Standard output and error that are kept; the rest is read and discarded.
        file_bytes: Of each file; under bubblewrap also of all files together.
        num_processes: Processes and threads at a time, including the program itself. The kernel counts by user: under
            bubblewrap, and if we are root, the program has its own user; otherwise, and on Linux before 5.14, other
            processes that the user starts meanwhile count too.
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30
    output_bytes: int = 1 << 16
    file_bytes: int = 1 << 24
    num_processes: int = 8


class Outcome(NamedTuple):
    """How a program ended.

    Attributes:
        status: `ok`: its last line was reached; `failed`: it ended otherwise, with an exception or by exiting with any
            code; `timed out`: the wall clock ran out; `killed`: by a signal, such as that of a limit.
        exit_code: Its exit code; minus the signal's number if killed; `None` if it timed out.
        output: Standard output and error, cut to the limit. Hostile text: it may contain control characters.
        seconds: From start to end.
    """

    status: Status
    exit_code: int | None
    output: str
    seconds: float


@dataclass(frozen=True)
class Sandbox:
    """Runs programs; made by `make_sandbox`, which finds out what this machine supports.

    Attributes:
        level: How the program is isolated; the package's docstring lists what each level stops.
        identity: The level, the versions and what is missing, in words: recorded with results.
        interpreter: Runs the programs.
        has_filter: Whether system calls are filtered; only on machines with a known filter.
    """

    level: Level
    identity: str
    interpreter: Interpreter
    has_filter: bool = True

    def run(self, program: str, limits: Limits = Limits()) -> Outcome:  # noqa: B008  # immutable
        """Run a program, given as Python source, to its end or its limits.

        It can import the standard library, but no installed packages. May be called from several threads. Assertions
        that a hostile program makes about itself prove nothing: see `check`.

        Raises:
            RunError: the sandbox did not start; this is not the program's fault.
        """
        started = time.monotonic()
        token, ending = self._launched(program, limits, (), None)
        return _outcome(ending, token, time.monotonic() - started)

    def check(self, candidate: str, name: str, tests: str, limits: Limits = Limits()) -> Outcome:  # noqa: B008
        """Run tests of a function that a candidate defines, each in a separate sandbox and interpreter.

        In the tests the function's name is a proxy: a call goes to the candidate's process over a pipe, and the result
        is built from plain values. So the verdict is made in a process that never runs the candidate's code.

        Args:
            candidate: Python source that defines the function.
            name: The function's name.
            tests: Python source that calls it, and raises an error if something is wrong; trusted.
            limits: For each of the two processes.

        Returns:
            How the tests ended.

        Raises:
            RunError: a sandbox did not start; this is not the candidate's fault.
        """
        started = time.monotonic()
        with ExitStack() as stack:
            (asked, asking), (answered, answering), (stop, stopping) = (_pipe(stack) for _ in range(3))
            served = f"{candidate}\n{_remote(f'serve({name}, {asked.fileno()}, {answering.fileno()})')}"
            calling = f"{name} = {_REMOTE}.caller({asking.fileno()}, {answered.fileno()})"
            with ThreadPoolExecutor(1) as pool:
                serving = pool.submit(self._launched, served, limits, (asked, answering), stop)
                try:
                    token, ending = self._launched(f"{_remote()}\n{calling}\n{tests}", limits, (asking, answered), None)
                finally:
                    stopping.close()  # the candidate is killed
                other = serving.result()[1]
            if other.has_ended and not other.verdict.startswith(inside.MARK):
                raise _not_started(other)
            return _outcome(ending, token, time.monotonic() - started)

    def _launched(
        self, program: str, limits: Limits, passed: Sequence[IO[bytes]], stop: IO[bytes] | None
    ) -> tuple[bytes, Ending]:
        """Run a program to its end; return the token that its last line reports, and what the process left behind.

        Args:
            program: Python source.
            limits: The resources that it may use.
            passed: Ends of pipes that it also gets; closed here once it has them.
            stop: The program is killed as soon as the other end of this pipe is closed.
        """
        with ExitStack() as stack:
            source = stack.enter_context(tempfile.TemporaryFile())
            source.write(program.encode("utf-8", "surrogatepass"))
            source.seek(0)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="backmerge-", ignore_cleanup_errors=True))
            token = secrets.token_hex(inside.TOKEN_BYTES // 2).encode()
            token_fd = _pipe_that_holds(token, stack)
            code = call_filter(others_in_reach=self.level == "process") if self.has_filter else None
            filter_fd = -1 if code is None else _pipe_that_holds(code, stack)
            verdict_reader, verdict_writer = _pipe(stack)
            uid = _FIRST_UID + next(_uids) % _NUM_UIDS if os.geteuid() == 0 else 0
            if self.level == "bubblewrap":
                command = bubblewrap_command(self.interpreter, tmp_bytes=limits.file_bytes, filter_fd=filter_fd)
                environment = {}
            else:
                command = [str(self.interpreter.executable), *OPTIONS]
                libraries = library_path(self.interpreter, is_bound=False)
                environment = {**ENVIRONMENT, "LD_LIBRARY_PATH": libraries, "HOME": folder, "TMPDIR": folder}
                if uid:
                    os.chown(folder, uid, uid)
            settings = {
                "token_fd": token_fd,
                "verdict_fd": verdict_writer.fileno(),
                "filter_fd": filter_fd if self.level == "process" else -1,
                "uid": uid,
                "new_network": int(self.level == "process" and bool(uid)),
                "cpu_seconds": limits.cpu_seconds,
                "file_bytes": limits.file_bytes,
                "memory_bytes": limits.memory_bytes,
                "num_processes": limits.num_processes + (0 if uid else self._num_others()),
                "num_passed": len(passed),
                **{f"passed_{place}": pipe.fileno() for place, pipe in enumerate(passed)},
            }
            command += ["-c", _text_of(inside), *(f"{name}={value}" for name, value in settings.items())]
            descriptors = [token_fd, verdict_writer.fileno(), *(pipe.fileno() for pipe in passed)]
            ending = watch(
                command,
                environment=environment,
                folder=folder,
                source=source,
                passed=(*descriptors, *((filter_fd,) if filter_fd >= 0 else ())),
                verdict_reader=verdict_reader,
                handed=(verdict_writer, *passed),
                stop=stop,
                deadline=time.monotonic() + limits.wall_seconds,
                output_bytes=limits.output_bytes,
            )
            return token, ending

    def _num_others(self) -> int:
        """Return how many other processes and threads the kernel counts, if the program runs as our user."""
        if self.level == "bubblewrap":
            return 1  # bubblewrap itself; its user namespace counts separately
        num_others = 0
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if entry.stat().st_uid == os.geteuid():
                    num_others += len(list((entry / "task").iterdir()))
            except OSError:  # it has ended
                continue
        return num_others


def _pipe_that_holds(content: bytes, stack: ExitStack) -> int:
    """Return the reading end of a pipe that already contains all its content."""
    reading, writing = os.pipe()
    stack.callback(os.close, reading)
    try:
        os.write(writing, content)
    finally:
        os.close(writing)
    return reading


def _pipe(stack: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    """Return a pipe's reading and writing end."""
    reading, writing = os.pipe()
    return (
        stack.enter_context(os.fdopen(reading, "rb", buffering=0)),
        stack.enter_context(os.fdopen(writing, "wb", buffering=0)),
    )


def _text_of(module: ModuleType) -> str:
    assert module.__file__ is not None
    return Path(module.__file__).read_text(encoding="utf-8")


def _remote(call: str | None = None) -> str:
    """Return statements that make `remote_call` a name in a program, and call one of its functions."""
    made = (
        f"import types as {_REMOTE}\n{_REMOTE} = {_REMOTE}.ModuleType({_REMOTE!r})\n"
        f"exec({_text_of(remote_call)!r}, {_REMOTE}.__dict__)"
    )
    return made if call is None else f"{made}\n{_REMOTE}.{call}"


def _not_started(ending: Ending) -> RunError:
    lines = ending.output.decode("utf-8", "replace").strip().splitlines()
    reason = lines[-1] if lines else f"exit code {ending.exit_code}" if ending.has_ended else "the time ran out"
    return RunError(
        f"the sandbox did not start: {reason}",
        remedy="`backmerge doctor` shows whether bubblewrap works here; a busy machine may need fewer workers.",
    )


def _outcome(ending: Ending, token: bytes, seconds: float) -> Outcome:
    output = ending.output.decode("utf-8", "replace")
    if not ending.verdict.startswith(inside.MARK):
        raise _not_started(ending)
    if not ending.has_ended:
        return Outcome("timed out", None, output, seconds)
    # bubblewrap, like a shell, reports a signal as 128 plus its number
    code = 128 - ending.exit_code if ending.exit_code > 128 else ending.exit_code
    if code < 0:
        return Outcome("killed", code, output, seconds)
    passed = code == 0 and secrets.compare_digest(ending.verdict, inside.MARK + token)
    return Outcome("ok" if passed else "failed", code, output, seconds)


INSTALL = "install bubblewrap (on Debian and Ubuntu: apt-get install bubblewrap)"

# common imports of solutions; they fail if a library cannot be loaded, and the assertion if the user id stays root
_TRIAL = "import collections, decimal, hashlib, json, math, os, random\nassert os.geteuid() != 0"


@functools.cache
def available_level() -> tuple[Level, str]:
    """Return the level that this machine allows, with either bubblewrap's version or why it does not work."""
    if not sys.platform.startswith("linux"):
        return "process", "bubblewrap is for Linux only"
    version = bubblewrap_version()
    if version is None:
        return "process", "bubblewrap is absent"
    reason = _why_not(_sandbox("bubblewrap", version))
    return ("bubblewrap", version) if reason is None else ("process", f"bubblewrap {version} fails here: {reason}")


def make_sandbox(*, allow_code_execution: bool = False) -> Sandbox:
    """Return the best sandbox that this machine allows.

    Args:
        allow_code_execution: Whether the user allows the weaker level; needed only if bubblewrap does not work.

    Raises:
        RunError: bubblewrap does not work and the weaker level is not allowed, or does not work either.
    """
    level, about = available_level()
    sandbox = _sandbox(level, about)
    if level == "bubblewrap":
        return sandbox
    if not allow_code_execution:
        raise RunError(
            f"this would run model-written code, and {about}, so it could read and change your files",
            remedy=f"{INSTALL}, or pass --allow-code-execution to run it in a process with limits only.",
        )
    reason = _why_not(sandbox)
    if reason is not None:
        raise RunError(
            f"model-written code cannot be run here: {about}, and a process with limits does not work: {reason}",
            remedy=f"{INSTALL}, or run as a user that is not root, with a Python that this user can read.",
        )
    return sandbox


def _sandbox(level: Level, about: str) -> Sandbox:
    interpreter = own_interpreter()
    is_filtered = call_filter(others_in_reach=level == "process") is not None
    filtered = "system calls filtered" if is_filtered else "system calls not filtered"
    python = f"Python {interpreter.version}"
    if level == "bubblewrap":
        return Sandbox(level, f"bubblewrap {about}, {filtered}, {python}", interpreter)
    return Sandbox(level, f"process with limits ({about}), {filtered}, {python}", interpreter)


def _why_not(sandbox: Sandbox) -> str | None:
    """Return what a trial shows to be wrong; `None` if nothing is."""
    try:
        outcome = sandbox.run(_TRIAL)
    except RunError as error:
        return error.message
    return None if outcome.status == "ok" else f"a trial {outcome.status}: {outcome.output.strip()[-300:]}"
