"""Read what is in a model's folder next to its weights: its card's front matter, its licence, its JSON files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

LICENSE_KEYS = ("license", "license_name", "license_link")  # the hub's names
# as the hub finds it: between two lines of dashes, the first of which starts the file
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(?P<front>.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def front_of(card: Path) -> Mapping[str, Any]:
    """Return the front matter of a card; empty if there is none or it cannot be read."""
    if not card.is_file():
        return {}
    match = _FRONT.match(card.read_text(encoding="utf-8", errors="replace"))
    try:
        found = yaml.safe_load(match["front"]) if match else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def license_of(base: Path) -> str | None:
    """Return the licence that a model folder's card names; `None` without such a card."""
    return license_terms(base).get("license")


def license_terms(base: Path) -> dict[str, str]:
    """Return the licence that a model folder's card names, by the hub's keys.

    `license` and, for a licence without a name on the hub (`other`), its `license_name` and `license_link`; empty if
    there is no card, or it names none.
    """
    front = front_of(base / "README.md")
    terms = {key: front[key] for key in LICENSE_KEYS if isinstance(front.get(key), str)}
    return terms if "license" in terms else {}


def json_object(file: Path) -> Mapping[str, Any]:
    """Return a JSON object; empty if there is none or it cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
