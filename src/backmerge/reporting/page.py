"""Pages that need nothing but themselves: templates that escape every value, and a script that is held to its hash."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import unicodedata
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from backmerge.reporting import findings
from backmerge.reporting.explained import counted

if TYPE_CHECKING:
    from jinja2 import Environment

# marks that turn the direction of the text around them, and halves of signs, which no encoding takes
_TURNING = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# what could end a script element, open a comment in it, or break a line where JavaScript sees one
_UNSAFE = {character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


class Script(NamedTuple):
    """A script that is in a page.

    Attributes:
        text: What is run.
        policy: The source that a content security policy names for it, so that it runs and nothing else does.
    """

    text: str
    policy: str


def environment() -> Environment:
    """Templates in which every value is escaped, and rid of what could disturb the page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("backmerge.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": findings.percent,
        "points": findings.points,
        "counted": counted,
        "lam": findings.lam_text,
    }
    # a number stays on one line with its sign of percent
    made.filters["unbroken"] = lambda sentence: sentence.replace(" %", "\u00a0%")
    made.globals["metric_names"] = findings.METRIC_NAMES
    return made


def script(name: str) -> Script:
    """A script of this package, with the hash of its bytes."""
    text = files("backmerge.reporting").joinpath(name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Script(text, f"'sha256-{digest}'")


def embedded(value: Any) -> str:
    """Plain data as JSON that may be in a script element: no `<`, whoever wrote the words in it.

    Texts are made visible, as elsewhere on the page.
    """
    text = json.dumps(_visible_within(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return "".join(_UNSAFE.get(character, character) for character in text)


def _visible_within(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible(key): _visible_within(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_visible_within(inner) for inner in value]
    return value


def visible(text: str) -> str:
    """Text with its control characters as signs that can be seen, and nothing that turns the direction of others."""
    kept = "".join(_as_sign(character) for character in text)
    return _TURNING.sub("\ufffd", kept)


def _as_sign(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cs":
        return "\ufffd"
    if category != "Cc" or character in "\n\t":
        return character
    # the block of control pictures has one for each below the space, and one for delete
    return {"\x7f": "\u2421"}.get(character, chr(0x2400 + ord(character)) if character < " " else "\ufffd")
