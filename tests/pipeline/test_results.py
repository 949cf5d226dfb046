"""What results hold of the outcomes: pairs of a harmful and a harmless prompt."""

from __future__ import annotations

import pytest

from backmerge.benchmarks.protocol import Benchmark, Kind
from backmerge.measuring.score import Outcome
from backmerge.pipeline.results import Outcomes, common_parts, pair_tests_of
from backmerge.planning.points import BASE, TUNED, Member, Point
from backmerge.records import Example, Message

BASE_ITSELF = Member("base", BASE, None, None)
CHOSEN = Point("linear@0.4", "merged", "linear", 0.4)


def outcome(
    kind: Kind, metric: str, values: dict[int, float | None], split: str = "all", member: Member = BASE_ITSELF
) -> Outcome:
    """A model on one half of some pairs; only the value of each prompt is given."""
    examples = tuple(
        Example(f"{kind}-{number}", (Message("user", f"prompt {number} of {kind}"),), pair=f"pair-{number}")
        for number in values
    )
    benchmark = Benchmark(kind, kind, examples, max_new_tokens=8)
    found = {f"{kind}-{number}": value for number, value in values.items()}
    return Outcome(member, benchmark, split, examples, (), (), (), {metric: found})


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


def test_pairs_are_tested_against_the_base_with_one_correction() -> None:
    """Of 40 pairs, the merge refuses both sides of ten that the base told apart; seeds are averaged pair by pair."""
    outcomes = Outcomes()
    alike = dict.fromkeys(range(40), 0.0)
    more = {number: float(number < 10) for number in range(40)}
    models = [(BASE_ITSELF, alike)] + [(Member(f"tuned/{name}", TUNED, name, None), alike) for name in "ab"]
    models += [(Member(f"linear@0.4/{name}", CHOSEN, name, None), more) for name in "ab"]
    for member, refused in models:
        outcomes.add(outcome("safety", "asr", dict(alike), "confirmation", member))
        outcomes.add(outcome("over_refusal", "over_refusal", dict(refused), "confirmation", member))
    rows = {row.metric: row for row in pair_tests_of(outcomes, "linear@0.4", "confirmation")}
    lost, refusing = rows["told_apart"], rows["both_refused"]
    assert (lost.base, lost.tuned, lost.value, lost.difference.difference) == (1.0, 1.0, 0.75, -0.25)
    assert refusing.difference.difference == 0.25
    # ten signs alike: 2 / 2^10 two-sided, times four tests
    assert lost.p == pytest.approx(2 / 2**10, rel=0.5)
    assert lost.p_adjusted == pytest.approx(4 * min(lost.p, refusing.p), rel=0.5)
    assert rows["reversed"].p_adjusted == 1.0
    assert not pair_tests_of(outcomes, "linear@0.4", "selection")
