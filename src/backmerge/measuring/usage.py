"""Count what a session costs and saves, and write it as a line of the run's `sessions.jsonl`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from backmerge.merging.methods.linear import linear
from backmerge.merging.recipe import Variant
from backmerge.merging.served import checkpoint_bytes
from backmerge.planning.estimate import remember_speed, slowness, speeds_in, typical
from backmerge.progress import MEASURED_FOR, Rates, TokenMeter, count_text, rate_text, size_text, time_text
from backmerge.runs import RunDirectory, key_of

SESSIONS = "sessions.jsonl"
STALLED = 10  # times slower than usual: such a session does not show how fast the machine is


@dataclass
class Usage:
    """Counts of one session.

    Attributes:
        num_generated: Generated answers.
        num_tokens: Their generated tokens.
        num_from_cache: Answers reused from other runs.
        num_kept: Answers that this run already had.
        num_judged: Answers that a judge was asked about.
        num_judged_once: Answers equal to another answer to the same prompt, whose verdict was reused.
        num_verdicts_kept: Verdicts that this run already had.
        seconds_by_stage: Seconds, by stage.
        merged: Merged models that answered, by key: how each got into the engine, and the size of its checkpoint.
        meter: How fast the engine reads and writes.
        measured_on: A hash of that engine and its model.
    """

    num_generated: int = 0
    num_tokens: int = 0
    num_from_cache: int = 0
    num_kept: int = 0
    num_judged: int = 0
    num_judged_once: int = 0
    num_verdicts_kept: int = 0
    seconds_by_stage: dict[str, float] = field(default_factory=dict)
    merged: dict[str, tuple[str, int]] = field(default_factory=dict)
    meter: TokenMeter = field(default_factory=TokenMeter)
    measured_on: str = ""

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the seconds of the block for that stage."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds_by_stage[stage] = self.seconds_by_stage.get(stage, 0.0) + time.monotonic() - started

    def answered(self, variant: Variant | None, way: str, num_answers: int, num_tokens: int) -> None:
        """Count answers of a model; `way` is how it got into the engine."""
        self.num_generated += num_answers
        self.num_tokens += num_tokens
        if variant is not None and _is_merge(variant):
            self.merged.setdefault(key_of(variant.identity), (way, checkpoint_bytes(variant)))

    @property
    def num_unwritten(self) -> int:
        """Merged models that answered without being written as a checkpoint."""
        return sum(way != "checkpoint" for way, _ in self.merged.values())

    @property
    def bytes_unwritten(self) -> int:
        """The size of those checkpoints on disk."""
        return sum(size for way, size in self.merged.values() if way != "checkpoint")

    @property
    def sentence(self) -> str:
        """Describe for the terminal what was generated, and what was saved."""
        seconds = self.seconds_by_stage.get("answering", 0.0)
        rate = f" in {time_text(seconds)}, {rate_text(self.num_tokens / seconds)} a second" if seconds >= 1 else ""
        tokens = f" ({self.num_tokens:,} tokens{rate})" if self.num_generated else ""
        made = (
            f"{count_text(self.num_generated, 'answer')} generated in this session{tokens}, {self.num_judged:,} judged"
        )
        reused = [
            (self.num_kept, "answer", "from this run"),
            (self.num_from_cache, "answer", "from earlier runs"),
            (self.num_judged_once, "verdict", "reused for equal answers"),
            (self.num_unwritten, "merged model", f"({size_text(self.bytes_unwritten)}) not written to the disk"),
        ]
        saved = ", ".join(f"{count_text(number, what)} {which}" for number, what, which in reused if number)
        return made + (f"; saved: {saved}" if saved else "")


def _is_merge(variant: Variant) -> bool:
    """Return whether a model exists only as a merge: it is not a base, a tuned model or a server's."""
    if not variant.tuned_models:
        return False
    is_tuned = len(variant.tuned_models) == 1 and variant.method == linear and variant.lam == 1
    return not is_tuned or variant.dtype is not None


def session_row(
    usage: Usage, *, started: float, seconds: float, ended: str, planned: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return a session as plain data.

    Args:
        usage: Its counts.
        started: Seconds since the epoch.
        seconds: How long it took.
        ended: `done`, or the kind of exception that ended it.
        planned: The estimate that was printed before it started, as plain data.
    """
    ways = [way for way, _ in usage.merged.values()]
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
        "seconds": round(seconds, 3),
        "ended": ended,
        "num_generated": usage.num_generated,
        "num_tokens": usage.num_tokens,
        "num_from_cache": usage.num_from_cache,
        "num_kept": usage.num_kept,
        "num_judged": usage.num_judged,
        "num_judged_once": usage.num_judged_once,
        "num_verdicts_kept": usage.num_verdicts_kept,
        "num_merged": {way: ways.count(way) for way in sorted(set(ways))},
        "bytes_unwritten": usage.bytes_unwritten,
        "seconds_by_stage": {stage: round(took, 3) for stage, took in usage.seconds_by_stage.items()},
        "speed": {"measured_on": usage.measured_on, **usage.meter.rates._asdict()},
        "planned": None if planned is None else dict(planned),
    }


class Session:
    """One session; its row is written when it ends.

    Attributes:
        usage: Its counts.
        planned: Filled in when it is known.
    """

    def __init__(self, usage: Usage) -> None:
        self.usage = usage
        self.planned: Mapping[str, Any] | None = None


@contextmanager
def session(run: RunDirectory, usage: Usage | None = None) -> Iterator[Session]:
    """Count a block as a session of a run, however it ends; a killed one leaves no row."""
    counted = Session(usage if usage is not None else Usage())
    started, clock = time.time(), time.monotonic()
    ended = "done"
    try:
        yield counted
    except BaseException as error:  # boundary: it is reported, and the run continues
        ended = type(error).__name__
        raise
    finally:
        row = session_row(
            counted.usage, started=started, seconds=time.monotonic() - clock, ended=ended, planned=counted.planned
        )
        run.append(SESSIONS, row)
        if counted.usage.meter.rates.written_seconds >= MEASURED_FOR:
            remember_speed(counted.usage.measured_on, counted.usage.meter.rates)


def speed_of_sessions(run: RunDirectory, measured_on: str) -> Rates | None:
    """Return the rates that earlier sessions of a run measured, without stalled ones; `None` if they did not."""
    rows = [row.get("speed") or {} for row in speeds_in(run.logs / SESSIONS)]
    speeds = [Rates(**speed) for speed in rows if speed.pop("measured_on", None) == measured_on]
    usual = typical([speed for speed in speeds if speed.written_seconds])
    if usual is None:
        return None
    total = Rates()
    for speed in speeds:
        if slowness(speed) <= STALLED * slowness(usual):
            total = total.plus(speed)
    return total
