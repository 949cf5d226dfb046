"""What a person sees while work is done: bars with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

PLAIN_LINE_EVERY = 15.0  # seconds


class Advance(Protocol):
    """Tells a bar of steps that are done."""

    def __call__(self, steps: int, note: str = "", /) -> None:
        """So many more steps; a note, such as the loss, stands beside the bar until the next one."""
        ...


def is_first_process() -> bool:
    """Whether this process speaks, of those that `accelerate launch` or `torchrun` started together."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """One line for the person at the terminal; on standard error, so that output can be piped."""
    if not is_first_process():
        return
    from rich.console import Console

    # highlight and markup are off: names of files and models are shown as they are
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(line)


@contextmanager
def bar(description: str, total: int) -> Iterator[Advance]:
    """Show the progress of `total` steps; the block is given a function that advances by so many.

    On a terminal a bar with the time left; elsewhere a line at the start, and one now and then.
    """
    if sys.stderr.isatty() and is_first_process():
        with _rich_bar(description, total) as advance:
            yield advance
        return
    say(f"{description} ...")
    started = last = time.monotonic()
    done = 0
    latest = ""

    def advance_plain(steps: int, note: str = "", /) -> None:
        nonlocal done, last, latest
        done += steps
        latest = note or latest
        now = time.monotonic()
        if now - last >= PLAIN_LINE_EVERY:
            last = now
            left = (now - started) * (total - done) / max(done, 1)
            say(f"{description}: {done}/{total}, about {left:.0f} s left" + (f", {latest}" if latest else ""))

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
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total, note="")

        def advance(steps: int, note: str = "", /) -> None:
            progress.update(task, advance=steps)
            if note:
                progress.update(task, note=note)

        yield advance
