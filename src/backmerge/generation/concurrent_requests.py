"""Run many requests at once, with a limit, in threads that Ctrl-C does not wait for."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from backmerge.generation.http_client import StoppedError

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
