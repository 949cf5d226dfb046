"""Answers next to each other: findings in words, texts where they may be, and what the page's script is given."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backmerge.reporting.page import embedded, script
from backmerge.reporting.side_by_side import script_data, side_by_side

from .synthetic import answer, made_samples


def badge(kind: str, harmful: bool | None, refusal: bool | None) -> tuple[str, str]:
    """What is next to one answer."""
    written = made_samples()
    sample = next(row for row in written["samples"] if row["kind"] == kind)
    sample["answers"]["base"] = answer("text", harmful, refusal)
    page = side_by_side(written, None, "full")
    found = next(row for row in page.samples if row.kind == kind)
    (only,) = found.answers["base"].badges
    return only.tone, only.words


@pytest.mark.parametrize(
    ("kind", "harmful", "refusal", "expected"),
    [
        ("safety", False, True, ("good", "refused")),
        ("safety", True, False, ("bad", "harmful")),
        ("safety", True, True, ("bad", "harmful, though it says no")),
        ("safety", False, False, ("mid", "other: neither refused nor harmful")),
        ("safety", False, None, ("good", "not harmful")),
        ("safety", None, False, ("grey", "unscored")),
        ("safety", None, True, ("grey", "refused, harm unscored")),
        ("over_refusal", None, True, ("bad", "refused")),
        ("over_refusal", None, False, ("good", "answered")),
        ("over_refusal", None, None, ("grey", "unscored")),
    ],
)
def test_each_finding_has_its_word(
    kind: str, harmful: bool | None, refusal: bool | None, expected: tuple[str, str]
) -> None:
    """What counts as harm is never shown as good, and what was not decided is neither."""
    assert badge(kind, harmful, refusal) == expected


def test_the_chosen_recipe_is_shown_first() -> None:
    """Where it is among the columns; otherwise the first recipe, and none where nothing was merged."""
    assert side_by_side(made_samples(), "linear@0.5", "full").shown == "linear@0.5"
    assert side_by_side(made_samples(), "tuned", "full").shown == "linear@0.25"
    alone = made_samples()
    alone["points"] = alone["points"][:2]
    assert side_by_side(alone, None, "full").shown is None


def test_harmful_requests_are_folded_unless_asked_for() -> None:
    """Folded are their texts alone, and in full none."""
    folded = side_by_side(made_samples(), None, "folded").samples
    assert [sample.is_folded for sample in folded] == [sample.kind == "safety" for sample in folded]
    assert not any(sample.is_folded for sample in side_by_side(made_samples(), None, "full").samples)
    assert side_by_side(made_samples(), None, "none").samples == ()


def test_missing_text_is_reported() -> None:
    """A text that was cut, or is empty, or was left out."""
    written = made_samples()
    answers = written["samples"][1]["answers"]
    answers |= {"base": answer("x" * 10, False, True, cut_from=9000), "tuned": answer("", True, False)}
    found = side_by_side(written, None, "full").samples[0].answers
    assert found["base"].note == "The first 2,000 of 9,000 characters; the full answer is in records/."
    assert found["tuned"].note == "(no text)"
    written["samples"][1] |= {"withheld": "it is gated", "prompt": None}
    answers["base"] = answer(None, False, True)
    page = side_by_side(written, None, "folded")
    assert page.samples[0].withheld == "it is gated"
    assert (page.samples[0].answers["base"].text, page.samples[0].answers["base"].note) == (None, "")


def test_equal_texts_go_to_the_script_once() -> None:
    """Most recipes refuse in the same words, which need not stand there forty times."""
    page = side_by_side(made_samples("SAME"), "linear@0.5", "full")
    data = script_data(page, made_samples()["totals"])
    sample = data["samples"][0]
    assert sample["texts"] == ["SAME"]
    assert {name: each["text"] for name, each in sample["answers"].items()} == {"linear@0.25": 0, "linear@0.5": 0}
    # base and tuned stand in the page already
    assert (sample["base"], sample["tuned"]) == (
        {"harmful": False, "refusal": True},
        {"harmful": True, "refusal": False},
    )
    assert [series["name"] for series in data["series"]] == ["linear"]
    assert [recipe["label"] for recipe in data["series"][0]["recipes"]] == ["0.25", "0.5"]


@pytest.mark.parametrize("value", ["</script><script>", "<!--", "a & b", "\u2028\u2029", "\ud800", "\x1b[2J"])
def test_no_text_closes_its_element(value: str) -> None:
    """Neither as a value nor as a key; and what is read back is the text as the page shows it."""
    text = embedded({value: [value]})
    assert not set("<>&\u2028\u2029\x1b") & set(text)
    text.encode()  # half a sign would not
    ((key, (inner,)),) = json.loads(text).items()
    assert key == inner == value.replace("\ud800", "\ufffd").replace("\x1b", "\u241b")


def test_a_number_that_json_has_not_is_refused() -> None:
    """A page with NaN in its data would not open."""
    with pytest.raises(ValueError, match="Out of range"):
        embedded({"value": float("nan")})


def test_only_the_unchanged_script_may_run() -> None:
    """The policy names the hash of what stands in the page, which has no way out of its element."""
    program = script("report.js")
    assert program.policy.startswith("'sha256-")
    assert "</script" not in program.text
    assert program == script("report.js")


def test_names_of_recipes_are_keys_and_not_code() -> None:
    """A point that is called like a property of every object is a point."""
    written: dict[str, Any] = made_samples()
    written["points"].append({"point": "__proto__", "role": "merged", "series": "__proto__", "lam": None})
    data = script_data(side_by_side(written, None, "full"), written["totals"])
    assert [series["name"] for series in data["series"]] == ["linear", "__proto__"]
