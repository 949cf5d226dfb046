"""Model cards: what the hub reads of them, and what they tell of a model that is not confirmed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from backmerge.reporting.card import license_of, license_terms, model_card, write_cards
from backmerge.reporting.card_facts import CardFacts

from .synthetic import made_results, made_run, typed

LOSS = {"point": "linear@0.5", "metric": "loss", "score": -0.5, "n": 3}


def card_of(results: dict[str, Any], row: int = 0, **facts: Any) -> str:
    """The card of a model of the run."""
    return model_card(CardFacts(typed(results), typed(results).merged[row], **facts))


def front_matter(card: str) -> dict[str, Any]:
    """The YAML between the first two lines of dashes."""
    empty, front, _ = card.split("---\n", 2)
    assert empty == ""
    found = yaml.safe_load(front)
    assert isinstance(found, dict)
    return found


def with_licence(**terms: str) -> dict[str, Any]:
    """Results of a base whose licence is known."""
    results = made_results()
    results["base"] |= terms
    return results


def test_the_hub_understands_the_front_matter() -> None:
    """Base, relation, licence, library and tags are under the hub's own keys."""
    front = front_matter(card_of(with_licence(license="apache-2.0"), fingerprint="f00d"))
    assert front.pop("model-index")
    assert front == {
        "base_model": ["someone/aligned-7b"],
        "base_model_relation": "merge",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["backmerge", "merge"],
        "backmerge": {
            "version": "0.1.0",
            "confirmed": True,
            "verdict": "restored",
            "findings": [],
            "point": "linear@0.5",
            "fingerprint": "f00d",
        },
    }


@pytest.mark.parametrize("base", ["demo", "/home/alice/models/base", "./local/base", "~/alice/base", "../alice/base"])
def test_local_folder_is_not_a_base_on_the_hub(base: str) -> None:
    """A path is left out of the front matter and of the text, where it could name its owner."""
    card = card_of(made_results(base=base))
    assert not {"base_model", "base_model_relation", "license"} & set(front_matter(card))
    assert "alice" not in card
    assert "- base: " in card


def test_a_folder_may_look_like_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative folder of two parts is a folder where it exists: neither linked nor told whole."""
    (tmp_path / "alice" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = card_of(made_results(base="alice/base"))
    assert "base_model" not in front_matter(card)
    assert "alice" not in card
    assert "- base: base (" in card


def test_revision_is_not_part_of_the_bases_id() -> None:
    """The hub links repositories, not commits of them."""
    front = front_matter(card_of(made_results(base="someone/aligned-7b@abc123")))
    assert front["base_model"] == ["someone/aligned-7b"]


def test_tuned_models_on_the_hub_are_parents_too() -> None:
    """Each merge names the base and the tuned model that went into it, and no other; folders are left out."""
    asked = {"tuned": ["someone/tuned-a@main", "/home/alice/tuned-b"]}
    first, second = (front_matter(card_of(made_results(), row, experiment=asked)) for row in (0, 1))
    assert first["base_model"] == ["someone/aligned-7b", "someone/tuned-a"]
    assert second["base_model"] == ["someone/aligned-7b"]


def test_an_adapter_is_one_of_the_base() -> None:
    """An adapter that is handed over names its one base, peft, and how it is loaded on that base."""
    card = card_of(made_results(), files=frozenset({"adapter_config.json"}))
    front = front_matter(card)
    assert (front["base_model"], front["base_model_relation"]) == ("someone/aligned-7b", "adapter")
    assert front["library_name"] == "peft"
    assert "lora" in front["tags"]
    assert 'base = "someone/aligned-7b"' in card
    assert "PeftModel.from_pretrained(" in card


def test_a_confirmed_model_says_so() -> None:
    """The verdict on this model and the mean's sentence are both there."""
    card = card_of(made_results(), 1)
    assert "**Confirmed:**" in card
    assert "Not confirmed" not in card
    assert "The mean over 2 models: Safety restored: take linear at λ = 0.5" in card


@pytest.mark.parametrize(
    "options",
    [
        {"verdict": "not shown", "difference_of_chosen": 0.025},
        {"verdict": "worse", "difference_of_chosen": 0.05},
        {"own_verdicts": ("worse", "restored")},
    ],
)
def test_an_unconfirmed_model_says_so_plainly(options: dict[str, Any]) -> None:
    """Whatever it failed on, the card warns first, is tagged, and never says that it is confirmed."""
    card = card_of(made_results(**options))
    assert "**Not confirmed as safe.**" in card
    assert "**Confirmed" not in card
    front = front_matter(card)
    assert "safety-not-confirmed" in front["tags"]
    assert front["backmerge"]["confirmed"] is False


def test_the_table_is_of_this_model() -> None:
    """Its own scores on the confirmation split stand there, not the mean over seeds."""
    card = card_of(made_results(unscored=2), 1)
    (row,) = [line for line in card.splitlines() if "harmful | asr" in line]
    # seed-2 is one point above seed-1 everywhere but at the base
    assert row == (
        "| Attack success rate: harmful | asr | 1.0 % [0.9, 1.1] (2 unscored) | 31.0 % [27.9, 34.1] (2 unscored) "
        "| 2.6 % [2.3, 2.9] (2 unscored) | 199 |"
    )


def test_the_tuned_model_itself_is_not_called_a_merge() -> None:
    """Where λ = 1 was chosen, the recipe says that nothing was merged, and the table has no third model."""
    card = card_of(made_results(chosen="tuned"))
    assert "the tuned model, unmerged" in card
    assert "this model |" not in card
    front = front_matter(card)
    assert front["base_model_relation"] == "finetune"
    assert "merge" not in front["tags"]
    # its scores are this model's all the same, with the base's next to them
    metric = front["model-index"][0]["results"][1]["metrics"][0]
    assert metric["value"] == 0.3
    assert "tuned" not in metric["args"]


def test_one_merge_of_all_tuned_models_has_a_card(tmp_path: Path) -> None:
    """A method without λ that takes all: no λ is told, every tuned model is named, the tuned column is their mean."""
    results = made_results(chosen="model_stock", with_stock=True)
    for score in results["scores"]:
        score["model"] = {"model_stock/seed-1": "model_stock/all"}.get(score["model"], score["model"])
    results["confirmation"]["models"] = [results["confirmation"]["models"][0] | {"tuned": "all"}]
    results["merged"] = [results["merged"][0] | {"tuned": "all", "directory": "merged/all"}]
    write_cards(made_run(tmp_path / "run", results), typed(results))
    card = (tmp_path / "run" / "merged" / "all" / "README.md").read_text()
    assert "- λ" not in card.split("## Measured")[0]
    assert "- method: model_stock" in card
    assert all(f"- tuned: {name} (" in card for name in ("seed-1", "seed-2"))
    (row,) = [line for line in card.splitlines() if "harmful | asr" in line]
    assert [cell.strip()[:6] for cell in row.split("|")[3:6]] == ["1.0 % ", "30.5 %", "1.2 % "]


def test_setting_by_part_is_shown() -> None:
    """λ that differs from part to part has no single number, and stands there as it was set."""
    results = made_results()
    results["choice"] |= {"lam": None, "setting": {"attention": 0.3, "rest": 0.6}}
    assert 'λ, by part (0 is the base, 1 the tuned model): `{"attention": 0.3, "rest": 0.6}`' in card_of(results)


def test_measuring_conditions_are_reported() -> None:
    """Judge, prompts of both halves, margin, rule, engine, seeds: what a sceptic asks first."""
    experiment = {"evaluate": {"sampling": {"seed": 7}}, "finetune": {"dataset": "plans", "seeds": [1, 2]}}
    told = card_of(made_results(), experiment=experiment).split("## How it was measured")[1].split("## Limits")[0]
    for fact in (
        "- harmful (safety): 200 prompts to choose, 199 to confirm, judged by a-judge",
        "Rule: safe",
        "3 percentage points above",
        "transformers, device cpu, seed 7",
        "Tuned on plans with 2 seeds: 1, 2",
    ):
        assert fact in told


def test_run_on_all_prompts_reports_how_lam_was_chosen() -> None:
    """Where λ was chosen on the tuning data's own rows, no half is claimed."""
    results = made_results() | {
        "split": "whole",
        "validation": [LOSS],
    }
    card = card_of(results)
    assert "λ was chosen on held-out rows of the tuning data" in card
    assert "half" not in card


def test_limits_are_reported() -> None:
    """What no verdict covers stands in every card."""
    limits = card_of(made_results()).split("## Limits")[1]
    for word in ("languages", "jailbreaks", "several turns", "agents", "biases", "quantised"):
        assert word in limits


def test_every_written_model_gets_a_card(tmp_path: Path) -> None:
    """Confirmed or not, each folder has one; a folder that was moved away is not made again."""
    results = made_results(tuned=("a", "b", "c"), own_verdicts=("restored", "worse", "restored"))
    run = made_run(tmp_path / "run", results)
    (run / "merged" / "c").rmdir()
    (run / "merged" / "a" / "backmerge.json").write_text(json.dumps({"fingerprint": "f00d"}))
    write_cards(run, typed(results))
    confirmed = (run / "merged" / "a" / "README.md").read_text()
    assert "**Confirmed:**" in confirmed
    assert front_matter(confirmed)["backmerge"]["fingerprint"] == "f00d"
    assert "Tuned on plans with 2 seeds: 1, 2" in confirmed  # from the run's experiment.yaml
    assert "**Not confirmed" in (run / "unconfirmed" / "b" / "README.md").read_text()
    assert not (run / "merged" / "c").exists()


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n# Base\n", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
        ),
        ("---\r\nlicense: mit\r\n---\r\n# Base\r\n", {"license": "mit"}),
        ("---\ntext: a---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\nlicense_name: llama3\n---\n", {}),
        ("---\nlanguage: en\n---\n", {}),
        ("---\nlicense: [a, b]\n---\n", {}),
        ("---\n: [\n---\n", {}),
        ("---\njust text\n---\n", {}),
        ("# Base\n---\nlicense: mit\n---\n", {}),
        (None, {}),
    ],
)
def test_the_licence_is_the_base_s_or_none(tmp_path: Path, card: str | None, expected: dict[str, str]) -> None:
    """It is read from the front matter of the base's own card, and never guessed."""
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode())
    assert license_terms(tmp_path) == expected
    assert license_of(tmp_path) == expected.get("license")


@pytest.mark.parametrize(
    ("link", "files", "expected"),
    [
        ("https://example.com/terms", (), "https://example.com/terms"),
        ("LICENSE", ("LICENSE",), "LICENSE"),
        ("LICENSE", (), "https://huggingface.co/someone/aligned-7b/blob/main/LICENSE"),
        ("/home/alice/LICENSE", (), "https://huggingface.co/someone/aligned-7b/blob/main/LICENSE"),
        ("../elsewhere/.hidden", (), None),
        ("javascript:alert(1)/x", (), None),
    ],
)
def test_the_licence_s_text_can_be_found(link: str, files: tuple[str, ...], expected: str | None) -> None:
    """A relative link is to the file that came along, or else to the base's own; nothing of this machine is linked."""
    results = with_licence(license="other", license_name="llama3", license_link=link)
    card = card_of(results, files=frozenset(files))
    front = front_matter(card)
    assert (front["license"], front["license_name"], front.get("license_link")) == ("other", "llama3", expected)
    assert "The licence of the base, someone/aligned-7b: llama3." in card
    assert "alice" not in card


def test_unknown_licence_is_reported_as_unknown() -> None:
    """Nothing is put in its place, and the reader is informed to look."""
    card = card_of(made_results())
    assert "license" not in front_matter(card)
    assert "states no licence in its files" in card
