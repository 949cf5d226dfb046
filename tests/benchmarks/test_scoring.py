"""From values to scores: what is counted, what is unscored, and what cannot be overlooked."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge.benchmarks.files import contains_reference, exact_match
from backmerge.benchmarks.metrics import PerAnswer, Together
from backmerge.benchmarks.protocol import Benchmark
from backmerge.benchmarks.scoring import (
    over_refusal_values,
    primary_metric,
    safety_values,
    score,
)
from backmerge.errors import DataError
from backmerge.judging.refusal_phrases import RefusalPhrases
from backmerge.records import Example, Message, Score, Verdict
from backmerge.statistics import wilson

WORDS = [f"w{number}" for number in range(40)]


def examples(number: int) -> list[Example]:
    """So many examples that are not alike."""
    return [Example(f"e{i}", (Message("user", f"word{i} thing{i}"),), str(i)) for i in range(number)]


def scored(values: list[float | None]) -> Score:
    """The score of these values."""
    some = examples(len(values))
    return score("m", "b", "all", "asr", some, {e.id: v for e, v in zip(some, values, strict=True)})


def test_a_score_by_hand() -> None:
    """Three harmful of five that were scored, one unscored: 0.6, between 3/6 and 4/6, with Wilson's interval."""
    found = scored([1.0, 1.0, 1.0, 0.0, 0.0, None])
    assert (found.value, found.numerator, found.n, found.unscored) == (0.6, 3.0, 5, 1)
    assert (found.value_if_unscored_0, found.value_if_unscored_1) == (0.5, pytest.approx(4 / 6))
    assert (found.low, found.high) == pytest.approx(wilson(3, 5))
    assert found.n_effective == 5


@given(values=st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=12))
def test_unscored_is_neither_safe_nor_unsafe(values: list[float | None]) -> None:
    """Law 7: unscored answers are counted apart, and both readings of them bound the value."""
    found = scored(values)
    assert found.n + found.unscored == len(values)
    assert found.unscored == values.count(None)
    assert 0 <= found.low <= found.high <= 1
    if found.value is None:
        assert found.n == 0
        assert (found.low, found.high, found.value_if_unscored_0, found.value_if_unscored_1) == (0, 1, 0, 1)
        return
    assert found.value_if_unscored_0 - 1e-12 <= found.value <= found.value_if_unscored_1 + 1e-12
    assert found.low - 1e-9 <= found.value <= found.high + 1e-9


def test_near_duplicates_count_for_less() -> None:
    """Twenty copies of one prompt are the evidence of one: the interval is as wide as for one."""
    copies = [Example(f"c{i}", (Message("user", "mend the kite"),)) for i in range(20)]
    found = score("m", "b", "all", "asr", copies, {e.id: 1.0 for e in copies})
    assert (found.n, found.n_effective) == (20, 1)
    assert found.low == pytest.approx(wilson(1, 1).low)


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_a_judge_that_skips_a_prompt_is_found(change: str) -> None:
    """Values for fewer or other prompts than were asked would shrink n without a word."""
    some = examples(3)
    values: dict[str, float | None] = {e.id: 0.0 for e in some}
    if change == "missing":
        del values["e1"]
    else:
        values["e9"] = values.pop("e1")
    with pytest.raises(DataError, match="for 3 prompts, none for 'e1'"):
        score("m", "b", "all", "asr", some, values)


TRUTH = [True, False, None]


@pytest.mark.parametrize("harmful", TRUTH)
@pytest.mark.parametrize("refusal", TRUTH)
def test_the_nine_verdicts(harmful: bool | None, refusal: bool | None) -> None:
    """Harm, non-refusal and neither, each None where its own flag is; never guessed from the other."""
    verdict = [Verdict("a", harmful, refusal)]
    found = {name: values["a"] for name, values in safety_values(verdict).items()}
    assert found["asr"] == (None if harmful is None else float(harmful))
    assert found["non_refusal"] == (None if refusal is None else float(not refusal))
    neither = None if None in (harmful, refusal) else float(not harmful and not refusal)
    assert found["other"] == neither
    assert over_refusal_values(verdict)["over_refusal"]["a"] == (None if refusal is None else float(refusal))


def test_utility_is_by_metric() -> None:
    """Every metric gives every example its value; the first is the one that λ is chosen on."""
    scorer = PerAnswer({"exact_match": exact_match, "contains_reference": contains_reference})
    some = examples(2)
    benchmark = Benchmark("b", "utility", tuple(some), 8, scorer)
    found = scorer(some, [["0"], ["it is 1"]], lambda _: None)
    assert found == {"exact_match": [1.0, 0.0], "contains_reference": [1.0, 1.0]}
    assert scorer(some, [["0", "1"], ["1", "1"]], lambda _: None)["exact_match"] == [0.5, 1.0]
    assert primary_metric(benchmark) == "exact_match"
    assert primary_metric(Benchmark("b", "safety", (), 8)) == "asr"
    assert primary_metric(Benchmark("b", "over_refusal", (), 8)) == "over_refusal"
    with pytest.raises(ValueError, match="shorter"):
        scorer(some, [["0"]], lambda _: None)


def test_scorers_together() -> None:
    """Metrics of several scorers stand in one table, and their identities in one."""
    one, other = PerAnswer({"exact_match": exact_match}), PerAnswer({"contains_reference": contains_reference}, "7")
    together = Together(one, other)
    assert together.metrics == ("exact_match", "contains_reference")
    assert one.identity in together.identity
    assert other.identity in together.identity
    assert together(examples(1), [["it is 0"]], lambda _: None) == {"exact_match": [0.0], "contains_reference": [1.0]}


def test_several_samples_of_a_prompt() -> None:
    """The rate is the mean over samples, unknown where one is unread; any-of-k is known as soon as one harms."""
    verdicts = [
        Verdict("a", harmful, refusal=not harmful, sample=i) for i, harmful in enumerate((True, False, False, False))
    ]
    verdicts += [Verdict("b", harmful, refusal=None, sample=i) for i, harmful in enumerate((False, None))]
    verdicts += [Verdict("c", harmful, refusal=None, sample=i) for i, harmful in enumerate((True, None))]
    found = safety_values(verdicts)
    assert found["asr"] == {"a": 0.25, "b": None, "c": None}
    assert found["asr_any"] == {"a": 1.0, "b": None, "c": 1.0}
    assert found["non_refusal"] == {"a": 0.25, "b": None, "c": None}
    assert "asr_any" not in safety_values([Verdict("a", harmful=True, refusal=False)])


def test_rates_that_a_judge_lacks_are_left_out() -> None:
    """A judge of harm alone gives no rate of refusals, rather than one that nobody found."""

    class HarmAlone(RefusalPhrases):
        finds_refusals = False

    assert list(safety_values([Verdict("a", harmful=True, refusal=None)], HarmAlone())) == ["asr"]


def test_fractional_values_get_a_bootstrap_interval() -> None:
    """Equal partial values leave no doubt about the mean's spread, where a coin's interval would."""
    some = [replace(e, messages=(Message("user", f"{w} {w}ing"),)) for e, w in zip(examples(40), WORDS, strict=True)]
    values = {e.id: 0.5 + 0.01 * (i % 3) for i, e in enumerate(some)}
    found = score("m", "b", "all", "f1", some, values)
    assert 0.5 < found.low < found.value < found.high < 0.52
    coins = score("m", "b", "all", "em", some, {e.id: float(i % 2) for i, e in enumerate(some)})
    assert (coins.low, coins.high) == pytest.approx(wilson(20, 40))


def test_the_mean_over_categories() -> None:
    """Each category counts alike, however many rows it has; with one category there is none."""
    some = [replace(e, category="x" if i < 3 else "y") for i, e in enumerate(examples(4))]
    values = {"e0": 1.0, "e1": 1.0, "e2": 1.0, "e3": 0.0}
    assert score("m", "b", "all", "em", some, values).category_mean == 0.5
    assert score("m", "b", "all", "em", examples(4), values).category_mean is None
