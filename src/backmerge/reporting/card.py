"""The model card: README.md beside a merged model's weights, for people and for the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from backmerge.checkpoints.locate import HUB_ID
from backmerge.reporting.explained import KINDS
from backmerge.reporting.findings import Cell, Results, caveats, cell_text, points, verdict_sentence
from backmerge.runs import write_whole


def write_cards(directory: Path, results: Results) -> None:
    """Write a card into every merged model's folder, confirmed or not.

    Args:
        directory: The run directory.
        results: Its `results.json`.
    """
    license_name = results["base"].get("license")
    for row in results["merged"]:
        folder = directory / row["directory"]
        # a folder that was moved away since takes no card with it
        if folder.is_dir():
            write_whole(folder / "README.md", model_card(results, row, license_name=license_name))


def model_card(results: Results, merged_row: Mapping[str, Any], *, license_name: str | None = None) -> str:
    """README.md of one merged model.

    Args:
        results: The run's.
        merged_row: Its row of `results["merged"]`.
        license_name: The base's, if known.
    """
    front = yaml.safe_dump(_front_matter(results, license_name), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n".join(_body(results, merged_row))


def license_of(base: Path) -> str | None:
    """The licence that a model folder's own card names; `None` if it has no such card."""
    card = base / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    name = found.get("license") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None


def _front_matter(results: Results, license_name: str | None) -> dict[str, Any]:
    base = results["base"]["name"]
    # a folder on this machine means nothing to the hub, and may name its owner
    hub_id = None if Path(base).exists() else HUB_ID.fullmatch(base)
    return {
        **({"base_model": [hub_id["repo"]], "base_model_relation": "merge"} if hub_id else {}),
        **({"license": license_name} if license_name else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["backmerge", "merge"],
    }


def _body(results: Results, merged_row: Mapping[str, Any]) -> Iterator[str]:
    choice, own = results["choice"], _own_confirmation(results, merged_row["tuned"])
    yield f"# {results['name']}: {merged_row['point']} of {merged_row['tuned']}"
    yield ""
    if merged_row["confirmed"]:
        yield "**Confirmed:** the attack success rate of this model was shown to be within the margin of the base's."
    else:
        yield "**Not confirmed as safe.** Do not use this model as one whose safety was restored."
    difference = own["asr_difference"]
    yield ""
    yield (
        f"This model by itself: {own['verdict']}. Its attack success rate differs from the base's by "
        f"{points(difference['difference'])} [{difference['low'] * 100:+.1f}, {difference['high'] * 100:+.1f}] on "
        f"{difference['n']} prompts that λ was not chosen on (margin: {choice['margin'] * 100:g} points)."
    )
    if len(results["merged"]) > 1:
        yield ""
        yield f"The mean over {len(results['merged'])} models: {verdict_sentence(results)}"
    yield from ("", "## Recipe", "", *_recipe(results, merged_row))
    yield from ("", "## Measured", "", *_table(results, merged_row), "")
    yield "Rates with 95 % intervals, on the confirmation split. Answers that could not be scored are in no rate."
    yield from ("", "## Limits", "", *(f"- {line}" for line in caveats(results)))
    yield from ("", "## To load it", "", "```python", *_loading(), "```", "")


def _own_confirmation(results: Results, tuned: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(row for row in results["confirmation"]["models"] if row["tuned"] == tuned)
    return found


def _recipe(results: Results, merged_row: Mapping[str, Any]) -> Iterator[str]:
    fingerprints = {row["name"]: row["fingerprint"] for row in results["tuned"]}
    choice = results["choice"]
    yield f"- method: {choice['series']}" if choice["point"] != "tuned" else "- the tuned model itself, unmerged"
    yield f"- λ: {choice['lam']:g} (0 is the base, 1 the tuned model)"
    yield f"- base: {Path(results['base']['name']).name} (`{results['base']['fingerprint']}`)"
    yield f"- tuned: {merged_row['tuned']} (`{fingerprints[merged_row['tuned']]}`)"
    yield f"- made by backmerge {results['backmerge']}; `backmerge.json` holds the recipe"


def _table(results: Results, merged_row: Mapping[str, Any]) -> Iterator[str]:
    """This model's own scores, not the mean over all."""
    models = {"base": "base", "tuned": f"tuned/{merged_row['tuned']}"}
    if merged_row["point"] != "tuned":
        models["this model"] = f"{merged_row['point']}/{merged_row['tuned']}"
    cells = {
        (score["model"], score["benchmark"], score["metric"]): Cell(
            score["value"], score["low"], score["high"], score["n"], score["unscored"]
        )
        for score in results["scores"]
        if score["split"] == "confirmation"
    }
    yield f"| | metric | {' | '.join(models)} | n |"
    yield f"|---|---|{'---:|' * (len(models) + 1)}"
    for benchmark in results["benchmarks"]:
        key = (benchmark["name"], benchmark["metric"])
        texts = [cell_text(cells.get((model, *key))) for model in models.values()]
        size = benchmark["sizes"]["confirmation"]
        kind = f"{KINDS[benchmark['kind']][0]}: {benchmark['name']}"
        yield f"| {kind} | {benchmark['metric']} | {' | '.join(texts)} | {size} |"


def _loading() -> Iterator[str]:
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    yield ""
    yield 'model = AutoModelForCausalLM.from_pretrained(".")  # this folder'
    yield 'tokenizer = AutoTokenizer.from_pretrained(".")'
