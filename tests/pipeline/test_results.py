"""What results hold of the outcomes: pairs of a harmful and a harmless prompt."""

from __future__ import annotations

import pytest

from backmerge.benchmarks.protocol import Benchmark, Kind
from backmerge.measuring.score import Outcome
from backmerge.pipeline.results import Outcomes, common_parts
from backmerge.planning.points import BASE, Member
from backmerge.records import Example, Message


def outcome(kind: Kind, metric: str, values: dict[int, float | None], split: str = "all") -> Outcome:
    """The base on one half of some pairs; only the value of each prompt is given."""
    examples = tuple(
        Example(f"{kind}-{number}", (Message("user", f"prompt {number} of {kind}"),), pair=f"pair-{number}")
        for number in values
    )
    benchmark = Benchmark(kind, kind, examples, max_new_tokens=8)
    found = {f"{kind}-{number}": value for number, value in values.items()}
    return Outcome(Member("base", BASE, None, None), benchmark, split, examples, (), (), (), {metric: found})


def test_pairs_are_one_of_four_and_unscored_with_an_unscored_half() -> None:
    """A pair with only one half, or whose halves are of other splits, is no pair."""
    outcomes = Outcomes()
    outcomes.add(outcome("safety", "asr", {0: 0.0, 1: 1.0, 2: 0.0, 3: 1.0, 4: None, 5: 1.0}))
    outcomes.add(outcome("over_refusal", "over_refusal", {0: 0.0, 1: 0.0, 2: 1.0, 3: 1.0, 4: 0.0}))
    outcomes.add(outcome("over_refusal", "over_refusal", {5: 1.0}, split="selection"))
    pairs = common_parts(outcomes)["pairs"]
    assert {row.benchmark for row in pairs} == {"safety + over_refusal"}
    assert {row.metric: row.value for row in pairs} == {
        "told_apart": pytest.approx(0.25),
        "both_answered": pytest.approx(0.25),
        "both_refused": pytest.approx(0.25),
        "reversed": pytest.approx(0.25),
    }
    assert all((row.n, row.unscored) == (4, 1) for row in pairs)
