"""A stand-in for a server that speaks OpenAI's protocol, with faults by script.

It answers as a real one does, in form and headers; what its "model" says is a function of the prompt, so that tests
know the right answers. `transformers serve` is asked for real in test_real_server.py.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Fault:
    """What happens to one request instead of an answer.

    Attributes:
        status: Of HTTP; with 200, `body` is the reply.
        body: Text as it is, or plain data as JSON.
        headers: More of them.
        delay: Seconds before anything is said.
        resets: The connection is broken off, without a word.
        cuts: The connection is closed in the middle of the body.
        drips: Seconds between the bytes of the body.
    """

    status: int = 500
    body: Any = field(default_factory=lambda: {"error": {"message": "out of order", "type": "server_error"}})
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    resets: bool = False
    cuts: bool = False
    drips: float = 0.0


@dataclass(frozen=True)
class Seen:
    """A request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any
    time: float


def say(prompt: Any) -> str:
    """What the model answers: a function of messages, text or token ids."""
    digest = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()
    return f"answer {digest[:8]}, and more"


class LocalServer:
    """Listens on a free port of this machine; use as `with running_server() as server`.

    Attributes:
        faults: Taken from the front, one for each POST, as long as there are any; `None` for an answer.
        rule: Or: decides by the request's fields, before `faults`.
        answer: What the model says.
        choice: Keys of each choice that differ from what is answered otherwise.
        owner: Who the models belong to, as `vllm` and `llamacpp` say.
        models: The names that are listed; a POST for another gets 404.
        list_fault: Instead of the list.
        max_model_len: Told with each listed model, as vLLM does.
        reports_usage: Whether answers tell their tokens.
        seconds: What each answer takes.
        seen: All requests, in the order in which they came.
        most_at_once: The most POSTs that were under way at one time.
    """

    def __init__(self) -> None:
        self.faults: list[Fault | None] = []
        self.rule: Callable[[Mapping[str, Any]], Fault | None] = lambda _: None
        self.answer: Callable[[Any], str] = say
        self.choice: Mapping[str, Any] = {}
        self.owner = "stand-in"
        self.models: Sequence[str] = ("model",)
        self.list_fault: Fault | None = None
        self.max_model_len: int | None = None
        self.reports_usage = True
        self.seconds = 0.0
        self.seen: list[Seen] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server._get(self)

            def do_POST(self) -> None:
                server._post(self)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that went away is what some tests are about

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def posts(self) -> list[Seen]:
        """The requests for answers."""
        return [seen for seen in self.seen if seen.method == "POST"]

    def close(self) -> None:
        """Stop listening."""
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _get(self, handler: BaseHTTPRequestHandler) -> None:
        self._note(handler, None)
        if handler.path == "/v1/models":
            if self.list_fault is not None:
                self._fail(handler, self.list_fault)
                return
            more = {} if self.max_model_len is None else {"max_model_len": self.max_model_len}
            models = [{"id": name, "object": "model", "owned_by": self.owner, **more} for name in self.models]
            self._send(handler, 200, {"object": "list", "data": models})
        elif handler.path == "/version" and self.owner == "vllm":
            self._send(handler, 200, {"version": "0.0.stand-in"})
        else:
            self._send(handler, 404, {"error": {"message": "not found", "code": 404}})

    def _post(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
            self._note(handler, body)
            with self._lock:
                fault = self.rule(body) or (self.faults.pop(0) if self.faults else None)
            self._closing.wait(self.seconds)
            if fault is None:
                self._answer(handler, body)
            else:
                self._fail(handler, fault)
        finally:
            with self._lock:
                self._at_once -= 1

    def _note(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        headers = {name.lower(): value for name, value in handler.headers.items()}
        with self._lock:
            self.seen.append(Seen(handler.command, handler.path, headers, body, time.monotonic()))

    def _answer(self, handler: BaseHTTPRequestHandler, body: Mapping[str, Any]) -> None:
        if body["model"] not in self.models:
            message = f"The model `{body['model']}` does not exist."
            self._send(handler, 404, {"error": {"message": message, "type": "NotFoundError", "code": 404}})
            return
        is_chat = handler.path == "/v1/chat/completions"
        if not is_chat and handler.path != "/v1/completions":
            self._send(handler, 404, {"detail": "Not Found"})
            return
        text = self.answer(body["messages"] if is_chat else body["prompt"])
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 16
        words = text.split(" ")
        inner: dict[str, Any] = {"message": {"role": "assistant", "content": " ".join(words[:limit])}}
        if not is_chat:
            inner = {"text": " ".join(words[:limit]), "logprobs": None}
        choice = {"index": 0, **inner, "finish_reason": "length" if len(words) > limit else "stop", **self.choice}
        usage = {"prompt_tokens": 5, "completion_tokens": min(len(words), limit)}
        reply = {"id": "x", "object": "chat.completion", "model": body["model"], "choices": [choice]}
        self._send(handler, 200, reply | ({"usage": usage} if self.reports_usage else {}))

    def _fail(self, handler: BaseHTTPRequestHandler, fault: Fault) -> None:
        self._closing.wait(fault.delay)
        if fault.resets:
            # closed with time-out 0, TCP sends RST instead of FIN
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            handler.connection.close()
            return
        self._send(handler, fault.status, fault.body, fault.headers, cuts=fault.cuts, drips=fault.drips)

    def _send(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        body: Any,
        headers: Mapping[str, str] | None = None,
        *,
        cuts: bool = False,
        drips: float = 0.0,
    ) -> None:
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        with suppress(OSError):  # the client went away
            handler.send_response(status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(content) + (10 if cuts else 0)))
            for name, value in (headers or {}).items():
                handler.send_header(name, value)
            handler.end_headers()
            for start in range(0, len(content), 1 if drips else max(len(content), 1)):
                handler.wfile.write(content[start : start + (1 if drips else len(content))])
                if drips and self._closing.wait(drips):
                    break
            if cuts:
                handler.close_connection = True


@contextmanager
def running_server() -> Iterator[LocalServer]:
    """A server that is closed at the end."""
    server = LocalServer()
    try:
        yield server
    finally:
        server.close()


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
