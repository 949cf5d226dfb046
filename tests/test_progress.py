"""What a person sees while work is done, where there is no terminal."""

import itertools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge import progress
from backmerge.progress import Bar, Pace, Part, PlainLines, Rates, TokenMeter, bar_of, rate_text, size_text, time_text


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
def test_pace_counts_only_new_answers(known: int, load: float, batches: list[int], rate: float, rest: int) -> None:
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


def test_estimate_is_printed_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once some seconds are measured the time left is said by itself, with what it rests on; not for a short wait."""
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    with progress.bar("Sweep", 1000, "answers") as advance:
        advance.skip(200)
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
        "Sweep: 248/1,000 answers, about 2 min left (8 answers a second)",
        "Short ...",
    ]


def test_a_plain_function_is_called_with_all_steps() -> None:
    """Steps that were done before count for it as any others, and tokens are nothing to it."""
    told: list[int] = []
    shown = bar_of(lambda steps, *_: told.append(steps))
    shown.skip(3)
    shown.count(read=5)
    shown(2)
    assert told == [3, 2]
    assert bar_of(shown) is shown


class Engine:
    """Answers in batches as transformers does: reads a batch, then writes a token of each answer in a step.

    A token takes `read` or `write` seconds; a batch takes as many steps as its longest answer has tokens.
    """

    def __init__(self, clock: Clock, shown: Bar, read: float = 0.01, write: float = 0.02) -> None:
        self.clock, self.shown, self.read, self.write = clock, shown, read, write

    def batch(self, prompts: list[int], answers: list[int]) -> None:
        """Read prompts of so many tokens, and write answers of so many."""
        self.shown.count()
        slots = len(prompts) * max(prompts)
        self.clock.now += self.read * slots
        self.shown.count(read=slots)
        for _ in range(max(answers)):
            self.clock.now += self.write * len(answers)
            self.shown.count(written=len(answers))
        self.shown(len(prompts))


def test_time_left_is_of_the_tokens_that_are_left() -> None:
    """With the longest prompts first, batches get faster and faster; the estimate is right after the first."""
    clock = Clock()
    shown = Bar("Sweep", 12)
    engine = Engine(clock, shown)
    batches = [[1000, 1000], [100, 100], [10, 10]]
    num_read = sum(map(sum, batches))
    shown.expect([Part("code", 6, num_read, 50), Part("code", 6, num_read, 50)], TokenMeter(clock))
    clock.now += 500.0  # a model is loaded, once
    engine.batch(batches[0], [50, 7])
    one = 0.01 * num_read + 0.02 * 6 * 50
    usage = 0.01 * 2000 + 0.02 * 2 * 50
    assert shown.seconds_left == pytest.approx(2 * one - usage)
    # the answers alone would say 5 × 522 s
    for batch in batches[1:]:
        engine.batch(batch, [50, 3])
    shown.finish(0, 180)
    assert shown.seconds_left == pytest.approx(one)
    assert not shown.tokens.is_bound  # type: ignore[union-attr]


def test_unmeasured_answers_are_assumed_to_reach_their_limit() -> None:
    """Within the first batch the time left is an upper bound, and says so; each kind has its own length."""
    clock = Clock()
    shown = Bar("Sweep", 4)
    meter = TokenMeter(clock)
    shown.expect([Part("short", 2, 20, 100), Part("long", 2, 20, 200)], meter)
    assert shown.seconds_left is None
    assert shown.time_left == ""
    clock.now += 2.0
    shown.count(read=20)
    clock.now += 1.0
    shown.count(written=2)
    assert shown.seconds_left == pytest.approx(2.0 + (2 * 100 + 2 * 200 - 2) / 2)
    assert shown.time_left.startswith("at most about 5 min left")
    clock.now += 9.0
    shown.count(written=18)
    shown(2)
    shown.finish(0, 13)
    assert meter.length("short") == 10
    assert meter.length("long") is None
    assert shown.seconds_left == pytest.approx(2.0 + 2 * 200 / 2)
    again = Bar("Confirmation", 2)  # a session knows what its sweep has measured
    again.expect([Part("short", 2, 10, 100)], meter)
    assert again.seconds_left == pytest.approx(1.0 + 2 * 10 / 2)
    assert again.time_left == "about 11 s left (2 tokens a second)"


def test_answers_made_elsewhere_are_measured_as_they_come() -> None:
    """An engine that counts nothing on the way is measured by the tokens of what it has finished."""
    clock = Clock()
    shown = Bar("Sweep", 4)
    shown.expect([Part("a", 2, 100, 50), Part("a", 2, 100, 50)], TokenMeter(clock))
    clock.now += 10.0
    shown(2)
    shown.finish(1, 40)
    assert shown.seconds_left == pytest.approx(10.0)


def test_nothing_measured_gives_no_estimate() -> None:
    """Neither of writing nor of reading; reading alone takes what it takes."""
    assert Rates().seconds(0, 0) is None
    assert Rates(10, 1.0).seconds(5, 1) is None
    assert Rates(10, 1.0).seconds(5, 0) == 0.5


def test_a_line_is_printed_within_long_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of two minutes, such as one of a tuning, a merge or a long prompt, is not silent."""
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    lines = PlainLines("Fine-tuning, seed 1", 10, None)
    lines(0, "loss 1.2")
    printed = []
    for _ in range(120):  # as the thread of `bar` looks
        clock.now += progress.LOOK_EVERY
        lines.look()
        printed += [(clock.now, line) for line in capsys.readouterr().err.splitlines()]
    times = [100.0, *(now for now, _ in printed), clock.now]
    assert max(later - now for now, later in itertools.pairwise(times)) <= 20
    assert printed[0][1] == "Fine-tuning, seed 1: 0/10, 15 s so far, loss 1.2"


def test_a_bar_looks_while_its_block_works(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is done and nothing is counted: the line is printed all the same, and no thread is left."""
    monkeypatch.setattr(progress, "LOOK_EVERY", 0.001)
    printed = threading.Event()
    monkeypatch.setattr(PlainLines, "look", lambda _: printed.set())
    with progress.bar("Merging", 3):
        assert printed.wait(5)
    assert all(thread.name != "progress" for thread in threading.enumerate())
    assert capsys.readouterr().err == "Merging ...\n"


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


def test_short_work_prints_only_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Off a terminal, work of a moment is one line on standard error, and nothing on standard output."""
    with progress.bar("Merging", 3) as advance:
        for _ in range(3):
            advance(1)
    assert capsys.readouterr() == ("", "Merging ...\n")


def test_long_work_says_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Off a terminal, a plain line now and then with the time left; none is left once all steps are done."""
    monkeypatch.setattr(progress, "PLAIN_LINE_EVERY", 0.0)
    with progress.bar("Merging", 4) as advance:
        advance(1)
        advance(3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["Merging ...", "Merging: 1/4", "Merging: 4/4"]
    assert lines[1].endswith(" left")
    assert lines[2].endswith(" so far")


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets in a file's name are not markup, and a long line is not broken."""
    progress.say("runs/[bold]x[/bold]" + "y" * 300)
    assert capsys.readouterr().err == "runs/[bold]x[/bold]" + "y" * 300 + "\n"
