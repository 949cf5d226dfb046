"""The grid and bisection: what they ask for, and that they decide alike."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_merges import CHOICE, LAMS, searched

from backmerge.selection import Candidate, ChoiceSettings, Request, SearchSettings, choose, next_points, search_note
from backmerge.selection.peak import places_of_interest
from backmerge.statistics import PairedDifference

BISECT = SearchSettings(name="bisect")


def full(asr: list[float], utility: list[float], reach: float = 0.01) -> dict[float, Candidate]:
    """Candidates at 0.1, 0.2, ... up to 1, with ASR differences and utilities as given."""
    lams = LAMS[-len(asr) :]
    return {
        lam: Candidate(
            f"linear@{lam:g}",
            "linear",
            lam,
            here,
            PairedDifference(rise, rise - reach, rise + reach, rise - reach, rise + reach, 260, 260.0),
        )
        for lam, rise, here in zip(lams, asr, utility, strict=True)
    }


def costs(asked: list[Request]) -> float:
    """As a share of the grid's, the base counted in full on both sides."""
    return (2 + len(asked)) / (2 + 2 * len(LAMS))


def test_the_grid_asks_for_everything_once() -> None:
    """Safety and utility of each λ, λ=1 among them even if it is not on the grid, and the base never."""
    asked = next_points(SearchSettings(), [0.0, 0.5], {}, CHOICE)
    assert set(asked) == {(0.5, "safety"), (0.5, "utility"), (1.0, "safety"), (1.0, "utility")}
    _, all_asked = searched("grid", full([0.0] * 10, [0.5] * 10))
    assert costs(all_asked) == 1


def test_bisection_begins_with_the_tuned_model() -> None:
    """λ=1 in full, then safety in the middle."""
    _, asked = searched("bisect", full([0.0] * 4 + [0.2] * 6, [place / 10 for place in range(10)]))
    assert asked[:2] == [(1.0, "safety"), (1.0, "utility")]
    assert asked[2] == (0.5, "safety")


@settings(max_examples=300)
@given(boundary=st.integers(0, 10), peak=st.integers(0, 10), steep=st.floats(0.02, 0.1))
def test_on_clean_curves_it_decides_as_the_grid(boundary: int, peak: int, steep: float) -> None:
    """Wherever safety ends and wherever utility peaks: the same decision, for at most 56 % of the generations."""
    candidates = full(
        [0.0 if place < boundary else 0.2 for place in range(10)],
        [0.9 - steep * abs(place - peak) for place in range(10)],
    )
    measured, asked = searched("bisect", candidates)
    assert choose(list(measured.values()), CHOICE).point == choose(list(candidates.values()), CHOICE).point
    assert costs(asked) <= 0.56


@given(
    asr=st.lists(st.floats(-0.05, 0.3), min_size=10, max_size=10),
    utility=st.lists(st.floats(0, 1), min_size=10, max_size=10),
    reach=st.floats(0.001, 0.05),
)
def test_nothing_is_chosen_that_was_not_tested_itself(asr: list[float], utility: list[float], reach: float) -> None:
    """On any curve, however jagged: it ends, and what is chosen was measured and passed, as all tested below it did."""
    candidates = full(asr, utility, reach)
    measured, _ = searched("bisect", candidates)
    found = choose(list(measured.values()), CHOICE)
    if found.point is None:
        return
    chosen = next(c for c in measured.values() if c.point == found.point)
    below = [c.asr_difference for c in measured.values() if c.lam <= chosen.lam and c.asr_difference]
    assert chosen.asr_difference in below
    assert all(d.upper_bound < CHOICE.margin for d in below)


def test_a_peak_inside_is_found_and_then_tested() -> None:
    """Utility peaks at 0.3 and safety ends at 0.8: 0.3 is chosen, and its own safety was asked for."""
    candidates = full([0.0] * 8 + [0.2] * 2, [0.5, 0.6, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    measured, asked = searched("bisect", candidates)
    assert (0.3, "safety") in asked
    assert choose(list(measured.values()), CHOICE).point == "linear@0.3"
    assert costs(asked) <= 0.5


def test_a_winner_that_fails_its_own_test_is_not_chosen() -> None:
    """The peak was never tested, and fails when it is: the search goes on below it."""
    candidates = full([0.0, 0.0, 0.025] + [0.0] * 5 + [0.2] * 2, [0.5, 0.6, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    measured, asked = searched("bisect", candidates)
    assert (0.3, "safety") in asked
    assert choose(list(measured.values()), CHOICE).point == "linear@0.2"


def test_where_asr_falls_the_whole_grid_is_measured() -> None:
    """A smaller λ with more harm than a larger one, beyond both intervals: everything is asked for, and it is said."""
    candidates = full([0.0, 0.0, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0, 0.0, 0.1], [place / 10 for place in range(10)])
    measured, asked = searched("bisect", candidates)
    assert costs(asked) == 1
    assert "λ = 0.5 it is higher than at λ = 0.6" in search_note(BISECT, LAMS, measured)
    assert choose(list(measured.values()), CHOICE).point == choose(list(candidates.values()), CHOICE).point
    within = full([0.0, 0.0, 0.0, 0.0, 0.11, 0.0, 0.0, 0.0, 0.0, 0.1], [place / 10 for place in range(10)])
    measured, asked = searched("bisect", within)
    assert costs(asked) < 1, "within the intervals it is noise"
    assert "nothing measured contradicts" in search_note(BISECT, LAMS, measured)


def test_over_refusal_bounds_the_search_too() -> None:
    """The boundary is where any limit is missed."""
    candidates = {
        lam: c._replace(over_refusal_difference=c.asr_difference._replace(upper_bound=0.2 if lam > 0.3 else 0.0))
        for lam, c in full([0.0] * 10, [place / 10 for place in range(10)]).items()
        if c.asr_difference
    }
    measured, _ = searched("bisect", candidates)
    assert choose(list(measured.values()), CHOICE).point == "linear@0.3"


@pytest.mark.parametrize("num_lams", range(1, 11))
def test_any_length_of_grid(num_lams: int) -> None:
    """From λ=1 alone upwards."""
    candidates = full([0.0] * num_lams, [0.5] * num_lams)
    measured, _ = searched("bisect", candidates)
    assert choose(list(measured.values()), ChoiceSettings()).point is not None


def test_a_small_step_does_not_settle_a_side() -> None:
    """A neighbour that is lower by 7 points ends the search, one lower by half a point does not, two do."""
    assert places_of_interest([None, None, None, 0.63, 0.7]) == []
    assert places_of_interest([None, None, None, 0.695, 0.7]) == [1]
    assert places_of_interest([None, None, 0.698, 0.695, 0.7]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_the_peak_ends_beside_lower_neighbours(utilities: list[float]) -> None:
    """On any curve it ends at a place that is no lower than its neighbours."""
    known: list[float | None] = [None] * len(utilities)
    while places := places_of_interest(known):
        assert all(known[place] is None for place in places)
        for place in places:
            known[place] = utilities[place]
    best = max(u for u in known if u is not None)
    place = known.index(best)
    assert all(other is not None and other <= best for other in known[max(0, place - 1) : place + 2])
