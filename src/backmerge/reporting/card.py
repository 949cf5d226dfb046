"""The model card: README.md next to a merged model's weights, for people and for the hub."""

from __future__ import annotations

from pathlib import Path

import yaml

from backmerge.checkpoints.reader import CARD as RECIPE
from backmerge.outputs import CURVE, EVAL_RESULTS
from backmerge.reporting.card_facts import CardFacts
from backmerge.reporting.card_front import front_matter, registered_results
from backmerge.reporting.card_reading import json_object, license_of, license_terms
from backmerge.reporting.card_text import body
from backmerge.reporting.drawing import as_bytes
from backmerge.reporting.merge_card import write_card
from backmerge.reporting.plots import curves
from backmerge.results import RestoreResults
from backmerge.runs import write_whole

__all__ = ["license_of", "license_terms", "model_card", "write_cards"]


def write_cards(directory: Path, results: RestoreResults) -> None:
    """Write a card into every merged model's folder, confirmed or not, with its curve and the results for the hub.

    Args:
        directory: The run directory.
        results: Its `results.json`.
    """
    file = directory / "experiment.yaml"
    experiment = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    # one figure for all cards
    curve = as_bytes(curves(results), "png") if results.merged and results.benchmarks else None
    for row in results.merged:
        folder = directory / row.directory
        # the user may have moved the folder away
        if folder.is_dir():
            fingerprint = json_object(folder / RECIPE).get("fingerprint")
            if curve is not None:
                write_whole(folder / CURVE, curve)
            facts = CardFacts(
                results,
                row,
                experiment=experiment if isinstance(experiment, dict) else {},
                fingerprint=fingerprint if isinstance(fingerprint, str) else None,
                files=frozenset(file.name for file in folder.iterdir()),
            )
            write_card(folder, model_card(facts))
            if entries := registered_results(facts):
                text = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=10**6)
                write_whole(folder / EVAL_RESULTS, text)


def model_card(facts: CardFacts) -> str:
    """Return README.md of one merged model."""
    front = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True, width=10**6)
    return f"---\n{front}---\n\n" + "\n".join(body(facts)) + "\n"
