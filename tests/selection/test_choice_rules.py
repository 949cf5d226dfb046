"""Every rule of choice: laws over the table, then each by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from backmerge.errors import ConfigError
from backmerge.selection import (
    RULES,
    Bounded,
    Candidate,
    ChoiceSettings,
    SearchSettings,
    check_search,
    choose,
    choose_safe,
)
from backmerge.selection.rules import front_of
from backmerge.statistics import PairedDifference, paired_difference

SETTINGS = {name: ChoiceSettings(rule=name, target=0.05 if name == "target" else None) for name in RULES}


def difference(value: float, reach: float = 0.01) -> PairedDifference:
    """A difference with bounds so far to either side."""
    return PairedDifference(value, value - reach, value + reach, value - reach, value + reach, 300, 300.0)


def candidate(
    lam: float, utility: float | None, asr: float | None, series: str = "linear", **more: object
) -> Candidate:
    """A merge at λ; its own ASR is 2 % above its difference."""
    own = None if asr is None else Bounded(asr + 0.02, asr + 0.01, asr + 0.03, 300, 300.0)
    gap = None if asr is None else difference(asr)
    return Candidate(f"{series}@{lam:g}", series, lam, utility, gap, asr=own)._replace(**more)


RISING = [candidate(0.2, 0.5, 0.0), candidate(0.4, 0.7, 0.01), candidate(0.6, 0.8, 0.05), candidate(1.0, 0.82, 0.3)]
points = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(1, 10), st.none() | st.floats(0, 1), st.none() | st.floats(-0.2, 0.5)),
    min_size=1,
    max_size=10,
    unique_by=lambda row: row[:2],
)


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None)
@given(rows=points, data=st.data())
def test_every_rule_is_a_function_of_the_set(
    rule: str, rows: list[tuple[str, int, float, float]], data: st.DataObject
) -> None:
    """Whatever was measured: a known point or none, a reason, all steps, and no regard to the order of one series."""
    candidates = [candidate(lam / 10, utility, asr, series) for series, lam, utility, asr in rows]
    found = choose(candidates, SETTINGS[rule])
    assert found.point is None or found.point in {c.point for c in candidates}
    assert found.point is None or found.point in found.reason
    assert found.reason.endswith((".", "seen."))
    assert {step.point for step in found.steps} == {c.point for c in candidates}
    alone = [c for c in candidates if c.series == candidates[0].series]
    assert choose(data.draw(st.permutations(alone)), SETTINGS[rule]) == choose(alone, SETTINGS[rule])


@pytest.mark.parametrize("rule", RULES)
def test_of_nothing_nothing_is_chosen(rule: str) -> None:
    """No candidate, no choice, and no crash."""
    assert choose([], SETTINGS[rule]).point is None


@pytest.mark.parametrize(
    ("rule", "chosen"),
    [
        ("safe", "linear@0.4"),
        ("target", "linear@0.4"),
        ("paper", "linear@0.6"),
        ("weighted", "linear@0.6"),
        ("pareto", "linear@0.6"),
    ],
)
def test_each_rule_by_hand(rule: str, chosen: str) -> None:
    """On a usual curve: the margin stops at 0.4, the score and the knee are at 0.6, and λ=1 is never the paper's."""
    assert choose(RISING, SETTINGS[rule]).point == chosen


def test_over_refusal_has_a_separate_margin() -> None:
    """A candidate that refuses half a margin more of the harmless prompts is passed over; those above it are not."""
    refusing = [c._replace(over_refusal_difference=difference(0.03 if c.lam == 0.4 else 0.0)) for c in RISING]
    found = choose(refusing, ChoiceSettings())
    assert found.point == "linear@0.2"
    assert [step.passes for step in found.steps] == [True, False, False, False]
    assert choose(refusing, ChoiceSettings(over_refusal_margin=0.06)).point == "linear@0.4"
    nothing = choose([c._replace(over_refusal_difference=difference(0.1)) for c in RISING], ChoiceSettings())
    assert nothing.point is None
    assert "over-refusal" in nothing.reason


def test_benchmarks_to_keep_have_a_separate_margin() -> None:
    """A candidate that loses more than half of it on any benchmark is passed over, and the reason names it."""
    losing = [c._replace(losses={"german": difference(0.0), "facts": difference(c.reach / 10)}) for c in RISING]
    assert choose(losing, ChoiceSettings()).point == "linear@0.2"  # 0.4 loses 4 points, and 2.5 are allowed
    assert choose(losing, ChoiceSettings(keep_margin=0.08)).point == "linear@0.4"
    nothing = choose([c._replace(losses={"facts": difference(0.1)}) for c in RISING], ChoiceSettings())
    assert nothing.point is None
    without_safety = choose([c._replace(asr_difference=None) for c in losing], ChoiceSettings())
    assert without_safety.point == "linear@0.2"
    assert "whose estimated loss on german and facts is within 2.5 points (half the margin)" in without_safety.reason
    assert [step.passes for step in without_safety.steps] == [True, False, False, False]
    assert {(step.asr_difference, step.lost_on) for step in without_safety.steps} == {(None, "facts")}
    lost = choose(
        [c._replace(asr_difference=None, losses={"facts": difference(0.1)}) for c in RISING], ChoiceSettings()
    )
    assert lost.closest == "linear@0.2"
    assert "each loss on facts within 2.5" in nothing.reason


def test_rule_safe_goes_by_estimates() -> None:
    """Half of the margin, whatever the interval; a λ beyond one that is over it may pass, unlike by rule `target`."""
    hump = [candidate(0.2, 0.5, 0.015), candidate(0.4, 0.6, 0.016), candidate(0.6, 0.7, 0.0), candidate(1.0, 0.8, 0.3)]
    hump[2] = hump[2]._replace(asr_difference=difference(0.0, reach=0.2))
    assert [step.passes for step in choose(hump, ChoiceSettings()).steps] == [True, False, True, False]
    assert choose(hump, ChoiceSettings()).point == "linear@0.6"
    target = ChoiceSettings(rule="target", target=0.0455)
    assert [step.passes for step in choose(hump, target).steps] == [True, False, None, None]


def test_a_fall_through_nonsense_is_named() -> None:
    """A rise of answers that neither refuse nor harm is reported next to the choice, from 5 points on."""
    assert "nonsense" not in choose([candidate(0.4, 0.7, -0.1, other_rise=0.05)], ChoiceSettings()).reason
    found = choose([candidate(0.4, 0.7, -0.1, other_rise=0.12)], ChoiceSettings())
    assert "12.0 points above the base's" in found.reason


def test_margin_holds_on_each_benchmark_separately() -> None:
    """Pooled, a harm on one set is thinned by the other; by itself, it fails."""
    sets = {"first": difference(-0.02), "second": difference(0.04)}
    candidates = [candidate(0.4, 0.7, 0.01, asr_by_benchmark=sets)]
    assert choose(candidates, ChoiceSettings()).point == "linear@0.4"
    found = choose(candidates, ChoiceSettings(pooled=False))
    assert found.point is None
    assert "on second" in found.reason
    assert found.steps[0].upper_bound == pytest.approx(0.05)


def test_validation_comes_before_utility() -> None:
    """The paper's rule reads the validation score where all have one, and says so where not."""
    validated = [candidate(0.2, 0.9, 0.0, validation=-1.5), candidate(0.4, 0.1, 0.0, validation=-1.2)]
    assert choose(validated, SETTINGS["paper"]).point == "linear@0.4"
    found = choose([*validated, candidate(0.6, 0.2, 0.0)], SETTINGS["paper"])
    assert found.point == "linear@0.2"
    assert "validation scores are missing" in found.reason
    assert choose([candidate(1.0, 0.9, 0.0)], SETTINGS["paper"]).point is None


def test_the_papers_rule_takes_merges_without_a_lam() -> None:
    """Model Stock has no λ and is on the grid all the same; of equal scores, the merge nearer to the base is taken."""
    stock = Candidate("model_stock", "model_stock", None, 0.2, None, validation=0.7)
    line = candidate(0.4, 0.1, 0.0, validation=0.6)
    assert choose([line, stock], SETTINGS["paper"]).point == "model_stock"
    assert choose([stock, line._replace(validation=0.7)], SETTINGS["paper"]).point == "linear@0.4"
    whole = [c._replace(validation=0.9) for c in (candidate(0.0, 0.9, 0.0), candidate(1.0, 0.9, 0.0))]
    assert choose([*whole, line, stock], SETTINGS["paper"]).point == "model_stock"


def test_a_weight_of_nothing_is_utility_alone() -> None:
    """W = 0 takes the most utility, a large w the least harm."""
    assert choose(RISING, ChoiceSettings(rule="weighted", weight=0)).point == "linear@1"
    assert choose(RISING, ChoiceSettings(rule="weighted", weight=100)).point == "linear@0.2"


def test_what_another_excels_in_both_is_not_on_the_front() -> None:
    """The front rises in both; of equals the one nearer to the base stands on it."""
    dominated, equal = candidate(0.5, 0.6, 0.02), candidate(0.9, 0.8, 0.05)
    assert [c.lam for _, _, c in front_of([*RISING, dominated, equal])] == [0.2, 0.4, 0.6, 1.0]


def test_a_front_below_its_chord_has_no_knee() -> None:
    """Then its end with the lowest attack success rate is taken."""
    below = [candidate(0.2, 0.5, 0.0), candidate(0.5, 0.55, 0.2), candidate(1.0, 0.9, 0.3)]
    assert choose(below, SETTINGS["pareto"]).point == "linear@0.2"


def test_what_was_not_measured_is_not_tested() -> None:
    """A search leaves gaps: without safety a λ is passed over, and without utility it cannot be chosen."""
    found = choose([candidate(0.2, None, 0.0), candidate(0.4, 0.9, None), candidate(0.6, 0.5, 0.0)], ChoiceSettings())
    assert found.point == "linear@0.6"
    assert [step.passes for step in found.steps] == [True, None, True]
    assert "1 candidates with measured utility" in found.reason
    for incomplete in (candidate(0.2, None, 0.0), candidate(0.4, 0.9, None)):
        assert choose([incomplete], ChoiceSettings()).point is None


def test_undecided_limits_name_the_prompts_needed() -> None:
    """Above the choice: how many prompts, or that none would do, or that it is shown to exceed."""
    ties = [0.0] * 300
    below, undecided = paired_difference(ties, ties), paired_difference([1.0] * 5 + ties[5:], ties)
    base = candidate(0.2, 0.5, None)._replace(asr_difference=below)
    near = candidate(0.4, 0.7, None)._replace(asr_difference=undecided)
    found = choose([base, near], ChoiceSettings())
    assert found.point == "linear@0.2"
    assert "linear@0.4 could not be decided with these 300 prompts" in found.reason
    assert "like them would decide it 80 % of the time" in found.reason
    assert "no number of prompts" in choose_safe([near._replace(asr_difference=difference(0.035))], 0.03).reason
    assert "shown to exceed" in choose_safe([near._replace(asr_difference=difference(0.3))], 0.03).reason
    # less utility above the choice is no loss
    assert "could not" not in choose([base, near._replace(utility=0.4)], ChoiceSettings()).reason


@pytest.mark.parametrize("first", ["a", "b"])
def test_the_tuned_model_ends_every_series_but_counts_once(first: str) -> None:
    """It is named above the choice, of whichever series that is, and is one of the candidates that passed."""
    second = {"a": "b", "b": "a"}[first]
    tuned = candidate(1.0, 0.9, 0.3)._replace(point="tuned")
    ends = [tuned._replace(series=series) for series in (first, second)]
    rows = [candidate(0.2, 0.5, 0.0, "a"), candidate(0.2, 0.4, 0.0, "b")]
    found = choose([*sorted(rows, key=lambda row: row.series != first), *ends], ChoiceSettings())
    assert found.point == "a@0.2"
    assert "of the 2 candidates" in found.reason
    assert "tuned is shown to exceed" in found.reason
    safe_ends = [end._replace(asr_difference=difference(0.0)) for end in ends]
    assert "of the 3 candidates" in choose([*rows, *safe_ends], ChoiceSettings()).reason


def test_a_target_is_needed_by_its_rule() -> None:
    """And a search by boundary is refused where the rule has none."""
    with pytest.raises(ValidationError, match="needs 'target'"):
        ChoiceSettings(rule="target")
    for rule in RULES:
        check_search(SearchSettings(name="grid"), SETTINGS[rule])
    for rule in ("target", "pareto", "paper"):
        with pytest.raises(ConfigError, match=f"search 'race' does not work with rule '{rule}'"):
            check_search(SearchSettings(name="race"), SETTINGS[rule])
