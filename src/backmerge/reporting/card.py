"""The model card: README.md beside a merged model's weights, for people and for the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from backmerge.checkpoints.reader import CARD as RECIPE
from backmerge.reporting.card_facts import CardFacts
from backmerge.reporting.card_front import front_matter
from backmerge.reporting.card_reading import json_object, license_of, license_terms
from backmerge.reporting.card_text import body
from backmerge.reporting.markdown import escaped
from backmerge.results import RestoreResults
from backmerge.runs import write_whole

if TYPE_CHECKING:
    from backmerge.checkpoints.reader import Weights
    from backmerge.merging.recipe import Variant

__all__ = ["license_of", "license_terms", "model_card", "unmeasured_card", "write_cards"]


def write_cards(directory: Path, results: RestoreResults) -> None:
    """Write a card into every merged model's folder, confirmed or not.

    Args:
        directory: The run directory.
        results: Its `results.json`.
    """
    file = directory / "experiment.yaml"
    experiment = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    for row in results.merged:
        folder = directory / row.directory
        # a folder that was moved away since takes no card with it
        if folder.is_dir():
            fingerprint = json_object(folder / RECIPE).get("fingerprint")
            facts = CardFacts(
                results,
                row,
                experiment=experiment if isinstance(experiment, dict) else {},
                fingerprint=fingerprint if isinstance(fingerprint, str) else None,
                files=frozenset(file.name for file in folder.iterdir()),
            )
            write_whole(folder / "README.md", model_card(facts))


def unmeasured_card(name: str, variant: Variant, *, is_adapter: bool) -> str:
    """Return README.md of a merge that was made without measuring it."""
    base, *tuned = (_known_as(weights) for weights in (variant.base, *variant.tuned_models))
    on_hub = [model for model in (base, *tuned) if "/" in model]
    front: dict[str, Any] = {
        **({"base_model": base if is_adapter else on_hub} if "/" in base else {}),
        **({"base_model_relation": "adapter" if is_adapter else "merge"} if "/" in base else {}),
        **license_terms(variant.base.directory),
        "library_name": "peft" if is_adapter else "transformers",
        "tags": ["backmerge", "merge", *(["lora"] if is_adapter else [])],
    }
    lines = [
        f"# {escaped(name)}",
        "",
        "A fine-tuned model merged back with its base by backmerge.",
        "",
        f"- base: {escaped(base)}",
        f"- tuned: {', '.join(map(escaped, tuned))}",
        *(f"- {escaped(kind)}: {escaped(_known_as(weights))}" for kind, weights in variant.extra.items()),
        f"- method: {escaped(variant.method.name)}",
        *([f"- λ, the share of the tuned side: {escaped(str(variant.lam))}"] if variant.method.has_lam else []),
        *(f"- {escaped(key)}: {escaped(str(value))}" for key, value in variant.parameters.items()),
        "",
        "Its safety was not measured. `backmerge check` compares it with its base; `backmerge restore` chooses λ by "
        "measuring safety and utility.",
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n" + "\n".join(lines) + "\n"


def _known_as(weights: Weights) -> str:
    """Return the hub's name of a model out of its cache, and of any other its folder's name."""
    folder = weights.directory
    cached = folder.parent.parent.name
    return cached.removeprefix("models--").replace("--", "/") if cached.startswith("models--") else folder.name


def model_card(facts: CardFacts) -> str:
    """README.md of one merged model."""
    front = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True, width=10**6)
    return f"---\n{front}---\n\n" + "\n".join(body(facts)) + "\n"
