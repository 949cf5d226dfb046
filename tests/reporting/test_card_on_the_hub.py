"""The card as the hub's own library reads it: results survive the round trip, and hostile names stay names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index, model_index_to_eval_results

from backmerge.registry import BENCHMARKS
from backmerge.reporting.card import model_card, write_cards
from backmerge.reporting.card_facts import CardFacts, plain
from backmerge.reporting.card_front import HUB_DATASETS, front_matter

from .synthetic import made_results, made_run, typed

# each would end a line, a cell, a span, the front matter or the text itself, or be run, if it were taken for markup
HOSTILE = (
    "a | b",
    "x\n---\nlicense: mit\n---\n# Safe",
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "![](https://example.com/pixel)",
    "`code`",
    "# heading",
    "*bold* _it_ ~~gone~~",
    "\x1b[31mred\u202egnol",
    "'\": {}[]!&*%@`",
    "- item: value",
)


def card_of(results: dict[str, Any]) -> str:
    """The card of the run's first model."""
    return model_card(CardFacts(typed(results), typed(results).merged[0]))


def loaded(tmp_path: Path, results: dict[str, Any], row: int = 0) -> ModelCard:
    """The card as written into a model's folder, read by the hub's library."""
    run = made_run(tmp_path / "run", results)
    write_cards(run, typed(results))
    return ModelCard.load(run / results["merged"][row]["directory"] / "README.md")


def test_every_result_survives_the_round_trip(tmp_path: Path) -> None:
    """Each benchmark's metric of this very model comes back with its value and its interval."""
    results = made_results(unscored=2)
    found: list[EvalResult] = loaded(tmp_path, results, 1).data.eval_results
    expected = {
        score["benchmark"]: score
        for score in results["scores"]
        if score["model"] == "linear@0.5/seed-2" and score["split"] == "confirmation"
    }
    assert {each.dataset_name for each in found} == set(expected) == {"task", "harmful", "harmless"}
    for each in found:
        score = expected[each.dataset_name]
        assert each.metric_type == score["metric"]
        assert each.metric_value == pytest.approx(score["value"], abs=1e-6)
        assert each.metric_args is not None
        assert each.metric_args["low"] == pytest.approx(score["low"], abs=1e-6)
        assert each.metric_args["high"] == pytest.approx(score["high"], abs=1e-6)
        assert (each.metric_args["n"], each.metric_args["unscored"]) == (score["n"], score["unscored"])
        assert {"base", "tuned"} < each.metric_args.keys()
        assert (each.task_type, each.dataset_split) == ("text-generation", "confirmation")


def test_the_index_is_what_the_library_would_write() -> None:
    """Parsed and written again by the hub's library, the index is the same, key for key."""
    results = made_results()
    index = front_matter(CardFacts(typed(results), typed(results).merged[0]))["model-index"]
    name, evaluations = model_index_to_eval_results(index)
    assert eval_results_to_model_index(name, evaluations) == index


def test_the_metadata_survives_the_round_trip(tmp_path: Path) -> None:
    """What the hub's library makes of the card and would save again is what was written."""
    results = made_results()
    results["base"] |= {"license": "other", "license_name": "llama3", "license_link": "https://example.com/terms"}
    read = loaded(tmp_path, results)
    written = front_matter(CardFacts(typed(results), typed(results).merged[0]))
    assert {key: read.data.to_dict()[key] for key in written} == written
    assert read.data.base_model == ["someone/aligned-7b"]
    assert read.data.license_link == "https://example.com/terms"
    assert read.text.strip().startswith("# synthetic")


def test_results_on_data_sets_of_the_hub_are_written_for_it(tmp_path: Path) -> None:
    """`.eval_results` has the primary metric of each benchmark whose data set is known, and says on what it was."""
    results = made_results()
    for row in (*results["benchmarks"], *results["scores"], *results["summary"], *results["differences"]):
        key = "name" if "sizes" in row else "benchmark"
        row[key] = "advbench" if row[key] == "harmful" else row[key]
    run = made_run(tmp_path / "run", results)
    write_cards(run, typed(results))
    folder = run / results["merged"][0]["directory"]
    (entry,) = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results" / "backmerge.yaml").read_text()))
    asked = {"benchmark": "advbench", "model": "linear@0.5/seed-1", "split": "confirmation", "metric": "asr"}
    (score,) = [one for one in results["scores"] if asked.items() <= one.items()]
    assert (entry.dataset_id, entry.value) == ("walledai/AdvBench", pytest.approx(score["value"], abs=1e-6))
    sizes = next(row["sizes"] for row in results["benchmarks"] if row["name"] == "advbench")
    assert entry.notes is not None
    assert f"on {score['n']} prompts of {sizes['selection'] + sizes['confirmation']}; the others chose λ" in entry.notes
    assert "](curve.png)" in (folder / "README.md").read_text()
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_data_sets_of_the_hub_are_those_that_benchmarks_read() -> None:
    """Each is a benchmark of ours, whose module names the repository."""
    for name, repository in HUB_DATASETS.items():
        module = BENCHMARKS.entries[name].partition(":")[0].rpartition(".")[2].removesuffix("_benchmark")
        folder = Path(__file__).parents[2] / "src" / "backmerge" / "benchmarks"
        texts = [file.read_text() for file in folder.glob(f"{module}*.py")]
        assert any(repository in text for text in texts), name


def test_unscored_answers_are_not_results() -> None:
    """A metric without a value is left out, for the hub takes no empty one."""
    results = made_results()
    for score in results["scores"]:
        if score["benchmark"] == "harmless":
            score["value"] = None
    (index,) = front_matter(CardFacts(typed(results), typed(results).merged[0]))["model-index"]
    assert [result["dataset"]["name"] for result in index["results"]] == ["task", "harmful"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a name", "a name"),
        ("two\n  lines\t", "two lines"),
        ("\x1b[31mred\u202egnol", "\u241b[31mred\ufffdgnol"),
        ("/home/alice/data/mine", "mine"),
        ("~/data/mine/", "mine"),
        ("../mine", "mine"),
        ("someone/aligned-7b", "someone/aligned-7b"),
        (0.5, "0.5"),
    ],
)
def test_others_words_are_one_visible_line(text: object, expected: str) -> None:
    """Without breaks, control characters, turned directions and the folders before a name."""
    assert plain(text) == expected


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_names(tmp_path: Path, name: str) -> None:
    """Names of benchmarks, runs, judges, tuned models and bases stay text: no markup or metadata comes of them."""
    usual, results = made_results(tuned=("seed",)), made_results(tuned=("seed",))
    results["name"] = results["base"]["name"] = name
    results["tuned"][0]["name"] = results["merged"][0]["tuned"] = results["confirmation"]["models"][0]["tuned"] = name
    for point, usual_point in zip(results["points"], usual["points"], strict=True):
        point["parameters"], usual_point["parameters"] = {"mask": name}, {"mask": "mask"}
    for score in results["scores"]:
        score["benchmark"] = name + score["benchmark"]
    for benchmark in results["benchmarks"]:
        benchmark |= {"name": name + benchmark["name"], "judge": name if benchmark["judge"] else None}
    file = tmp_path / "README.md"
    file.write_text(card_of(results), encoding="utf-8")
    read = ModelCard.load(file)
    assert read.data.license is None
    assert read.data.get("backmerge")["confirmed"] is True
    assert "\x1b" not in read.content
    assert "\u202e" not in read.content
    below, usual_lines = (text.split("---\n", 2)[2].splitlines() for text in (read.content, card_of(usual)))
    # in a code span signs are signs, as long as nothing in it ends it
    (span,) = [line for line in below if line.startswith("- parameters: ")]
    assert span.count("`") == 2
    for markup in ("<script", "](javascript", "![", "`code`", "*bold*", "~~gone"):
        assert not [line for line in below if markup in line and line != span]
    # the same headings, items and rows, line by line, as in the card without such names
    assert [line.split(" ")[0] for line in below] == [line.split(" ")[0] for line in usual_lines]
    assert {line.replace("\\|", "").count("|") for line in below if line.startswith("|")} == {7}
