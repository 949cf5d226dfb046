"""The time that answers are said to take before they are begun: of what is left, and at a speed that was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import model_directory
from backmerge.generation.cache import CompletionCache
from backmerge.generation.protocol import EngineSettings
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.measuring.evaluate import Evaluator
from backmerge.measuring.speed import expected_time, time_sentence
from backmerge.measuring.usage import SESSIONS, session, speed_of_sessions
from backmerge.merging.recipe import Variant
from backmerge.planning.estimate import remember_speed, remembered_speed, speed_key
from backmerge.progress import Part, Rates
from backmerge.runs import RunDirectory

from .test_evaluate import EXAMPLES, SAMPLING, Counting, Scripted, job, safety

BASE = Checkpoint(model_directory())


def test_the_time_is_of_reading_and_of_writing_to_the_limit() -> None:
    """100 s of reading and 50 of writing; without a measurement no time is claimed."""
    parts = [Part("code", 4, 600, 20), Part("advbench", 2, 400, 10)]
    told = time_sentence(parts, Rates(10, 1.0, 8, 4.0), "as measured on its first prompts")
    assert "at most 6 answers with at most 100 tokens in all" in told
    assert "at most about 2 min, at 10 tokens read and 2 generated a second" in told
    assert "Estimated time" not in time_sentence(parts, None, "")


def test_only_remaining_work_is_counted(tmp_path: Path) -> None:
    """Answers that the run or another one has cost no time; a confirmation takes none of another run's."""
    cache, asked = CompletionCache(tmp_path / "cache"), [job(Variant(BASE), safety(), "all")]

    def evaluator(run: RunDirectory) -> Evaluator:
        engine = Scripted()
        return Evaluator(run, engine, Counting(engine.log), SAMPLING, 0.0, cache=cache)

    one, other = RunDirectory(tmp_path / "one"), RunDirectory(tmp_path / "other")
    with one.held(), other.held():
        first = evaluator(one)
        ((_, part),) = first.missing(asked)
        assert (part.num_answers, part.limit) == (len(EXAMPLES), 8)
        assert f"{len(EXAMPLES)} answers" in expected_time(first, asked, base=BASE)
        first.evaluate(asked, lambda _: None)
        assert expected_time(evaluator(one), asked, asked, base=BASE) == "All answers are already there."
        assert evaluator(other).missing(asked) == []
        assert len(evaluator(other).missing(asked, is_fresh=True)) == 1


def test_earlier_sessions_are_believed_of_the_same_model_only(tmp_path: Path) -> None:
    """The rates of all sessions on this engine and model are one measurement; a torn line counts for nothing."""
    run = RunDirectory(tmp_path / "run")
    with run.held():
        for model, rates in (("a", Rates(10, 1.0, 8, 4.0)), ("b", Rates(1, 9.0, 1, 9.0)), ("a", Rates(0, 0.0, 2, 1.0))):
            with session(run) as counted:
                counted.usage.meter.rates, counted.usage.measured_on = rates, model
    with (run.path / SESSIONS).open("a") as log:
        log.write(json.dumps({"started": "before speeds were kept"}) + '\n{"speed": {"meas')
    assert speed_of_sessions(run, "a") == Rates(10, 1.0, 10, 5.0)
    assert speed_of_sessions(run, "c") is None
    assert speed_of_sessions(RunDirectory(tmp_path / "new"), "a") is None


def test_an_engine_is_measured_on_few_tokens_and_they_are_kept_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate is there before the first answer, and neither units, cache nor counts hold what was measured."""
    monkeypatch.setenv("BACKMERGE_CACHE", str(tmp_path / "speeds"))
    run, cache = RunDirectory(tmp_path / "run"), CompletionCache(tmp_path / "cache")
    engine = TransformersEngine(EngineSettings(device="cpu", dtype="float32"))
    with run.held():
        evaluator = Evaluator(run, engine, Counting([]), SAMPLING, 0.0, cache=cache)
        told = expected_time(evaluator, [job(Variant(BASE), safety(), "all")], base=BASE)
        assert "as measured on its first prompts" in told
        assert "tokens read" in told
        assert evaluator.usage.num_generated == 0
        assert not [*run.units.glob("completions*"), *(tmp_path / "cache").glob("*.jsonl")]
        again = Evaluator(run, engine, Counting([]), SAMPLING, 0.0, cache=cache)
        told = expected_time(again, [job(Variant(BASE), safety(), "all")], base=BASE)
        assert "as measured in an earlier run on this machine" in told


def test_the_last_speed_of_an_engine_and_a_configuration_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that measured long enough leaves its speed for the next run; another engine knows nothing of it."""
    monkeypatch.setenv("BACKMERGE_CACHE", str(tmp_path / "cache"))
    known, other = speed_key({"engine": "a"}, BASE), speed_key({"engine": "b"}, BASE)
    remember_speed(known, Rates(1, 1.0, 1, 1.0))
    for seconds in (4.0, 0.1):
        run = RunDirectory(tmp_path / f"run-{seconds}")
        with run.held(), session(run) as counted:
            counted.usage.meter.rates, counted.usage.measured_on = Rates(0, 0.0, 10, seconds), known
    assert remembered_speed(known) == Rates(0, 0.0, 10, 4.0)
    assert remembered_speed(other) is None
    monkeypatch.setenv("BACKMERGE_CACHE", str(tmp_path / "run-4.0" / "sessions.jsonl"))  # a file: it cannot be written
    remember_speed(known, Rates(1, 1.0, 1, 1.0))
    assert remembered_speed(known) is None


def test_a_stalled_session_does_not_spoil_estimates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither sessions of the same run nor those of later runs."""
    monkeypatch.setenv("BACKMERGE_CACHE", str(tmp_path / "cache"))
    run, known = RunDirectory(tmp_path / "run"), speed_key({"engine": "a"}, BASE)
    with run.held():
        for seconds in (4.0, 6.0, 9000.0):
            with session(run) as counted:
                counted.usage.meter.rates, counted.usage.measured_on = Rates(0, 0.0, 10, seconds), known
    assert remembered_speed(known) == Rates(0, 0.0, 10, 6.0)
    assert speed_of_sessions(run, known) == Rates(0, 0.0, 20, 10.0)
