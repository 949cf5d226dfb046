"""Write the card of a merge that was not measured. `merge` uses it, so it imports no statistics and no plots."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from backmerge.merging.rounding import survival
from backmerge.merging.served import served_dtype
from backmerge.outputs import CARD, is_own_card, sealed_card
from backmerge.progress import say
from backmerge.reporting.card_reading import license_terms
from backmerge.runs import write_whole

if TYPE_CHECKING:
    from backmerge.checkpoints.reader import Weights
    from backmerge.merging.recipe import Variant


def write_card(folder: Path, text: str) -> None:
    """Write README.md into a model's folder; one that a user edited is kept under another name."""
    file = folder / CARD
    if file.exists() and not is_own_card(file):
        kept = next(name for n in itertools.count(1) if not (name := folder / f"README.earlier-{n}.md").exists())
        file.rename(kept)
        say(f"{file} was edited, or is from an earlier version: it is kept as {kept.name}, and a new one is written.")
    write_whole(file, sealed_card(text))


def unmeasured_card(name: str, variant: Variant, *, is_adapter: bool, rounding_loss: float | None = None) -> str:
    """Return README.md of a merge that was made without measuring it.

    Args:
        name: The merge's name.
        variant: Its recipe.
        is_adapter: Whether an adapter was written, rather than a checkpoint.
        rounding_loss: The share of the change that was lost by rounding to the checkpoint's dtype, if known.
    """
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
        f"# {_shown(name)}",
        "",
        "A fine-tuned model merged back with its base by backmerge.",
        "",
        f"- base: {_shown(base)}",
        f"- tuned: {', '.join(map(_shown, tuned))}",
        *(f"- {_shown(kind)}: {_shown(_known_as(weights))}" for kind, weights in variant.extra.items()),
        f"- method: {_shown(variant.method.name)}",
        *([f"- λ, the share of the tuned side: {_shown(str(variant.lam))}"] if variant.method.has_lam else []),
        *(f"- {_shown(key)}: {_shown(str(value))}" for key, value in variant.parameters.items()),
        *([] if rounding_loss is None else [f"- rounding: {survival(rounding_loss, served_dtype(variant))}"]),
        "",
        "Its safety was not measured. `backmerge check` compares it with its base; `backmerge restore` chooses λ by "
        "measuring safety and utility.",
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n" + "\n".join(lines) + "\n"


def _known_as(weights: Weights) -> str:
    """Return a model's hub name if it is in the hub's cache, otherwise its folder's name."""
    folder = weights.directory
    cached = folder.parent.parent.name
    return cached.removeprefix("models--").replace("--", "/") if cached.startswith("models--") else folder.name


def _shown(text: str) -> str:
    """Return text as a code span, in which nothing is markup."""
    plain = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return f"`{plain.replace('`', chr(39))}`"
