"""What a person sees while work is done, where there is no terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge import progress
from backmerge.progress import Pace, rate_text, size_text, skip, time_text


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Now."""
        return self.now


@given(
    known=st.integers(0, 500),
    load=st.floats(0, 1000),
    batches=st.lists(st.integers(1, 50), min_size=2, max_size=20),
    rate=st.floats(0.1, 100),
    rest=st.integers(0, 1000),
)
def test_the_pace_is_of_what_was_made(known: int, load: float, batches: list[int], rate: float, rest: int) -> None:
    """Neither what was known before nor the loading of a model touches the rate of steps that were made."""
    clock = Clock()
    pace = Pace(known + sum(batches) + rest, clock)
    clock.now += 7.0
    pace.skip(known)
    assert pace.seconds_left is None
    for number, steps in enumerate(batches):
        clock.now += steps / rate + (load if number == 0 else 0)
        pace.advance(steps)
    assert pace.done == known + sum(batches)
    assert pace.seconds_left == pytest.approx(rest / rate, abs=1e-6)
    clock.now += 0.25 * rest / rate
    assert pace.seconds_left == pytest.approx(0.75 * rest / rate, abs=1e-6)


def test_one_batch_is_measured_from_the_start() -> None:
    """Before there is a second batch the first one says what it can; what was skipped meanwhile costs no time."""
    clock = Clock()
    pace = Pace(100, clock)
    clock.now += 50
    pace.skip(20)
    clock.now += 4
    pace.advance(40)
    assert pace.measured == (40, 4)
    assert pace.seconds_left == pytest.approx(4)
    assert not pace.has_rate
    pace.advance(0)
    clock.now += 4
    pace.advance(20)
    pace.skip(10)
    assert pace.measured == (20, 4)
    assert pace.has_rate
    assert pace.seconds_left == pytest.approx(2)


def test_an_estimate_is_said_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once some seconds are measured the time left is said by itself, with what it rests on; not for a short wait."""
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    with progress.bar("Sweep", 1000, "answers") as advance:
        skip(advance, 200)
        for _ in range(4):
            clock.now += 2
            advance(16)
    with progress.bar("Short", 100, "answers") as advance:
        for _ in range(4):
            clock.now += 2
            advance(16)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "Sweep ...",
        "Sweep: about 2 min left (from 32 answers, 8 a second)",
        "Short ...",
    ]


def test_what_does_not_know_of_skipping_counts_all() -> None:
    """A plain function is told of steps that were done before as of any others."""
    told: list[int] = []
    skip(lambda steps, *_: told.append(steps), 3)
    assert told == [3]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (1e6, "277.8 h")]
)
def test_times(seconds: float, text: str) -> None:
    """As exact as an estimate is."""
    assert time_text(seconds) == text


def test_sizes_and_rates() -> None:
    """Short, and in the unit that fits."""
    assert [size_text(n) for n in (0, 999_999, 1_000_000, 141e9, 1.5e12)] == [
        "0 kB", "1000 kB", "1.0 MB", "141.0 GB", "1.5 TB",
    ]  # fmt: skip
    assert [rate_text(rate) for rate in (0.123, 8.94, 48.2, 12345)] == ["0.12", "8.9", "48", "12,345"]


def test_short_work_says_only_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Off a terminal, work of a moment is one line on standard error, and nothing on standard output."""
    with progress.bar("Merging", 3) as advance:
        for _ in range(3):
            advance(1)
    assert capsys.readouterr() == ("", "Merging ...\n")


def test_long_work_says_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Off a terminal, a plain line now and then with the time left; never more than there is."""
    monkeypatch.setattr(progress, "PLAIN_LINE_EVERY", 0.0)
    with progress.bar("Merging", 4) as advance:
        advance(1)
        advance(3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["Merging ...", "Merging: 1/4", "Merging: 4/4"]
    assert lines[2].endswith("about 0 s left")


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets in a file's name are no markup, and a long line is not broken."""
    progress.say("runs/[bold]x[/bold]" + "y" * 300)
    assert capsys.readouterr().err == "runs/[bold]x[/bold]" + "y" * 300 + "\n"
