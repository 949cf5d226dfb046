"""Write tables as Markdown, for GitHub, the hub and documentation; all content remains text."""

from __future__ import annotations

import re
from collections.abc import Iterator

from backmerge.reporting.page import visible
from backmerge.reporting.tables import Column, Table, text_of

# Characters that every Markdown escapes by backslash, the others by entity. Inside a word _ is not emphasis; (, ) and !
# mean something only next to [ and ]; before a plain number, as in linear@0.3, @ makes neither a mention nor an
# address.
_SIGN = re.compile(r"(?<=\])\(|[\\`*{}\[\]#&<>|$~]|(?<![^\W_])_|_(?![^\W_])|(?<!\w)@|@(?!\d+(?:\.\d+)?(?![\w.-]))")
_BY_ENTITY = frozenset("&<>|$~@")


def escaped(text: str) -> str:
    """Return text that Markdown shows unchanged, on one line: no markup, cell, formula, mention or link."""
    plain = _SIGN.sub(_escape, " ".join(visible(text).split()))
    # addresses become links even without markup
    return plain.replace("://", "&#58;//").replace("www.", "www&#46;")


def _escape(sign: re.Match[str]) -> str:
    return f"&#{ord(sign[0])};" if sign[0] in _BY_ENTITY else f"\\{sign[0]}"


def as_markdown(table: Table) -> str:
    """Return the table with its caption before it and its notes after it."""
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
