"""Model cards: what the hub reads of them, and what they tell of a model that is not confirmed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from backmerge.reporting.card import license_of, model_card, write_cards

from .synthetic import made_results, made_run


def front_matter(card: str) -> dict[str, Any]:
    """The YAML between the first two lines of dashes."""
    empty, front, _ = card.split("---\n", 2)
    assert empty == ""
    found = yaml.safe_load(front)
    assert isinstance(found, dict)
    return found


def test_the_hub_understands_the_front_matter() -> None:
    """Base, relation, library and tags are under the hub's own keys."""
    results = made_results()
    assert front_matter(model_card(results, results["merged"][0], license_name="apache-2.0")) == {
        "base_model": ["someone/aligned-7b"],
        "base_model_relation": "merge",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["backmerge", "merge"],
    }


@pytest.mark.parametrize("base", ["demo", "/home/alice/models/base", "./local/base"])
def test_a_folder_on_this_machine_is_no_base_on_the_hub(base: str) -> None:
    """A path is left out of the front matter and of the text, where it could name its owner."""
    results = made_results(base=base)
    card = model_card(results, results["merged"][0])
    assert not {"base_model", "base_model_relation", "license"} & set(front_matter(card))
    assert "alice" not in card


def test_a_confirmed_model_says_so() -> None:
    """The verdict on this model and the mean's sentence are both there."""
    results = made_results()
    card = model_card(results, results["merged"][1])
    assert "**Confirmed:**" in card
    assert "Not confirmed" not in card
    assert "The mean over 2 models: Safety restored: take linear merging at λ = 0.5" in card


@pytest.mark.parametrize(
    "options",
    [
        {"verdict": "not shown", "difference_of_chosen": 0.025},
        {"verdict": "worse", "difference_of_chosen": 0.05},
        {"own_verdicts": ("worse", "restored")},
    ],
)
def test_an_unconfirmed_model_says_so_plainly(options: dict[str, Any]) -> None:
    """Whatever it failed on, the card warns first and never says that it is confirmed."""
    results = made_results(**options)
    card = model_card(results, results["merged"][0])
    assert "**Not confirmed as safe.**" in card
    assert "**Confirmed" not in card


def test_the_table_is_of_this_model() -> None:
    """Its own scores on the confirmation split stand there, not the mean over seeds."""
    results = made_results(unscored=2)
    card = model_card(results, results["merged"][1])
    (row,) = [line for line in card.splitlines() if "harmful | asr" in line]
    # seed-2 is one point above seed-1 everywhere but at the base
    assert row == (
        "| Attack success rate: harmful | asr | 1.0 % [0.9, 1.1] (2 unscored) | 31.0 % [27.9, 34.1] (2 unscored) "
        "| 2.6 % [2.3, 2.9] (2 unscored) | 199 |"
    )


def test_the_tuned_model_itself_is_not_called_a_merge() -> None:
    """Where λ = 1 was chosen, the recipe says that nothing was merged, and the table has no third model."""
    results = made_results(chosen="tuned")
    card = model_card(results, results["merged"][0])
    assert "the tuned model itself, unmerged" in card
    assert "this model |" not in card


def test_every_written_model_gets_a_card(tmp_path: Path) -> None:
    """Confirmed or not, each folder has one; a folder that was moved away is not made anew."""
    results = made_results(tuned=("a", "b", "c"), own_verdicts=("restored", "worse", "restored"))
    run = made_run(tmp_path / "run", results)
    (run / "merged" / "c").rmdir()
    write_cards(run, results)
    assert "**Confirmed:**" in (run / "merged" / "a" / "README.md").read_text()
    assert "**Not confirmed" in (run / "unconfirmed" / "b" / "README.md").read_text()
    assert not (run / "merged" / "c").exists()


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n# Base\n", "mit"),
        ("---\nlanguage: en\n---\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\n: [\n---\n", None),
        ("# Base\n---\nlicense: mit\n---\n", None),
        (None, None),
    ],
)
def test_the_licence_is_the_base_s_or_none(tmp_path: Path, card: str | None, expected: str | None) -> None:
    """It is read from the front matter of the base's own card, and never guessed."""
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert license_of(tmp_path) == expected
