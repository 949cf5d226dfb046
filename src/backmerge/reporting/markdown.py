"""Tables as Markdown, for GitHub, the hub and documentation; whatever is in them stays text."""

from __future__ import annotations

import re
from collections.abc import Iterator

from backmerge.reporting.page import visible
from backmerge.reporting.tables import Column, Table, text_of

# By backslash what every Markdown knows so, the others by entity. Within a word _ is no emphasis; (, ) and ! mean
# something next to [ and ] only; before a plain number, as in linear@0.3, @ makes neither a mention nor an address.
_SIGN = re.compile(r"(?<=\])\(|[\\`*{}\[\]#&<>|$~]|(?<![^\W_])_|_(?![^\W_])|(?<!\w)@|@(?!\d+(?:\.\d+)?(?![\w.-]))")
_BY_ENTITY = frozenset("&<>|$~@")


def escaped(text: str) -> str:
    """Return text that Markdown shows as it is, on one line: no markup, cell, formula, mention or link comes of it."""
    plain = _SIGN.sub(_escape, " ".join(visible(text).split()))
    # addresses become links without any sign around them
    return plain.replace("://", "&#58;//").replace("www.", "www&#46;")


def _escape(sign: re.Match[str]) -> str:
    return f"&#{ord(sign[0])};" if sign[0] in _BY_ENTITY else f"\\{sign[0]}"


def as_markdown(table: Table) -> str:
    """The table with its caption before it and its notes behind."""
    return "\n".join(_lines(table)) + "\n"


def _lines(table: Table) -> Iterator[str]:
    yield escaped(table.caption)
    yield ""
    yield _row([_heading(column) for column in table.columns])
    yield _row([":---" if column.kind == "text" else "---:" for column in table.columns])
    for row in table.rows:
        yield _row([escaped(text_of(entry, column.kind)) for column, entry in zip(table.columns, row, strict=True)])
    if table.notes:
        yield ""
        yield from (f"- {escaped(note)}" for note in table.notes)


def _heading(column: Column) -> str:
    return escaped(f"{column.group}: {column.heading}" if column.group else column.heading)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
