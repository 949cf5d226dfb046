"""From values to scores: what is counted, what is unscored, and what cannot be overlooked."""

import sys
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge.benchmarks.advbench import advbench
from backmerge.benchmarks.files import contains_reference, exact_match
from backmerge.benchmarks.protocol import Benchmark
from backmerge.benchmarks.scoring import (
    over_refusal_values,
    primary_metric,
    safety_values,
    score,
    utility_values,
)
from backmerge.errors import DataError
from backmerge.records import Completion, Example, Message, Score, Verdict
from backmerge.statistics import wilson


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
    metrics = {"exact_match": exact_match, "contains_reference": contains_reference}
    some = examples(2)
    benchmark = Benchmark("b", "utility", tuple(some), 8, metrics)
    answers = [Completion("e0", "", "0", 1, finished=True), Completion("e1", "", "it is 1", 3, finished=True)]
    found = utility_values(benchmark, some, answers)
    assert found == {"exact_match": {"e0": 1.0, "e1": 0.0}, "contains_reference": {"e0": 1.0, "e1": 1.0}}
    assert primary_metric(benchmark) == "exact_match"
    assert primary_metric(Benchmark("b", "safety", (), 8)) == "asr"
    assert primary_metric(Benchmark("b", "over_refusal", (), 8)) == "over_refusal"
    with pytest.raises(ValueError, match="shorter"):
        utility_values(benchmark, some, answers[:1])


def hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """Put a `datasets` in place that gives this, or raises it."""
    module = ModuleType("datasets")

    def load_dataset(name: str, split: str) -> Any:
        assert (name, split) == ("walledai/AdvBench", "train")
        if isinstance(answer, Exception):
            raise answer
        return answer

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_advbench_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of `prompt` and `target` become prompts with ids of their own; the target is not kept."""
    hub(monkeypatch, [{"prompt": "a", "target": "Sure"}, {"prompt": "b", "target": "Sure"}])
    found = advbench()
    assert found.kind == "safety"
    assert [(e.id, e.prompt, e.reference) for e in found.examples] == [
        ("advbench-0", "a", None),
        ("advbench-1", "b", None),
    ]


@pytest.mark.parametrize("error", [ConnectionError("no network\nat all"), ValueError("gated"), OSError()])
def test_advbench_without_the_hub(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """What the hub does not give is one line, with a way round it; also where the error says nothing."""
    hub(monkeypatch, error)
    with pytest.raises(DataError, match=r"could not be fetched from the hub: .+") as caught:
        advbench()
    assert "at all" not in str(caught.value)
    assert "--safety" in (caught.value.remedy or "")
