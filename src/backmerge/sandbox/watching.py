"""Start a process, read its output within limits, and leave none of its processes running."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import IO, NamedTuple

from backmerge.errors import RunError

_LOOK_EVERY = 0.05  # seconds; only for a process that ends without closing the pipes
_GRACE = 2.0  # seconds for the kernel to end killed processes
_VERDICT_BYTES = 256


class Ending(NamedTuple):
    """What a process left behind.

    Attributes:
        has_ended: Whether it ended before the deadline.
        exit_code: Negative for a signal.
        output: Its output, cut to the limit.
        verdict: What it wrote to the verdict's pipe, cut to a few bytes more than a valid one has.
    """

    has_ended: bool
    exit_code: int
    output: bytes
    verdict: bytes


def watch(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    folder: str,
    source: IO[bytes],
    passed: Sequence[int],
    verdict_reader: IO[bytes],
    handed: Sequence[IO[bytes]],
    stop: IO[bytes] | None,
    deadline: float,
    output_bytes: int,
) -> Ending:
    """Run a command in its own session until it ends or the deadline comes, then kill the session.

    Args:
        command: Program and arguments.
        environment: The whole environment.
        folder: The working folder.
        source: Standard input.
        passed: Descriptors that the process gets under the same numbers.
        verdict_reader: The reading end of the verdict's pipe.
        handed: Those of `passed` that only the process may have, including the verdict's other end; closed here once
            the process has them.
        stop: The process is killed as soon as the other end of this pipe is closed.
        deadline: As `time.monotonic()`.
        output_bytes: How much output to keep.

    Raises:
        RunError: the command cannot be started.
    """
    output_read, output_write = os.pipe()
    with os.fdopen(output_read, "rb", buffering=0):
        try:
            process = subprocess.Popen(
                command,
                stdin=source,
                stdout=output_write,
                stderr=output_write,
                env=dict(environment),
                cwd=folder,
                pass_fds=passed,
                start_new_session=True,
            )
        except OSError as error:
            raise RunError(f"the sandbox did not start: {error}", remedy="see `backmerge doctor`.") from error
        finally:
            os.close(output_write)
            for end in handed:
                end.close()
        verdict_read = verdict_reader.fileno()
        kept = {output_read: bytearray(), verdict_read: bytearray()}
        bounds = {output_read: output_bytes, verdict_read: _VERDICT_BYTES}
        has_ended = False
        try:
            has_ended = _read_until_end(process, kept, bounds, deadline, stop)
        finally:
            # the leader is not reaped yet, so its number cannot belong to another process
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        _drain(kept, bounds, time.monotonic() + _GRACE)
        return Ending(has_ended, process.returncode, bytes(kept[output_read]), bytes(kept[verdict_read]))


def _read_until_end(
    process: subprocess.Popen[bytes],
    kept: Mapping[int, bytearray],
    bounds: Mapping[int, int],
    deadline: float,
    stop: IO[bytes] | None,
) -> bool:
    """Read until the process has ended; return whether it did so before the deadline and before it was stopped."""
    with selectors.DefaultSelector() as selector:
        for descriptor in kept:
            selector.register(descriptor, selectors.EVENT_READ)
        if stop is not None:
            selector.register(stop.fileno(), selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            for key, _ in selector.select(min(left, _LOOK_EVERY)) if selector.get_map() else ():
                if stop is not None and key.fd == stop.fileno():
                    return False
                if not _take(key.fd, kept, bounds):
                    selector.unregister(key.fd)
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return True
            if not selector.get_map():  # it closed its pipes, but may run on for long
                time.sleep(min(max(left, 0.0), 0.002))


def _drain(kept: Mapping[int, bytearray], bounds: Mapping[int, int], deadline: float) -> None:
    """Read what is left in the pipes; an escaped process may keep them open, hence the deadline."""
    with selectors.DefaultSelector() as selector:
        for descriptor in kept:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if not _take(key.fd, kept, bounds):
                    selector.unregister(key.fd)


def _take(descriptor: int, kept: Mapping[int, bytearray], bounds: Mapping[int, int]) -> bool:
    """Read once, and keep what fits the limit; return whether there may be more."""
    chunk = os.read(descriptor, 1 << 16)
    room = bounds[descriptor] - len(kept[descriptor])
    kept[descriptor].extend(chunk[: max(room, 0)])
    return bool(chunk)
