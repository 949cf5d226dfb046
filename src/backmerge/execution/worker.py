"""Run in a worker process of the pool: read units from the pipe, and send back their results.

Messages are JSON, so that nothing is unpickled. The worker leads its own session: the terminal's Ctrl-C reaches only
the driver, and everything that the worker starts is killed with it. Its standard input is a pipe on which nothing is
ever sent: when it closes, the driver has ended, for whatever reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from backmerge.execution.work import Counter, Function, as_plain, function_of

TELL_EVERY = 0.2  # seconds


def main(descriptor: int, function: str) -> None:
    """Serve the driver until it closes the pipe.

    Args:
        descriptor: This end of the pipe.
        function: `module:function`.
    """
    os.set_inheritable(descriptor, False)  # else a program that a unit starts would keep the pipe open after our death
    _die_with_driver()
    # as on Ctrl-C: `finally` blocks run, so that a unit leaves no half-written files
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    connection = Connection(descriptor)
    do = function_of(function)
    send(connection, {"ready": True})
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            send(connection, _answer(connection, do, receive(connection)))


def send(connection: Any, message: dict[str, Any]) -> None:
    """Send one message through the pipe."""
    connection.send_bytes(json.dumps(message).encode())


def receive(connection: Any) -> dict[str, Any]:
    """Receive one message from the pipe.

    Raises:
        EOFError: the other end is closed.
    """
    message: dict[str, Any] = json.loads(connection.recv_bytes())
    return message


def _answer(connection: Any, do: Function, spec: dict[str, Any]) -> dict[str, Any]:
    counter = Counter(lambda steps, note: send(connection, {"steps": steps, "note": note}), TELL_EVERY)
    try:
        result = do(spec, counter)
        json.dumps(result)  # a result that cannot be sent is a failure of the unit
    except Exception as error:  # noqa: BLE001  # boundary: the driver raises it again
        return {"failed": as_plain(error)}
    return {"done": result, "steps": counter.steps}


def _die_with_driver() -> None:
    """End this session when standard input closes; units get an empty standard input."""
    lifeline = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def watch() -> None:
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
