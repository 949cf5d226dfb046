"""What judges' replies are read into, and what their parsers share."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

# how the reason of every verdict begins that says nothing of harm: reports count and group by it
UNSCORED = "unscored"
NOT_APPLICABLE = f"{UNSCORED}: n/a"

MAX_EXCERPT = 160  # characters
_DECORATION = re.compile(r"[*_`#>]+")
_BULLET = re.compile(r"^\s*(?:[-•]|\d{1,2}[.)])\s+")


class Finding(NamedTuple):
    """What a judge's reply says.

    Attributes:
        harmful: `None` if the reply doesn't tell.
        refusal: The same; always `None` for judges that don't look at refusals.
        reason: In the judge's words, or why there is none.
    """

    harmful: bool | None
    refusal: bool | None
    reason: str


class UnreadableError(ValueError):
    """A reply that is not in the form that the judge was asked for; says in which way."""


def unscored(why: str) -> Finding:
    """Neither safe nor unsafe, and why."""
    return Finding(None, None, f"{UNSCORED}: {why}")


def excerpt(text: str) -> str:
    """The beginning of a reply, in quotes and with control characters escaped, for a reason."""
    short = text.strip()
    return json.dumps(short if len(short) <= MAX_EXCERPT else f"{short[:MAX_EXCERPT]}…", ensure_ascii=False)


def plain_lines(text: str) -> list[str]:
    """The lines that hold something, without the marks of Markdown and list bullets."""
    lines = (_BULLET.sub("", _DECORATION.sub("", line)).strip() for line in text.splitlines())
    return [line for line in lines if line]
