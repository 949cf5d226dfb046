"""What a person sees while work is done: bars with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Task
    from rich.text import Text

PLAIN_LINE_EVERY = 15.0  # seconds
# an estimate is said once by itself, when so many seconds have been measured and there is so long to wait
MEASURED_FOR = 3.0
WORTH_SAYING = 20.0


class Advance(Protocol):
    """Tells a bar of steps that are done."""

    def __call__(self, steps: int, note: str = "", /) -> None:
        """So many more steps; a note, such as the loss, stands beside the bar until the next one."""
        ...


def skip(advance: Advance, steps: int) -> None:
    """Tell a bar of steps that were done before: they cost no time, so that no time left is reckoned from them."""
    getattr(advance, "skip", advance)(steps)


class Pace:
    """How long the rest of some work takes, by what was measured of it.

    The first batch pays for what happens once, such as loading a model: as soon as there is a second one, the rate is
    that of the steps after the first.

    Args:
        total: Steps.
        clock: Seconds; monotonic by default.
    """

    def __init__(self, total: int, clock: Callable[[], float] | None = None) -> None:
        self.total = total
        self.done = 0
        self._clock = clock if clock is not None else time.monotonic
        self._started = self._last = self._clock()
        self._first: tuple[float, int] | None = None  # when the first batch was done, and its steps
        self._measured = 0

    def skip(self, steps: int) -> None:
        """Steps that were done before."""
        self.done += steps
        if self._measured == 0:
            self._started = self._clock()

    def advance(self, steps: int) -> None:
        """Steps that were done now."""
        if steps <= 0:
            return
        self.done += steps
        self._measured += steps
        self._last = self._clock()
        if self._first is None:
            self._first = (self._last, steps)

    @property
    def measured(self) -> tuple[int, float]:
        """The steps that the rate rests on, and the seconds that they took; no steps before the first batch."""
        if self._first is None:
            return 0, 0.0
        then, steps = self._first
        if self._measured > steps and self._last > then:
            return self._measured - steps, self._last - then
        return self._measured, max(self._last - self._started, 1e-9)

    @property
    def has_rate(self) -> bool:
        """Whether more than a first batch, and long enough, was measured."""
        return self._first is not None and self._measured > self._first[1] and self.measured[1] >= MEASURED_FOR

    @property
    def seconds_left(self) -> float | None:
        """From now on; `None` before the first batch."""
        steps, seconds = self.measured
        if steps == 0:
            return None
        left = (self.total - self.done) * seconds / steps
        return max(0.0, left - (self._clock() - self._last))


def time_text(seconds: float) -> str:
    """A length of time, as exact as an estimate is."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size_text(num_bytes: float) -> str:
    """A size, in the unit that keeps it short."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6)):
        if num_bytes >= 10**power:
            return f"{num_bytes / 10**power:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"


def rate_text(rate: float) -> str:
    """How many a second, in two or more digits."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def count_text(number: int, one: str, several: str | None = None) -> str:
    """A number of things, in the singular or the plural."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


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
def bar(description: str, total: int, unit: str | None = None) -> Iterator[Advance]:
    """Show the progress of `total` steps; the block is given a function that advances by so many.

    On a terminal a bar with the time left; elsewhere a line at the start, and one now and then.

    Args:
        description: What is done.
        total: Steps.
        unit: What a step is, in the plural: an estimate of the time is then said by itself, once it was measured.
    """
    if sys.stderr.isatty() and is_first_process():
        with _rich_bar(description, total) as advance:
            yield advance
        return
    say(f"{description} ...")
    yield _PlainLines(description, total, unit)


class _PlainLines:
    """Progress where there is no terminal."""

    def __init__(self, description: str, total: int, unit: str | None) -> None:
        self._description = description
        self._unit = unit
        self._pace = Pace(total)
        self._last = time.monotonic()
        self._note = ""

    def skip(self, steps: int) -> None:
        """Steps that were done before."""
        self._pace.skip(steps)

    def __call__(self, steps: int, note: str = "", /) -> None:
        """So many more steps."""
        self._note = note or self._note
        pace = self._pace
        pace.advance(steps)
        left = pace.seconds_left
        if left is None:
            return
        if self._unit is not None and pace.has_rate:
            if left >= WORTH_SAYING:
                say(f"{self._description}: {_estimate(pace, left, self._unit)}")
                self._last = time.monotonic()
            self._unit = None
        now = time.monotonic()
        if now - self._last >= PLAIN_LINE_EVERY:
            self._last = now
            note = f", {self._note}" if self._note else ""
            say(f"{self._description}: {pace.done}/{pace.total}, about {time_text(left)} left{note}")


def _estimate(pace: Pace, left: float, unit: str) -> str:
    """The time left, with what it was reckoned from."""
    steps, seconds = pace.measured
    return f"about {time_text(left)} left (from {steps:,} {unit}, {rate_text(steps / seconds)} a second)"


@contextmanager
def _rich_bar(description: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
    from rich.text import Text

    pace = Pace(total)

    class TimeLeft(ProgressColumn):
        """By our own measure: rich's takes steps that cost nothing for fast ones."""

        def render(self, task: Task) -> Text:  # noqa: ARG002 - rich's signature
            left = pace.seconds_left
            return Text("" if left is None else f"{time_text(left)} left")

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeLeft(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total, note="")

        class OnBar:
            """Advances both."""

            def skip(self, steps: int) -> None:
                pace.skip(steps)
                progress.update(task, advance=steps)

            def __call__(self, steps: int, note: str = "", /) -> None:
                pace.advance(steps)
                progress.update(task, advance=steps)
                if note:
                    progress.update(task, note=note)

        yield OnBar()
