"""Counts of a session: nothing that was taken over passes for work, and a row stands however the session ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import model_directory
from backmerge.generation.cache import CompletionCache
from backmerge.measuring.evaluate import Evaluator
from backmerge.measuring.usage import Usage, session
from backmerge.merging.recipe import Variant
from backmerge.progress import Bar
from backmerge.runs import RunDirectory

from .test_evaluate import EXAMPLES, SAMPLING, Counting, Scripted, job, safety

BASE = Checkpoint(model_directory())


def measured(run: RunDirectory, cache: CompletionCache | None, variants: Sequence[Variant]) -> tuple[Usage, Bar]:
    """What it costs to measure these."""
    engine, bar = Scripted(), Bar("Sweep", len(EXAMPLES))
    evaluator = Evaluator(run, engine, Counting(engine.log), SAMPLING, 0.0, cache=cache)
    evaluator.evaluate([job(variant, safety(), str(n)) for n, variant in enumerate(variants)], bar)
    return evaluator.usage, bar


def test_existing_answers_cost_nothing(tmp_path: Path) -> None:
    """Answers are made once, then taken from the run, and elsewhere from the cache; the bar learns no pace of it."""
    cache = CompletionCache(tmp_path / "cache")
    variants = [Variant(BASE)]
    with RunDirectory(tmp_path / "a").held(), RunDirectory(tmp_path / "b").held():
        first, bar = measured(RunDirectory(tmp_path / "a"), cache, variants)
        assert (first.num_generated, first.num_tokens, first.num_kept, first.num_from_cache) == (6, 6, 0, 0)
        assert bar.pace.measured[0] == 6
        again, bar = measured(RunDirectory(tmp_path / "a"), cache, variants)
        assert (again.num_generated, again.num_kept, again.num_from_cache) == (0, 6, 0)
        assert (again.num_judged, again.num_verdicts_kept) == (0, 6)
        assert (bar.pace.done, bar.pace.measured[0], bar.pace.seconds_left) == (6, 0, None)
        other, bar = measured(RunDirectory(tmp_path / "b"), cache, variants)
        assert (other.num_generated, other.num_kept, other.num_from_cache) == (0, 0, 6)
        assert (bar.pace.done, bar.pace.measured[0]) == (6, 0)
        assert other.num_judged == 6


def test_equal_answers_are_judged_once(tmp_path: Path) -> None:
    """Four models that answer alike cost the judge one round; two of them are merges that nobody wrote to a disk."""
    run = RunDirectory(tmp_path / "run")
    variants = [Variant(BASE), Variant(BASE, BASE, lam=0.5), Variant(BASE, BASE, lam=0.6), Variant(BASE, BASE)]
    with run.held():
        usage, _ = measured(run, None, variants)
    assert (usage.num_generated, usage.num_judged, usage.num_judged_once) == (24, 6, 18)
    assert usage.num_unwritten == 2
    assert usage.bytes_unwritten == 2 * sum(4 * info.num_elements for info in BASE.infos.values())
    assert "24 answers generated in this session (24 tokens), 6 judged" in usage.sentence
    assert "18 verdicts reused for equal answers" in usage.sentence
    assert "2 merged models" in usage.sentence


def test_a_written_checkpoint_is_not_counted_as_saved(tmp_path: Path) -> None:
    """What an engine needs as a checkpoint was written, and is not counted as saved."""
    usage = Usage()
    usage.answered(Variant(BASE, BASE, lam=0.5), "checkpoint", 2, 20)
    usage.answered(Variant(BASE, BASE, lam=0.5), "checkpoint", 2, 20)
    usage.answered(None, "live", 1, 1)
    assert (usage.num_generated, usage.num_tokens, len(usage.merged), usage.num_unwritten) == (5, 41, 1, 0)
    assert "saved" not in usage.sentence


def test_session_is_recorded_however_it_ends(tmp_path: Path) -> None:
    """A row for each session with how it ended; a line that a killed process tore is cut, and the others stand."""
    run = RunDirectory(tmp_path / "run")
    file = run.path / "sessions.jsonl"
    with run.held():
        with session(run) as one, one.usage.timed("answering"):
            one.planned = {"num_answers": 3}
        with pytest.raises(KeyboardInterrupt), session(run):
            raise KeyboardInterrupt
        whole = file.read_text()
        file.write_text(whole + '{"started": "2026')
        with session(run, Usage(num_generated=7)):
            pass
    assert file.read_text().startswith(whole)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["ended"] for row in rows] == ["done", "KeyboardInterrupt", "done"]
    assert rows[0]["planned"] == {"num_answers": 3}
    assert rows[0]["seconds"] >= rows[0]["seconds_by_stage"]["answering"] >= 0
    assert rows[2]["num_generated"] == 7


def test_shard_has_separate_logs(tmp_path: Path) -> None:
    """Several hosts cannot append to one file: each part's rows and lines are in its folder."""
    with RunDirectory(tmp_path / "run", part="2-of-8").held(is_shared=True):
        run = RunDirectory(tmp_path / "run", part="2-of-8")
        run.log("hello")
        with session(run):
            pass
    assert [file.parent.name for file in (tmp_path / "run").rglob("sessions.jsonl")] == ["2-of-8"]
    assert (tmp_path / "run" / "shards" / "2-of-8" / "log.txt").read_text().endswith("hello\n")
    assert not (tmp_path / "run" / "log.txt").exists()


def test_seconds_add_up_when_a_stage_comes_again() -> None:
    """A stage's seconds are the sum over its blocks, also of one that ends with an error."""
    usage = Usage()
    with usage.timed("judging"):
        pass
    first = usage.seconds_by_stage["judging"]
    with pytest.raises(ValueError, match="x"), usage.timed("judging"):
        raise ValueError("x")
    assert usage.seconds_by_stage["judging"] > first >= 0
