"""Tables as Markdown, for GitHub, the hub and documentation; whatever stands in them stays text."""

from __future__ import annotations

from collections.abc import Iterator

from backmerge.reporting.page import visible
from backmerge.reporting.tables import Column, Table, text_of

# by backslash what every Markdown knows so; the others by entity, as not all take a backslash before them
_ESCAPES = str.maketrans(
    {**{sign: f"\\{sign}" for sign in "\\`*_{}[]()#!"}, **{sign: f"&#{ord(sign)};" for sign in "&<>|$~@"}}
)


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no markup, cell, formula, mention or link comes of it."""
    plain = " ".join(visible(text).split()).translate(_ESCAPES)
    # addresses become links without any sign around them
    return plain.replace("://", "&#58;//").replace("www.", "www&#46;")


def as_markdown(table: Table) -> str:
    """The table with its caption before it and its notes behind."""
    return "\n".join(_lines(table)) + "\n"


def _lines(table: Table) -> Iterator[str]:
    yield escaped(table.caption)
    yield ""
    yield _row([_heading(column) for column in table.columns])
    yield _row([":---" if column.kind == "text" else "---:" for column in table.columns])
    for row in table.rows:
        yield _row([escaped(text_of(entry)) for entry in row])
    if table.notes:
        yield ""
        yield from (f"- {escaped(note)}" for note in table.notes)


def _heading(column: Column) -> str:
    return escaped(f"{column.group}: {column.heading}" if column.group else column.heading)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
