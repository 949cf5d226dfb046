"""One deadline for a whole HTTP request: connecting, sending, headers of any length, and the body.

The library's own time-outs apply to single reads. A server that sends a byte before each of them expires, or
informational replies without end, would keep a request open forever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpcore2
import httpx2


class _Current(threading.local):  # a request is sent and read by one thread
    end: float | None = None


_current = _Current()


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Stop all network operations of this thread after `seconds`, with the library's own time-out errors."""
    _current.end = time.monotonic() + seconds
    try:
        yield
    finally:
        _current.end = None


def client_with_deadlines(**options: Any) -> httpx2.Client:
    """Return a client whose requests respect `deadline`.

    Args:
        options: Options of `httpx2.Client`.
    """
    client: Any = httpx2.Client(**options)
    # httpx2 takes no network backend, but httpcore2 below it does; the mounts are the environment's proxies
    for transport in (client._transport, *client._mounts.values()):
        if transport is not None:
            transport._pool._network_backend = _Backend(transport._pool._network_backend)
    found: httpx2.Client = client
    return found


def _left(timeout: float | None, error: type[Exception]) -> float | None:
    end = _current.end
    if end is None:
        return timeout
    left = end - time.monotonic()
    if left <= 0:
        raise error("the whole request takes too long")
    return left if timeout is None else min(timeout, left)


class _Backend(httpcore2.NetworkBackend):
    def __init__(self, inner: httpcore2.NetworkBackend) -> None:
        self._inner = inner

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        left = _left(timeout, httpcore2.ConnectTimeout)
        return _Stream(self._inner.connect_tcp(host, port, left, local_address, socket_options))

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)


class _Stream(httpcore2.NetworkStream):
    def __init__(self, inner: httpcore2.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _left(timeout, httpcore2.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, _left(timeout, httpcore2.WriteTimeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        left = _left(timeout, httpcore2.ConnectTimeout)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, left))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
