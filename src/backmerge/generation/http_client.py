"""Send requests to a model server, several at once: retry if that may help, and never show the key.

The client is httpx2, a dependency of `huggingface_hub`; the `openai` package would add a dozen packages for the one
call that is needed, and its retries cannot be stopped with Ctrl-C.
"""

from __future__ import annotations

import email.utils
import itertools
import json
import logging
import queue
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

import httpcore2
import httpx2

from backmerge.errors import GenerationError

FIRST_PAUSE_SECONDS = 0.5  # doubled after each try
LONGEST_PAUSE_SECONDS = 60.0
LONGEST_WISH_SECONDS = 600.0  # with a longer Retry-After, the server will not answer during this run
MAX_REPLY_BYTES = 64 * 2**20
MAX_MESSAGE_LENGTH = 300
NUM_UNREADABLE = 3  # unreadable replies before the server counts as faulty
REPEATED_LENGTH = 24  # this many characters in common with the prompt are no coincidence
SHORT_KEY = 16  # shorter keys ("EMPTY", "token-abc123") are not secret, and may be words of an answer
TOO_BUSY = (408, 409, 425, 429)

T = TypeVar("T")


class UnreadableReplyError(ValueError):
    """A reply that does not follow the protocol."""


class StoppedError(Exception):
    """The answer is no longer needed."""


class RefusedError(GenerationError):
    """The server understood the request and refused it: a retry cannot help.

    Attributes:
        status: HTTP status.
        said: The server's own message, cleaned.
    """

    def __init__(self, message: str, *, remedy: str | None, status: int, said: str) -> None:
        super().__init__(message, remedy=remedy)
        self.status = status
        self.said = said


class _Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    text: str


class ServerClient:
    """A connection to a server, with its time-outs and retries. Threads may share it.

    Args:
        url: Address before the paths of requests.
        key: Sent as a bearer token, to this address only: redirects are not followed.
        timeout_seconds: Limit for one request, from first to last byte.
        retries: Number of retries after the first try.
        concurrency: Number of connections that are kept open.

    Attributes:
        has_answered: Whether the server has answered at all, with success or failure.
    """

    def __init__(self, url: str, key: str | None, *, timeout_seconds: float, retries: int, concurrency: int) -> None:
        self.url = url
        self._key = key
        self._timeout = timeout_seconds
        self._retries = retries
        self._client = client_with_deadlines(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout_seconds, connect=min(timeout_seconds, 20.0)),
            limits=httpx2.Limits(max_connections=concurrency + 1, max_keepalive_connections=concurrency + 1),
            follow_redirects=False,
        )
        if key:  # its debug lines contain headers of replies, which may repeat the key
            logging.getLogger("httpcore2").setLevel(logging.INFO)
        self._closer = weakref.finalize(self, self._client.close)
        self.has_answered = False
        self._jitter = random.SystemRandom()

    def close(self) -> None:
        """Close the connections; also done when the client is garbage-collected."""
        self._closer()

    def ask(
        self,
        path: str,
        payload: Mapping[str, Any] | None,
        read: Callable[[Any], T],
        stop: threading.Event | None = None,
        *,
        is_beside: bool = False,
        retries: int | None = None,
    ) -> T:
        """Return the result of `read` on the reply, or on that of a retry: POST with a payload, GET without.

        Retries follow after pauses that double, with some randomness, or as long as Retry-After says: HTTP 408, 409,
        425, 429 and 5xx, time-outs and broken connections up to `retries` times; replies that are not JSON or that
        `read` cannot read (`UnreadableReplyError`) twice.

        Args:
            path: Path after the address.
            payload: The request's fields.
            read: Extracts the result from the reply's parsed JSON.
            stop: Set when the answer is no longer needed.
            is_beside: Whether the path is next to `/v1`, not under it.
            retries: Number of retries, if other than the client's.

        Raises:
            RefusedError: the server refuses this request.
            GenerationError: it did not answer in time, or not in a readable form.
            StoppedError: `stop` was set.
        """
        most = self._retries if retries is None else retries
        num_unreadable = 0
        for attempt in itertools.count():
            if stop is not None and stop.is_set():
                raise StoppedError
            wish = None
            try:
                reply = self._send(self.url.removesuffix("/v1") + path if is_beside else self.url + path, payload)
                self.has_answered = True
                if 200 <= reply.status < 300:
                    return read(_parsed(reply.text))
                failure = self._failure(reply, payload)
                wish = _retry_after(reply.headers)
            except UnreadableReplyError as error:
                num_unreadable += 1
                failure = f"replies with something other than an answer: {self._without_key(str(error))}"
                if num_unreadable >= NUM_UNREADABLE:
                    raise self._gave_up(failure, attempt) from error
            except httpx2.TimeoutException as error:
                failure = f"does not answer within {self._timeout:g} s"
                if attempt >= most:
                    raise self._gave_up(failure, attempt) from error
            except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as error:
                failure = f"cannot be reached ({_clean(str(error)) or type(error).__name__})"
                # a server that never answered is more likely a wrong address than busy
                if attempt >= (most if self.has_answered else min(most, 1)):
                    raise self._gave_up(failure, attempt) from error
            if attempt >= most or (wish is not None and wish > LONGEST_WISH_SECONDS):
                raise self._gave_up(failure, attempt)
            pause = wish if wish is not None else self._pause(attempt)
            if stop is None:
                time.sleep(pause)
            else:
                stop.wait(pause)
        raise AssertionError  # the loop is endless

    def _send(self, url: str, payload: Mapping[str, Any] | None) -> _Reply:
        content = None if payload is None else json.dumps(payload).encode()
        headers = {} if payload is None else {"Content-Type": "application/json"}
        body = bytearray()
        method = "GET" if payload is None else "POST"
        with (
            deadline(self._timeout),
            self._client.stream(method, url, content=content, headers=headers) as response,
        ):
            try:
                for piece in response.iter_bytes():
                    body += piece
                    if len(body) > MAX_REPLY_BYTES:
                        raise UnreadableReplyError(f"it is longer than {MAX_REPLY_BYTES // 2**20} MiB")
            except httpx2.DecodingError as error:
                raise UnreadableReplyError("its body is not encoded as its headers say") from error
        text = body.decode("utf-8", "replace")
        if self._key is not None and len(self._key) >= SHORT_KEY:
            text = text.replace(self._key, "[key]")
        return _Reply(response.status_code, response.headers, text)

    def _failure(self, reply: _Reply, payload: Mapping[str, Any] | None) -> str:
        """Describe a status that may be temporary.

        Raises:
            RefusedError: it is permanent.
        """
        said, code = _error_of(reply.text)
        said = _clean(self._without_key(said))
        if _repeats(said, payload):
            said = "(its message repeats the prompt and is not shown)"
        failure = f"answers with HTTP {reply.status}" + (f": {said}" if said else "")
        has_no_credit = code == "insufficient_quota"
        if (reply.status in TOO_BUSY or reply.status >= 500) and not has_no_credit:
            return failure
        remedy = None
        if 300 <= reply.status < 400:
            target = _clean(self._without_key(reply.headers.get("location", "elsewhere")))
            failure = f"redirects to {target}, which is not followed since the key would be sent there"
            remedy = "give the final address with the option 'url'."
        elif reply.status in (401, 403):
            remedy = (
                "set the environment variable that the option 'api_key_env' names to a valid key."
                if self._key
                else "name the environment variable with its key in the option 'api_key_env'."
            )
        raise RefusedError(f"the server at {self.url} {failure}", remedy=remedy, status=reply.status, said=said)

    def _gave_up(self, failure: str, attempt: int) -> GenerationError:
        tries = f" ({attempt + 1} tries)" if attempt else ""
        return GenerationError(
            f"the server at {self.url} {failure}{tries}",
            remedy="look at the server's log; answers are stored if the option 'log' is given."
            if self.has_answered
            else "start the server, or give its address, including /v1, with the option 'url'.",
        )

    def _pause(self, attempt: int) -> float:
        """Return a pause in seconds; randomised, so that requests that failed together are not retried together."""
        longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**attempt)
        return self._jitter.uniform(longest / 2, longest)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableReplyError("it is not JSON") from error


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return how many seconds the server asks to wait, from a number or a date (RFC 9110, section 10.2.3)."""
    wish = headers.get("retry-after", "").strip()
    if not wish:
        return None
    try:
        seconds = float(wish)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(wish)
            seconds = (date.astimezone(UTC) - datetime.now(UTC)).total_seconds()
        except (ValueError, OverflowError, TypeError):  # not a date, or one outside the calendar's range
            return None
    return max(seconds, 0.0) if seconds == seconds else None  # noqa: PLR0124 # NaN


def _error_of(text: str) -> tuple[str, str]:
    """Return message and code of an error's body: in OpenAI's form, FastAPI's, or as it is."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return text, ""
    if not isinstance(body, dict):
        return text, ""
    error = body.get("error")
    inner = error if isinstance(error, dict) else body
    message = inner.get("message") or inner.get("detail") or error
    if isinstance(message, list):  # FastAPI's; each entry repeats the faulty input
        faults = [fault for fault in message if isinstance(fault, dict)]
        message = "; ".join(f"{_place(fault.get('loc'))}: {fault.get('msg')}" for fault in faults)
    return (message if isinstance(message, str) else ""), str(inner.get("code") or inner.get("type") or "")


def _place(location: Any) -> str:
    return ".".join(map(str, location)) if isinstance(location, list) else "request"


def _clean(text: str) -> str:
    """Return one line of printable characters, limited in length."""
    line = " ".join(
        "".join(letter if letter.isprintable() else " " for letter in text[: 20 * MAX_MESSAGE_LENGTH]).split()
    )
    return line if len(line) <= MAX_MESSAGE_LENGTH else line[: MAX_MESSAGE_LENGTH - 1] + "…"


def _repeats(said: str, payload: Mapping[str, Any] | None) -> bool:
    """Return whether a message contains a part of the prompt, which may be harmful and is identified by its id only."""
    sent = [" ".join(text.split()) for text in _texts((payload or {}).get("messages"))]
    sent += [" ".join(text.split()) for text in _texts((payload or {}).get("prompt"))]
    parts = [said[i : i + REPEATED_LENGTH] for i in range(max(1, len(said) - REPEATED_LENGTH + 1))]
    return any(
        any(part in text for part in parts if len(part) == REPEATED_LENGTH) or (len(text) >= 8 and text in said)
        for text in sent
    )


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts within plain data, except roles of messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key != "role":
                yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


class _Current(threading.local):  # a request is sent and read by one thread
    end: float | None = None


_current = _Current()


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Stop all network operations of this thread after `seconds`, with the library's own time-out errors.

    One deadline for a whole request: connecting, sending, headers of any length, and the body. The library's own
    time-outs apply to single reads, so that a server that sends a byte before each of them expires, or informational
    replies without end, would keep a request open forever.
    """
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


GRACE_SECONDS = 10.0

Q = TypeVar("Q")
A = TypeVar("A")


def as_answered(
    questions: Sequence[Q], ask: Callable[[Q, threading.Event], A], num_threads: int
) -> Iterator[tuple[int, A]]:
    """Yield each question's place and answer, as the answers come.

    The threads are daemons: when a run is stopped, the interpreter does not wait for the server, as it would for
    threads of `concurrent.futures`. After a failure no new question is asked; those in progress get a few seconds to be
    answered and stored.

    Args:
        questions: Started in order.
        ask: Called in a thread with a question and an event that is set when the answer is no longer needed.
        num_threads: Largest number of questions in progress at once.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for place in range(len(questions)):
        waiting.put(place)
    done: queue.SimpleQueue[tuple[int, A | None, BaseException | None]] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                place = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((place, ask(questions[place], stop), None))
            except StoppedError:
                return
            except BaseException as error:  # noqa: BLE001 # boundary: raised again where the answer is waited for
                done.put((place, None, error))
                return

    threads = [
        threading.Thread(target=work, name=f"request-{number}", daemon=True)
        for number in range(min(num_threads, len(questions)))
    ]
    failure: BaseException | None = None
    try:
        for thread in threads:
            thread.start()
        for _ in questions:
            place, answer, failure = done.get()
            if failure is not None:
                break
            yield place, answer  # type: ignore[misc] # an answer stands where no failure does
    finally:
        stop.set()
    if failure is not None:
        deadline = time.monotonic() + GRACE_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        raise failure
