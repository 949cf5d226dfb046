"""A server that drips, hints for ever, or sends what cannot be read: one error within the time given."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from backmerge.errors import GenerationError
from backmerge.generation.http_client import ServerClient

SECONDS = 0.5
Reply = Callable[[socket.socket], None]


@pytest.fixture
def serve() -> Iterator[Callable[[Reply], str]]:
    """`serve(reply)`: the address of a server whose every connection is answered by a function."""
    stopping = threading.Event()
    servers = []

    def answer(connection: socket.socket, reply: Reply) -> None:
        with contextlib.suppress(OSError), connection:
            connection.recv(65536)
            reply(connection)

    def start(reply: Reply) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        server.settimeout(0.1)
        servers.append(server)

        def accept() -> None:
            while not stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    threading.Thread(target=answer, args=(server.accept()[0], reply), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        threads.append(thread)
        return f"http://127.0.0.1:{server.getsockname()[1]}/v1"

    threads: list[threading.Thread] = []
    yield start
    stopping.set()
    for thread in threads:
        thread.join()
    for server in servers:
        server.close()


def headers_byte_by_byte(connection: socket.socket) -> None:
    """A header that never ends."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-A: ")
    for _ in range(100):
        connection.sendall(b"x")
        time.sleep(0.05)


def hints_for_ever(connection: socket.socket) -> None:
    """Informational replies without a final one."""
    for _ in range(100):
        connection.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n")
        time.sleep(0.05)


def body_byte_by_byte(connection: socket.socket) -> None:
    """A body that never ends."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    for _ in range(100):
        connection.sendall(b"x")
        time.sleep(0.05)


@pytest.mark.parametrize("reply", [headers_byte_by_byte, hints_for_ever, body_byte_by_byte])
def test_one_deadline_holds_for_the_whole_request(serve: Callable[[Reply], str], reply: Reply) -> None:
    """No read takes long enough to time out, and yet the request does."""
    client = ServerClient(serve(reply), None, timeout_seconds=SECONDS, retries=0, concurrency=1)
    started = time.monotonic()
    with pytest.raises(GenerationError, match="does not answer within"):
        client.ask("/models", None, lambda body: body)
    assert time.monotonic() - started < 6 * SECONDS
    client.close()


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello", "not encoded as its headers"),
        (
            b"HTTP/1.1 429 Busy\r\nRetry-After: Fri, 31 Dec 9999 23:59:59 -2359\r\nContent-Length: 0\r\n\r\n",
            "HTTP 429",
        ),
        (b"HTTP/1.1 429 Busy\r\nRetry-After: Mon, 99 Foo 0000\r\nContent-Length: 0\r\n\r\n", "HTTP 429"),
        (b"no HTTP at all\r\n\r\n", "cannot be reached"),
    ],
)
def test_what_cannot_be_read_is_one_error(serve: Callable[[Reply], str], reply: bytes, words: str) -> None:
    """Whatever the library raises."""
    client = ServerClient(
        serve(lambda connection: connection.sendall(reply)), None, timeout_seconds=5, retries=1, concurrency=1
    )
    with pytest.raises(GenerationError, match=words):
        client.ask("/models", None, lambda body: body)
    client.close()
