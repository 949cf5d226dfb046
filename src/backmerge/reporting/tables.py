"""Describe tables of figures with their intervals, and write them as CSV; Markdown and LaTeX have other modules."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from backmerge.records import Estimate

NOTHING = "–"  # not measured

# shares and levels are in percent, gaps in percentage points, numbers as short as possible
ColumnKind = Literal["text", "number", "share", "level", "gap"]
FIELDS = {
    "share": ("low", "high", "spread", "n", "unscored", "num_models", "covers"),
    "level": ("low", "high"),
    "gap": ("low", "high", "spread", "n", "covers"),
}


class Named(NamedTuple):
    """A name for programs, and the words for people."""

    name: str
    words: str


Entry = str | float | Named | Estimate | None


class Column(NamedTuple):
    """A column.

    Attributes:
        name: Its name in the CSV; the numbers that belong to a share or a gap have it as their prefix.
        heading: For people.
        kind: The kind of its entries; any kind may also have text.
        group: A heading above neighbouring columns.
    """

    name: str
    heading: str
    kind: ColumnKind = "text"
    group: str = ""


class Shown(NamedTuple):
    """An entry in readable form: `12.3`, `[10.1, 14.5]`, `3 unscored`; all but the first may be empty."""

    value: str
    interval: str = ""
    remark: str = ""


class Table(NamedTuple):
    """A table.

    Attributes:
        name: Name of its files.
        caption: What it shows.
        columns: In their order.
        blocks: Rows, in groups separated by a rule.
        notes: What a reader must know about it.
    """

    name: str
    caption: str
    columns: Sequence[Column]
    blocks: Sequence[Sequence[Sequence[Entry]]]
    notes: Sequence[str] = ()

    @property
    def rows(self) -> list[Sequence[Entry]]:
        """Return all rows."""
        return [row for block in self.blocks for row in block]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Return headings above neighbours, with the number of columns of each; empty if no column has one."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and column.group and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return spans if any(column.group for column in self.columns) else []


def shown(entry: Entry, kind: ColumnKind = "share") -> Shown:
    """Return an entry in readable form: shares in percent, gaps in points with their sign."""
    if isinstance(entry, Named):
        return Shown(entry.words)
    if isinstance(entry, str):
        return Shown(entry)
    if isinstance(entry, (int, float)):
        return Shown(f"{entry:.3g}")
    if entry is None or entry.value is None:
        return Shown(NOTHING)
    sign = "+" if kind == "gap" else ""
    return Shown(
        f"{entry.value * 100:{sign}.1f}{_spread(entry.spread)}",
        f"[{entry.low * 100:{sign}.1f}, {entry.high * 100:{sign}.1f}]",
        f"{entry.unscored} unscored" if entry.unscored else "",
    )


def _spread(spread: float | None) -> str:
    return "" if spread is None else f" ± {spread * 100:.1f}"


def text_of(entry: Entry, kind: ColumnKind = "share") -> str:
    """Return an entry on one line: `12.3 [10.1, 14.5] (3 unscored)`."""
    value, interval, remark = shown(entry, kind)
    return " ".join(filter(None, (value, interval, remark and f"({remark})")))


def csv_rows(table: Table) -> list[dict[str, Any]]:
    """Return the table as flat rows with one number per field, not rounded; `None` if there is none."""
    header: list[str] = []
    for name in _header(table.columns):
        header.append(_new(name, header))
    return [dict(zip(header, _fields(table.columns, row), strict=True)) for row in table.rows]


def _header(columns: Sequence[Column]) -> Iterator[str]:
    for column in columns:
        yield column.name
        yield from (f"{column.name}_{field}" for field in FIELDS.get(column.kind, ()))


def _new(name: str, known: Sequence[str]) -> str:
    """Return the name, or a variant of it if a column (or a part of one) already has that name."""
    return name if name not in known else _new(f"{name}_", known)


def _fields(columns: Sequence[Column], row: Sequence[Entry]) -> Iterator[Any]:
    for column, entry in zip(columns, row, strict=True):
        if column.kind in FIELDS:
            # words instead of figures, such as the reason why there are none, are for people
            figures = entry if isinstance(entry, Estimate) else None
            yield None if figures is None else figures.value
            yield from (None if figures is None else getattr(figures, field) for field in FIELDS[column.kind])
        else:
            yield entry.name if isinstance(entry, Named) else entry


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with the same keys as CSV with a header; `None` is an empty field.

    Floats are written by `repr`, so that reading them gives the same numbers.
    """
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
