"""Make self-contained pages: templates that escape every value, and scripts that run only with the right hash."""

from __future__ import annotations

import base64
import functools
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

# characters that change the direction of the surrounding text, and lone surrogates, which cannot be encoded
_TURNING = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# characters that could end a script element, open a comment in it, or break a line in JavaScript
_UNSAFE = {character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


class Script(NamedTuple):
    """A script in a page.

    Attributes:
        text: The script.
        policy: Its source for the content security policy, which permits this script and no other.
    """

    text: str
    policy: str


@functools.cache
def environment() -> Environment:
    """Return templates that escape every value and remove what could disturb the page's text."""
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
    # a non-breaking space keeps a number and its percent sign on one line
    made.filters["unbroken"] = lambda sentence: sentence.replace(" %", "\u00a0%")
    made.globals["metric_names"] = findings.METRIC_NAMES
    return made


def script(name: str) -> Script:
    """Return a script of this package, with the hash of its bytes."""
    text = files("backmerge.reporting").joinpath(name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Script(text, f"'sha256-{digest}'")


def embedded(value: Any) -> str:
    """Return plain data as JSON for a script element: without `<`, whoever wrote the text in it.

    Control characters in it are made visible, as elsewhere on the page.
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
    """Return text with control characters as visible symbols, without characters that change the direction."""
    kept = "".join(_as_sign(character) for character in text)
    return _TURNING.sub("\ufffd", kept)


def _as_sign(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cs":
        return "\ufffd"
    if category != "Cc" or character in "\n\t":
        return character
    # the block of control pictures has one for each character below the space, and one for delete
    return {"\x7f": "\u2421"}.get(character, chr(0x2400 + ord(character)) if character < " " else "\ufffd")
