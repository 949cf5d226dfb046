"""Show the progress of work: bars with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from rich.progress import Task
    from rich.text import Text

PLAIN_LINE_EVERY = 15.0  # seconds, checked every LOOK_EVERY: at least one line in 20 seconds
LOOK_EVERY = 1.0
# an estimate is printed as soon as this many seconds are measured, if the work takes that long
MEASURED_FOR = 3.0
WORTH_SAYING = 20.0


class Advance(Protocol):
    """A callback that receives the number of finished steps."""

    def __call__(self, steps: int, note: str = "", /) -> None:
        """Add finished steps; a note, such as the loss, is shown until the next one."""
        ...


class Rates(NamedTuple):
    """Tokens that a model processed on this machine, and the seconds that they took.

    Attributes:
        read: Prompt tokens, padding included; 0 if the engine does not count reading and writing separately.
        read_seconds: Time for these.
        written: Generated tokens, padding included.
        written_seconds: Time for these.
    """

    read: int = 0
    read_seconds: float = 0.0
    written: int = 0
    written_seconds: float = 0.0

    def plus(self, other: Rates) -> Rates:
        """Return the sum of both measurements."""
        return Rates(
            self.read + other.read,
            self.read_seconds + other.read_seconds,
            self.written + other.written,
            self.written_seconds + other.written_seconds,
        )

    def seconds(self, read: float, written: float) -> float | None:
        """Return the seconds for that many tokens; `None` until the kind in question has been measured."""
        reading = read * self.read_seconds / self.read if self.read else 0.0
        if self.written:
            return reading + written * self.written_seconds / self.written
        return None if written or not self.read else reading


class TokenMeter:
    """Measure how fast an engine reads and writes, and how long the answers are; one serves a whole session.

    Args:
        clock: Seconds; monotonic by default.

    Attributes:
        rates: As measured.
        expected: Rates that are used until some seconds are measured.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.rates = Rates()
        self.expected: Rates | None = None
        self._clock = clock if clock is not None else time.monotonic
        self._last = self._clock()
        self._lengths: dict[str, tuple[int, int]] = {}

    def count(self, read: int = 0, written: int = 0) -> None:
        """Count tokens, and assign them the seconds since the last call; without tokens, drop those seconds."""
        now = self._clock()
        took, self._last = now - self._last, now
        known = self.rates
        if written:  # an engine that counts both at once does not separate reading from writing
            self.rates = known._replace(written=known.written + written, written_seconds=known.written_seconds + took)
        elif read:
            self.rates = known._replace(read=known.read + read, read_seconds=known.read_seconds + took)

    def seconds(self, read: float, written: float) -> float | None:
        """Return the seconds for that many tokens; `None` until something is known."""
        if self.expected is not None and self.rates.written_seconds < MEASURED_FOR:
            return self.expected.seconds(read, written)
        return self.rates.seconds(read, written)

    def note_length(self, label: str, num_answers: int, written: int) -> None:
        """Record the total tokens of some answers of a kind."""
        answers, tokens = self._lengths.get(label, (0, 0))
        self._lengths[label] = (answers + num_answers, tokens + written)

    def length(self, label: str) -> float | None:
        """Return the mean tokens of an answer of a kind; `None` before the first."""
        answers, tokens = self._lengths.get(label, (0, 0))
        return tokens / answers if answers else None


class Part(NamedTuple):
    """Answers that are still to be generated: one model's to one benchmark.

    Attributes:
        label: Shared by answers of similar length, such as the benchmark's name.
        num_answers: All samples counted.
        read: Tokens of their prompts.
        limit: Most tokens of an answer.
    """

    label: str
    num_answers: int
    read: int
    limit: int


class TokenPace:
    """Estimate the time for the remaining answers, by tokens rather than by answers.

    Batches are sorted by length, and a batch takes as long as its longest answer, so the number of answers says little.
    Answers of a kind that has not been measured yet are assumed to reach their limit: the time is then an upper bound.

    Args:
        parts: In the engine's order, if it does them one by one.
        meter: The session's meter.
    """

    def __init__(self, parts: Sequence[Part], meter: TokenMeter) -> None:
        self.meter = meter
        self._left = dict(enumerate(parts))
        self._read = self._written = 0  # since the last part was finished
        self._num_answers = self._written_then = 0  # of whole batches since then

    def count(self, read: int, written: int) -> None:
        """Count tokens that were just read or written."""
        self.meter.count(read, written)
        self._read += read
        self._written += written

    def advance(self, num_answers: int) -> None:
        """Count the answers of a finished batch."""
        self._num_answers += num_answers
        self._written_then = self._written

    def finish(self, number: int, written: int) -> None:
        """Mark one part as done.

        Args:
            number: Its index.
            written: Tokens of its answers, without padding.
        """
        part = self._left.pop(number)
        if not self._written and written:  # generated elsewhere, and not counted while it ran
            self.meter.count(part.read, written)
        # the only part since the last one: its tokens are those that were counted, padding included
        is_alone = self._written > 0 and self._num_answers == part.num_answers
        self.meter.note_length(part.label, part.num_answers, self._written if is_alone else written)
        self._read = self._written = self._num_answers = self._written_then = 0

    @property
    def is_bound(self) -> bool:
        """Return whether the time left is an upper bound."""
        return any(length is None for _, length in self._lengths())

    @property
    def seconds_left(self) -> float | None:
        """Return the seconds from now; `None` before anything was measured."""
        lengths = self._lengths()
        read = sum(part.read for part, _ in lengths) - self._read
        written = sum(part.num_answers * (part.limit if length is None else length) for part, length in lengths)
        return self.meter.seconds(max(0, read), max(0.0, written - self._written))

    def _lengths(self) -> list[tuple[Part, float | None]]:
        """Return the remaining parts with the mean length of their answers, the current part by its own batches."""
        left = list(self._left.values())  # copied at once: another thread prints meanwhile
        found = [(part, self.meter.length(part.label)) for part in left]
        if found and self._num_answers:
            found[0] = (left[0], self._written_then / self._num_answers)
        return found


class Pace:
    """Estimate the time for the rest of some work from what was measured of it.

    The first batch includes one-time costs, such as loading a model: once there is a second batch, the rate is that of
    the steps after the first.

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
        """Skip steps that were done before."""
        self.done += steps
        if self._measured == 0:
            self._started = self._clock()

    def advance(self, steps: int) -> None:
        """Add steps that were done now."""
        if steps <= 0:
            return
        self.done += steps
        self._measured += steps
        self._last = self._clock()
        if self._first is None:
            self._first = (self._last, steps)

    @property
    def measured(self) -> tuple[int, float]:
        """Return the steps that the rate is based on, and their seconds; 0 steps before the first batch."""
        if self._first is None:
            return 0, 0.0
        then, steps = self._first
        if self._measured > steps and self._last > then:
            return self._measured - steps, self._last - then
        return self._measured, max(self._last - self._started, 1e-9)

    @property
    def has_rate(self) -> bool:
        """Return whether more than the first batch was measured, for long enough."""
        return self._first is not None and self._measured > self._first[1] and self.measured[1] >= MEASURED_FOR

    @property
    def seconds_left(self) -> float | None:
        """Return the seconds from now; `None` before the first batch."""
        steps, seconds = self.measured
        if steps == 0:
            return None
        left = (self.total - self.done) * seconds / steps
        return max(0.0, left - (self._clock() - self._last))


def time_text(seconds: float) -> str:
    """Return a duration as text, with as much precision as an estimate has."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size_text(num_bytes: float) -> str:
    """Return a size as text, in the unit that keeps it short."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6)):
        if num_bytes >= 10**power:
            return f"{num_bytes / 10**power:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"


def rate_text(rate: float) -> str:
    """Return a rate per second as text, with two or more digits."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def count_text(number: int, one: str, several: str | None = None) -> str:
    """Return a number of things as text, in the singular or the plural."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def is_first_process() -> bool:
    """Return whether this is the process that prints, among those that `accelerate launch` or `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """Print a line for the user; on standard error, so that output can be piped."""
    if not is_first_process():
        return
    from rich.console import Console

    # highlight and markup are off: names of files and models are shown as they are
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(line)


class Bar:
    """Count the finished steps of some work and, for answers, the tokens.

    Args:
        description: The work.
        total: Steps.
        unit: The name of the steps, in the plural.
    """

    def __init__(self, description: str = "", total: int = 0, unit: str | None = None) -> None:
        self.description = description
        self.unit = unit
        self.pace = Pace(total)
        self.tokens: TokenPace | None = None
        self.note = ""

    def __call__(self, steps: int, note: str = "", /) -> None:
        """Add finished steps; a note, such as the loss, is shown until the next one."""
        self.note = note or self.note
        self.pace.advance(steps)
        if self.tokens is not None and steps:
            self.tokens.advance(steps)

    def skip(self, steps: int) -> None:
        """Count steps that were done before: they cost no time, so the rate ignores them."""
        self.pace.skip(steps)

    def expect(self, parts: Sequence[Part], meter: TokenMeter) -> None:
        """Estimate the time left from the tokens of these answers."""
        self.tokens = TokenPace(parts, meter)
        meter.count()

    def count(self, read: int = 0, written: int = 0) -> None:
        """Count tokens that were just read or written; without any, mark the start of the next ones."""
        if self.tokens is not None:
            self.tokens.count(read, written)

    def finish(self, number: int, written: int) -> None:
        """Mark one of the expected parts as done, with its number of tokens."""
        if self.tokens is not None:
            self.tokens.finish(number, written)

    @property
    def seconds_left(self) -> float | None:
        """Return the seconds from now; `None` before anything was measured."""
        by_tokens = None if self.tokens is None else self.tokens.seconds_left
        return self.pace.seconds_left if by_tokens is None else by_tokens

    @property
    def time_left(self) -> str:
        """Return the time left in words, with its rate; empty before the first measurement and after the end."""
        left = self.seconds_left
        if left is None or self.pace.done >= self.pace.total:
            return ""
        bound = "at most " if self.tokens is not None and self.tokens.is_bound else ""
        return f"{bound}about {time_text(left)} left{self._basis()}"

    def _basis(self) -> str:
        if self.tokens is None:
            steps, seconds = self.pace.measured
            return f" ({rate_text(steps / seconds)} {self.unit} a second)" if self.unit else ""
        rates = self.tokens.meter.rates
        if not rates.written_seconds:
            return ""
        return f" ({rate_text(rates.written / rates.written_seconds)} tokens a second)"


class _Forwarding(Bar):
    """Forward the steps to a function that accepts nothing else."""

    def __init__(self, advance: Callable[[int], object]) -> None:
        super().__init__()
        self._advance = advance

    def __call__(self, steps: int, note: str = "", /) -> None:  # noqa: ARG002 - as of any bar
        if steps:
            self._advance(steps)

    def skip(self, steps: int) -> None:
        self._advance(steps)


def bar_of(advance: Callable[[int], object]) -> Bar:
    """Return the object itself if it is a bar, otherwise a bar that forwards the steps to it."""
    return advance if isinstance(advance, Bar) else _Forwarding(advance)


@contextmanager
def bar(description: str, total: int, unit: str | None = None) -> Iterator[Bar]:
    """Show the progress of `total` steps.

    On a terminal, show a bar with the time left; elsewhere print a line at the start, and then at least one every 20
    seconds, even during a long step.

    Args:
        description: The work.
        total: Steps.
        unit: The name of the steps, in the plural.
    """
    if sys.stderr.isatty() and is_first_process():
        with _rich_bar(description, total, unit) as shown:
            yield shown
        return
    say(f"{description} ...")
    lines = PlainLines(description, total, unit)
    stopped = threading.Event()

    def look() -> None:
        while not stopped.wait(LOOK_EVERY):
            lines.look()

    thread = threading.Thread(target=look, name="progress", daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        stopped.set()
        thread.join()


class PlainLines(Bar):
    """Print the progress as occasional lines, if there is no terminal."""

    def __init__(self, description: str, total: int, unit: str | None) -> None:
        super().__init__(description, total, unit)
        self._started = self._last = time.monotonic()
        self._has_estimate = False
        self._printing = threading.Lock()

    def __call__(self, steps: int, note: str = "", /) -> None:
        """Add finished steps."""
        super().__call__(steps, note)
        self.look()

    def count(self, read: int = 0, written: int = 0) -> None:
        """Count tokens that were just read or written."""
        super().count(read, written)
        self.look()

    def look(self) -> None:
        """Print a line if the last one was long ago, or if the time left has just become known."""
        with self._printing:
            now = time.monotonic()
            is_first_estimate = not self._has_estimate and self._is_measured()
            if is_first_estimate:
                self._has_estimate = True
            left = self.seconds_left
            is_worth = is_first_estimate and left is not None and left >= WORTH_SAYING
            if is_worth or now - self._last >= PLAIN_LINE_EVERY:
                self._last = now
                say(self._line(now - self._started))

    def _is_measured(self) -> bool:
        if self.tokens is None:
            return self.unit is not None and self.pace.has_rate
        return self.tokens.meter.rates.written_seconds >= MEASURED_FOR

    def _line(self, seconds: float) -> str:
        unit = f" {self.unit}" if self.unit else ""
        told = [f"{self.pace.done:,}/{self.pace.total:,}{unit}", self.time_left or f"{time_text(seconds)} so far"]
        return f"{self.description}: {', '.join(filter(None, [*told, self.note]))}"


@contextmanager
def _rich_bar(description: str, total: int, unit: str | None) -> Iterator[Bar]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
    from rich.text import Text

    class OnTerminal(Bar):
        """Also move rich's bar."""

        def skip(self, steps: int) -> None:
            super().skip(steps)
            progress.update(task, advance=steps)

        def __call__(self, steps: int, note: str = "", /) -> None:
            super().__call__(steps, note)
            progress.update(task, advance=steps, note=self.note)

    shown = OnTerminal(description, total, unit)

    class TimeLeft(ProgressColumn):
        """Show our own estimate: rich's counts steps that cost nothing as fast ones."""

        def render(self, task: Task) -> Text:  # noqa: ARG002 - rich's signature
            return Text(shown.time_left)

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeLeft(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total, note="")
        yield shown
