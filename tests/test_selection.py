"""The choice of λ, and what the confirmation says of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from backmerge.selection import Candidate, ChoiceSettings, choose_safe, confirm
from backmerge.statistics import PairedDifference


def difference(upper: float, lower: float = -1.0) -> PairedDifference:
    """A difference of which the one-sided bounds matter."""
    return PairedDifference(0.0, lower, upper, lower, upper, 500, 500.0)


def candidate(lam: float, utility: float, rise: float, series: str = "linear") -> Candidate:
    """A merge at λ with its utility and the estimate of its ASR difference, four points to either side."""
    reach = 0.04
    found = PairedDifference(rise, rise - reach, rise + reach, rise - reach, rise + reach, 500, 500.0)
    return Candidate(f"{series}@{lam:g}", series, lam, utility, found)


def test_the_most_useful_safe_point_is_chosen() -> None:
    """Of those within half of the margin the one with the most utility, and the reason names it."""
    found = choose_safe([candidate(0.2, 0.3, 0.0), candidate(0.4, 0.8, 0.01), candidate(0.6, 0.9, 0.02)], 0.03)
    assert found.point == "linear@0.4"
    assert "linear@0.4" in found.reason
    assert [step.passes for step in found.steps] == [True, True, False]


def test_a_point_is_judged_by_its_own_estimate() -> None:
    """A point beyond one that rises too much may be chosen: the confirmation tests it, whatever chose it."""
    found = choose_safe([candidate(0.6, 0.9, 0.0), candidate(0.2, 0.3, 0.0), candidate(0.4, 0.8, 0.04)], 0.03)
    assert found.point == "linear@0.6"
    assert [(step.lam, step.passes) for step in found.steps] == [(0.2, True), (0.4, False), (0.6, True)]


def test_series_are_tested_apart() -> None:
    """A method's failure does not stop another's."""
    found = choose_safe([candidate(0.2, 0.3, 0.9), candidate(0.2, 0.5, 0.0, "slerp")], 0.03)
    assert found.point == "slerp@0.2"


def test_of_equals_the_one_nearer_to_the_base() -> None:
    """With the same utility the smaller λ is taken."""
    assert choose_safe([candidate(0.4, 0.8, 0.0), candidate(0.2, 0.8, 0.0)], 0.03).point == "linear@0.2"
    two = [candidate(0.4, 0.8, 0.0, "slerp"), candidate(0.2, 0.8, 0.0)]
    assert choose_safe(two, 0.03).point == choose_safe(two[::-1], 0.03).point == "linear@0.2"


def test_the_margin_itself_does_not_pass() -> None:
    """A bound that equals the margin is not below it; an estimate may be half of it, and no more."""
    assert choose_safe([candidate(0.2, 0.3, 0.0151)], 0.03).point is None
    assert choose_safe([candidate(0.2, 0.3, 0.015)], 0.03).point == "linear@0.2"
    assert confirm(difference(0.03), 0.03) == "not shown"


def test_none_is_chosen_where_none_is_shown_safe() -> None:
    """The reason then names the closest and its bound."""
    found = choose_safe([candidate(0.2, 0.3, 0.07), candidate(0.4, 0.3, 0.09)], 0.03)
    assert found.point is None
    assert "linear@0.2" in found.reason
    assert "+7.0" in found.reason


@pytest.mark.parametrize(
    ("lower", "upper", "verdict"),
    [(-0.02, 0.02, "restored"), (-0.02, 0.04, "not shown"), (0.031, 0.1, "worse"), (0.03, 0.1, "not shown")],
)
def test_three_verdicts(lower: float, upper: float, verdict: str) -> None:
    """Below the margin with confidence, above it with confidence, or neither."""
    assert confirm(difference(upper, lower), 0.03) == verdict


@given(
    points=st.lists(
        st.tuples(st.sampled_from("ab"), st.floats(0.01, 0.99), st.floats(0, 1), st.floats(-0.1, 0.1)),
        min_size=1,
        max_size=12,
        unique_by=lambda row: (row[0], f"{row[1]:g}"),
    ),
    data=st.data(),
)
def test_what_is_chosen_passed_and_order_does_not_matter(
    points: list[tuple[str, float, float, float]], data: st.DataObject
) -> None:
    """The choice, if any, has the most utility of those whose estimate is within half of the margin."""
    candidates = [candidate(lam, utility, upper, series) for series, lam, utility, upper in points]
    found = choose_safe(candidates, 0.03)
    shuffled = choose_safe(data.draw(st.permutations(candidates)), 0.03)
    best = {step.point: step.utility for step in found.steps if step.passes}
    assert (found.point is None) == (not best)
    assert {step.point for step in found.steps} == {c.point for c in candidates}
    if found.point is None:
        assert shuffled.point is None
        return
    chosen = next(c for c in candidates if c.point == found.point)
    assert chosen.asr_difference.difference <= 0.015 + 1e-9
    assert chosen.utility == max(best.values()) == best[str(shuffled.point)]


@pytest.mark.parametrize("wrong", [{"margin": 0}, {"margin": 1}, {"weight": -0.1}, {"rule": "best"}, {"m": 1}])
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    """A margin is a share above 0 and below 1, and there is one rule."""
    with pytest.raises(ValidationError):
        ChoiceSettings.model_validate(wrong)
