"""Answers of an earlier run: judged and scored without an engine, each verdict with its own answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from backmerge.benchmarks.protocol import Benchmark
from backmerge.errors import RunError
from backmerge.measuring.judge import Judges
from backmerge.measuring.recorded import Recorded
from backmerge.measuring.score import judge_and_score
from backmerge.planning.points import BASE, Member
from backmerge.records import Completion, Example, Message
from backmerge.runs import RunDirectory

from .test_evaluate import Counting

EXAMPLES = tuple(Example(f"e{i}", (Message("user", f"word{i}"),)) for i in range(4))


def recorded(names: Sequence[str]) -> Recorded:
    """The answers of a base to these prompts, in this order: each prompt's number."""
    completions = [Completion(name, name, name[-1], 1, finished=True) for name in names]
    questions = [f"word{name[-1]}" for name in names]
    return Recorded("base", "harm", "selection", "safety", completions, questions, list(names), [])


def test_recorded_answers_are_scored_in_their_own_order(tmp_path: Path) -> None:
    """Another order than the benchmark's does not shift verdicts, as a split's order may be another."""
    benchmark = Benchmark("harm", "safety", EXAMPLES, 8)
    answered = recorded(["e3", "e0", "e2"]).as_answered(Member("base", BASE, None, None), benchmark)
    run = RunDirectory(tmp_path / "run")
    with run.held():
        (outcome,) = judge_and_score(Judges(run, Counting([])), [answered], 0.0)
    assert [(v.example, v.harmful) for v in outcome.verdicts] == [("e3", False), ("e0", True), ("e2", True)]
    assert outcome.values["asr"] == {"e3": 0.0, "e0": 1.0, "e2": 1.0}


def test_answers_to_some_prompts_have_another_key() -> None:
    """Verdicts are kept under the key: of fewer prompts they are another unit."""
    answered = recorded(["e0", "e1", "e2"]).as_answered(
        Member("base", BASE, None, None), Benchmark("harm", "safety", EXAMPLES, 8)
    )
    some = answered.to(EXAMPLES[:2])
    assert [completion.example for completion in some.completions] == some.ids == ["e0", "e1"]
    assert some.key != answered.key


@pytest.mark.parametrize(
    ("examples", "words"),
    [
        (
            (EXAMPLES[0], replace(EXAMPLES[1], messages=(Message("user", "other"),))),
            "'e1' of harm has changed",
        ),
        (EXAMPLES[:1], "'e1' of harm, which is no longer in that benchmark"),
    ],
)
def test_answers_to_other_prompts_are_refused(examples: tuple[Example, ...], words: str) -> None:
    """An id is only a line's number: what was asked is compared."""
    with pytest.raises(RunError, match=words):
        recorded(["e0", "e1"]).as_answered(Member("base", BASE, None, None), Benchmark("harm", "safety", examples, 8))
