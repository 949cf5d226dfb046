"""The model card: README.md beside a merged model's weights, for people and for the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from backmerge.checkpoints.reader import CARD as RECIPE
from backmerge.reporting.card_facts import CardFacts
from backmerge.reporting.card_front import front_matter
from backmerge.reporting.card_text import body
from backmerge.reporting.findings import Results
from backmerge.runs import write_whole

LICENSE_KEYS = ("license", "license_name", "license_link")  # as the hub calls them


def write_cards(directory: Path, results: Results) -> None:
    """Write a card into every merged model's folder, confirmed or not.

    Args:
        directory: The run directory.
        results: Its `results.json`.
    """
    file = directory / "experiment.yaml"
    found = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    experiment = found if isinstance(found, dict) else {}
    for row in results["merged"]:
        folder = directory / row["directory"]
        # a folder that was moved away since takes no card with it
        if folder.is_dir():
            facts = CardFacts(
                results,
                row,
                experiment,
                fingerprint=_fingerprint(folder),
                is_adapter=(folder / "adapter_config.json").is_file(),
                files=frozenset(file.name for file in folder.iterdir()),
            )
            write_whole(folder / "README.md", model_card(facts))


def model_card(facts: CardFacts) -> str:
    """README.md of one merged model."""
    front = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True, width=10**6)
    return f"---\n{front}---\n\n" + "\n".join(body(facts)) + "\n"


def license_of(base: Path) -> str | None:
    """The licence that a model folder's own card names; `None` if it has no such card."""
    return license_terms(base).get("license")


def license_terms(base: Path) -> dict[str, str]:
    """The licence that a model folder's own card names, by the hub's keys.

    `license`, and for one that the hub has no name for (`other`) its `license_name` and `license_link`; empty if there
    is no card or it names none.
    """
    found = front_of(base / "README.md")
    terms = {key: found[key] for key in LICENSE_KEYS if isinstance(found.get(key), str) and found[key].strip()}
    return terms if "license" in terms else {}


def front_of(card: Path) -> Mapping[str, Any]:
    """The front matter of a card; empty if there is none that can be read."""
    if not card.is_file():
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").removeprefix("\ufeff").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _fingerprint(folder: Path) -> str | None:
    """Of the weights, as they were written."""
    found = front_of_json(folder / RECIPE).get("fingerprint")
    return found if isinstance(found, str) else None


def front_of_json(file: Path) -> Mapping[str, Any]:
    """A JSON object; empty if there is none that can be read."""
    import json

    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
