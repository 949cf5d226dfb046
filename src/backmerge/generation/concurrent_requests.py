"""Many requests at once, a bounded number under way, that Ctrl-C need not wait for."""

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
    """Each question's place and answer, as they come.

    The threads are daemons: the interpreter of a run that is stopped does not wait for a server, as it does for the
    threads of `concurrent.futures`. After a failure nothing new is asked; what is under way gets a few seconds to be
    answered, and kept.

    Args:
        questions: Begun in order.
        ask: Called in a thread with a question and an event that is set when nobody waits for the answer any more.
        num_threads: Most questions under way at once.
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
