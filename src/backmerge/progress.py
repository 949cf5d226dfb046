"""What a person sees while work is done: bars with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]

PLAIN_LINE_EVERY = 15.0  # seconds


def say(line: str) -> None:
    """One line for the person at the terminal; on standard error, so that output can be piped."""
    from rich.console import Console

    # highlight and markup are off: names of files and models are shown as they are
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(line)


@contextmanager
def bar(description: str, total: int) -> Iterator[Advance]:
    """Show the progress of `total` steps; the block is given a function that advances by so many.

    On a terminal a bar with the time left; elsewhere a line at the start, and one now and then.
    """
    if sys.stderr.isatty():
        with _rich_bar(description, total) as advance:
            yield advance
        return
    say(f"{description} ...")
    started = last = time.monotonic()
    done = 0

    def advance_plain(steps: int) -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if now - last >= PLAIN_LINE_EVERY:
            last = now
            left = (now - started) * (total - done) / max(done, 1)
            say(f"{description}: {done}/{total}, about {left:.0f} s left")

    yield advance_plain


@contextmanager
def _rich_bar(description: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda steps: progress.advance(task, steps)
