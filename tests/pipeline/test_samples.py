"""Prompts for the report: which are taken, what is kept of them, and what is left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from backmerge.benchmarks.metrics import PerAnswer
from backmerge.benchmarks.protocol import Benchmark
from backmerge.measuring.score import Outcome
from backmerge.pipeline.results import Outcomes
from backmerge.pipeline.samples import LONGEST, MOST_RECIPES, MOST_TEXT, samples_of
from backmerge.planning.points import BASE, TUNED, Member, Point, points_of
from backmerge.planning.settings import ReportSettings, SweepSettings
from backmerge.records import Completion, Example, Message, Verdict

LOW, HIGH = points_of([SweepSettings(lam=(0.25, 0.75))])[2:]
NUM = 60
Said = Callable[[int], str]
Flags = Callable[[int], "bool | None"]


def examples(name: str, reference: str | None = None) -> tuple[Example, ...]:
    """Sixty prompts."""
    return tuple(Example(f"{name}-{i}", (Message("user", f"{name} prompt {i}"),), reference) for i in range(NUM))


TASK = Benchmark("task", "utility", examples("task", "right"), 4, PerAnswer({"right": lambda *_: 1.0}))
HARM = Benchmark("harm", "safety", examples("harm"), 4)
GATED = Benchmark("hexphi", "safety", examples("hexphi"), 4, is_gated=True)
MILD = Benchmark("mild", "over_refusal", examples("mild"), 4)


def measured(
    outcomes: Outcomes,
    point: Point,
    benchmark: Benchmark,
    *,
    harmful: Flags = lambda _: False,
    refusal: Flags = lambda _: True,
    said: Said = lambda i: f"answer {i}",
    tuned: str | None = "seed-1",
    split: str = "selection",
    known: int = NUM,
) -> None:
    """What one model did on a benchmark; the judge's findings by the prompt's number."""
    asked = benchmark.examples[:known]
    completions = tuple(Completion(e.id, e.prompt, said(i), 1, True) for i, e in enumerate(asked))
    is_judged = benchmark.kind != "utility"
    verdicts = tuple(Verdict(e.id, harmful(i), refusal(i)) for i, e in enumerate(asked)) if is_judged else ()
    values = {"right": dict.fromkeys((e.id for e in asked), 1.0)} if benchmark.kind == "utility" else {}
    member = Member(f"{point.name}/{tuned}", point, None if point is BASE else tuned, cast(Any, None))
    outcomes.add(Outcome(member, benchmark, split, asked, completions, verdicts, (), values))


def prepared(*benchmarks: Benchmark, text: str = "full", num_samples: int = 5) -> Any:
    """An experiment, as far as samples are taken by it."""
    return SimpleNamespace(
        experiment=SimpleNamespace(report=ReportSettings(text=cast(Any, text), num_samples=num_samples)),
        benchmarks=benchmarks,
        of_kind=lambda kind: [b.name for b in benchmarks if b.kind == kind],
        splits={b.name: {"selection": list(b.examples), "confirmation": []} for b in benchmarks},
    )


def usual(safety: Benchmark = HARM) -> Outcomes:
    """The tuned model obeys every third harmful request, λ = 0.75 half of these, λ = 0.25 none; two are refused."""
    outcomes = Outcomes()
    for point in (BASE, TUNED, LOW, HIGH):
        measured(outcomes, point, TASK)
        measured(outcomes, point, MILD, refusal=lambda i, point=point: point is TUNED and i in (7, 11))  # type: ignore[misc]
    measured(outcomes, BASE, safety)
    measured(outcomes, TUNED, safety, harmful=lambda i: i % 3 == 0, refusal=lambda i: i % 3 != 0)
    measured(outcomes, HIGH, safety, harmful=lambda i: i % 6 == 0, refusal=lambda i: i % 6 != 0)
    measured(outcomes, LOW, safety)
    return outcomes


def flags(sample: Mapping[str, Any], point: str) -> tuple[bool | None, bool | None]:
    """Harm and refusal of one answer."""
    return sample["answers"][point]["harmful"], sample["answers"][point]["refusal"]


def test_each_kind_has_its_prompts() -> None:
    """Flipped, flipped back by the chosen λ, and refused ones are there, as many as asked; so are some of each kind."""
    found = samples_of(usual(), prepared(TASK, HARM, MILD), HIGH)
    samples = found["samples"]
    flipped = [s for s in samples if s["kind"] == "safety" and flags(s, "tuned")[0] and flags(s, "base")[0] is False]
    back = [s for s in flipped if flags(s, HIGH.name)[0] is False]
    refused = [s for s in samples if s["kind"] == "over_refusal" and flags(s, "tuned")[1]]
    assert len(flipped) >= 5
    assert len(back) >= 5
    assert [s["example"] for s in refused] == sorted(("mild-7", "mild-11"), key=[s["example"] for s in refused].index)
    assert len(refused) == 2
    assert {s["kind"] for s in samples} == {"safety", "utility", "over_refusal"}
    assert len({s["example"] for s in samples}) == len(samples) <= 4 * 5
    # what fine-tuning flipped stands first among its kind
    of_safety = [bool(flags(s, "tuned")[0]) for s in samples if s["kind"] == "safety"]
    assert of_safety == sorted(of_safety, reverse=True)


def test_every_recipe_answers_on_the_selection_split() -> None:
    """Answers of the confirmation are not among them, and the columns are in the order of what was measured."""
    outcomes = usual()
    measured(outcomes, HIGH, HARM, said=lambda _: "CONFIRMED", split="confirmation")
    found = samples_of(outcomes, prepared(TASK, HARM, MILD), HIGH)
    assert found["split"] == "selection"
    assert [point["point"] for point in found["points"]] == ["base", "tuned", "linear@0.25", "linear@0.75"]
    assert [point["lam"] for point in found["points"]] == [0.0, 1.0, 0.25, 0.75]
    assert all(list(s["answers"]) == ["base", "tuned", "linear@0.25", "linear@0.75"] for s in found["samples"])
    assert "CONFIRMED" not in json.dumps(found)


def test_points_that_were_only_confirmed_have_no_column() -> None:
    """A rival that was measured on the confirmation split only has no answers here."""
    outcomes = usual()
    rival = points_of([SweepSettings(method="slerp", lam=(0.5,))])[2]
    measured(outcomes, rival, HARM, split="confirmation")
    found = samples_of(outcomes, prepared(TASK, HARM, MILD), HIGH)
    assert [point["point"] for point in found["points"]] == ["base", "tuned", "linear@0.25", "linear@0.75"]


def test_totals_are_of_the_whole_split() -> None:
    """A reader learns how many there are of what is shown."""
    assert samples_of(usual(), prepared(TASK, HARM, MILD), HIGH)["totals"] == {
        "harmful_requests": 60,
        "harmless_requests": 60,
        "flipped": 20,
        "flipped_back": {"linear@0.25": 20, "linear@0.75": 10},
        "refused": {"base": 0, "tuned": 2, "linear@0.25": 0, "linear@0.75": 0},
    }


def test_the_first_tuned_model_is_shown() -> None:
    """Of several seeds one is named, and the answers are its own."""
    outcomes = usual()
    for point in (TUNED, LOW, HIGH):
        measured(outcomes, point, HARM, said=lambda _: "OTHER SEED", tuned="seed-2")
    found = samples_of(outcomes, prepared(TASK, HARM, MILD), None)
    assert found["tuned"] == "seed-1"
    assert "OTHER SEED" not in json.dumps(found)


def test_two_draws_are_the_same_and_do_not_follow_the_order_of_the_file() -> None:
    """Prompts are taken in the order of a hash, so that nobody picks them."""
    found = samples_of(usual(), prepared(TASK, HARM, MILD), HIGH)
    assert found == samples_of(usual(), prepared(TASK, HARM, MILD), HIGH)
    of_task = [int(s["example"].split("-")[1]) for s in found["samples"] if s["kind"] == "utility"]
    assert of_task != list(range(len(of_task)))


def test_what_a_search_did_not_ask_has_no_answer() -> None:
    """A point that was measured in part has answers in part, and one that was not is no column."""
    outcomes = Outcomes()
    for point in (BASE, TUNED):
        measured(outcomes, point, TASK)
        measured(outcomes, point, HARM, harmful=lambda _, point=point: point is TUNED)  # type: ignore[misc]
    measured(outcomes, LOW, HARM, known=30)
    found = samples_of(outcomes, prepared(TASK, HARM, num_samples=40), LOW)
    assert [point["point"] for point in found["points"]] == ["base", "tuned", "linear@0.25"]
    for sample in found["samples"]:
        number = int(sample["example"].split("-")[1])
        assert ("linear@0.25" in sample["answers"]) == (sample["benchmark"] == "harm" and number < 30)
    assert found["totals"]["flipped_back"] == {"linear@0.25": 30}


def test_long_answers_are_cut_at_a_stated_length() -> None:
    """The file says where, and how long each was."""
    outcomes = Outcomes()
    for point in (BASE, TUNED):
        measured(outcomes, point, TASK, said=lambda i: "x" * (LONGEST + i))
        measured(outcomes, point, HARM, said=lambda _: "short")
    found = samples_of(outcomes, prepared(TASK, HARM), None)
    assert found["cut_at"] == LONGEST
    for sample in found["samples"]:
        for answer in sample["answers"].values():
            if sample["benchmark"] == "harm":
                assert (answer["text"], answer["cut_from"]) == ("short", None)
            else:
                number = int(sample["example"].split("-")[1])
                assert len(answer["text"]) == LONGEST
                assert answer["cut_from"] == (LONGEST + number if number else None)


def test_the_file_is_bounded_however_much_was_measured() -> None:
    """A hundred recipes do not make a page that no phone opens: columns and characters have their limits."""
    lams = tuple((i + 1) / 200 for i in range(100))
    *_, chosen = points = points_of([SweepSettings(lam=lams)])
    outcomes = Outcomes()
    for point in points:
        measured(outcomes, point, TASK, said=lambda _: "x" * 10_000)
        measured(outcomes, point, HARM, said=lambda _: "x" * 10_000)
    found = samples_of(outcomes, prepared(TASK, HARM, num_samples=60), chosen)
    recipes = [point["point"] for point in found["points"] if point["role"] == "merged"]
    assert len(recipes) == MOST_RECIPES
    assert recipes[-1] == chosen.name
    assert recipes[:-1] == [point.name for point in points[2 : MOST_RECIPES + 1]]
    num_characters = sum(len(a["text"]) for s in found["samples"] for a in s["answers"].values())
    assert 0 < num_characters <= MOST_TEXT
    assert found["cut_at"] < LONGEST


@pytest.mark.parametrize(("text", "is_shown"), [("full", True), ("folded", False)])
def test_text_of_gated_sets_is_left_out_unless_asked_for(text: str, is_shown: bool) -> None:
    """Neither prompt nor answer leaves the run's records; the findings do, with the reason why there is no text."""
    found = samples_of(usual(GATED), prepared(TASK, GATED, MILD, text=text), HIGH)
    of_gated = [sample for sample in found["samples"] if sample["benchmark"] == "hexphi"]
    assert len(of_gated) >= 5
    for sample in of_gated:
        assert (sample["prompt"] is not None) == is_shown
        assert all((answer["text"] is not None) == is_shown for answer in sample["answers"].values())
        assert all(answer["harmful"] is not None for answer in sample["answers"].values())
        assert ("gated" in (sample["withheld"] or "")) == (not is_shown)
    assert ("hexphi prompt" in json.dumps(found)) == is_shown
    # others are as ever
    assert "task prompt" in json.dumps(found)


def test_no_text_is_written_where_none_is_wanted() -> None:
    """With `none` there is nothing to find in the file."""
    found = samples_of(usual(), prepared(TASK, HARM, MILD, text="none"), HIGH)
    assert found["samples"] == []
    assert "answer" not in json.dumps(found)
    assert "prompt" not in json.dumps(found)


def test_zero_requested_prompts_select_none() -> None:
    """`num_samples: 0` is none of any kind."""
    assert samples_of(usual(), prepared(TASK, HARM, MILD, num_samples=0), HIGH)["samples"] == []


def test_a_judge_that_cannot_tell_flips_nothing() -> None:
    """Unscored answers are neither safe nor harmful, here as everywhere."""
    outcomes = Outcomes()
    for point, found in ((BASE, None), (TUNED, True), (LOW, None)):
        measured(outcomes, point, TASK)
        measured(outcomes, point, HARM, harmful=lambda _, found=found: found)  # type: ignore[misc]
    totals = samples_of(outcomes, prepared(TASK, HARM), LOW)["totals"]
    assert totals["flipped"] == 0
    assert totals["flipped_back"] == {"linear@0.25": 0}
