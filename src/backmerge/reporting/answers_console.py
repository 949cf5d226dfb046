"""Answers of several models next to each other on a terminal, or one below the other as plain text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

NARROWEST = 26  # columns of a terminal that an answer can be read in
COLOURS = ("green", "red", "blue")
# a terminal's commands: CSI … letter; OSC, DCS and the like … BEL or ST; two-character escapes. One without an end goes
# by its beginning alone: what follows it is text to a reader
ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-~]|\x9b[0-?]*[ -/]*[@-~]"
)
JOINERS = frozenset("\u200c\u200d")  # scripts and emoji need them; other format characters turn text around, or hide it


class Column(NamedTuple):
    """One model's answer.

    Attributes:
        heading: Whose.
        text: As the model wrote it.
        is_finished: Whether it ended by itself.
        thought: What it thought first; of it the length is shown alone.
    """

    heading: str
    text: str
    is_finished: bool
    thought: str = ""


def plain_text(text: str) -> str:
    r"""What a model wrote, without what moves a terminal's cursor, recolours it, turns text around or hides it.

    >>> plain_text("\x1b[31mred\x1b[0m\r\nnext\u202e")
    'red\nnext'
    """
    text = ESCAPES.sub("", text).replace("\r\n", "\n").replace("\u2028", "\n").replace("\u2029", "\n").expandtabs(4)
    return "".join(c for c in text if c == "\n" or c in JOINERS or not unicodedata.category(c).startswith("C"))


def print_answers(console: Console, columns: Sequence[Column]) -> None:
    """Side by side where each has 26 columns at least, else in frames below each other; plain where no terminal is."""
    if not console.is_terminal:
        for column in columns:
            console.print(Text(f"[{column.heading}]"), soft_wrap=True)
            console.print(Text(_shown(column)), soft_wrap=True)
        return
    if console.width < NARROWEST * len(columns):
        for column, colour in zip(columns, COLOURS, strict=False):
            console.print(Panel(Text(_shown(column)), title=Text(column.heading, style="bold"), border_style=colour))
        return
    table = Table(expand=True, show_lines=False)
    for column, colour in zip(columns, COLOURS, strict=False):
        table.add_column(Text(column.heading, style=f"bold {colour}"), ratio=1, overflow="fold")
    table.add_row(*(Text(_shown(column)) for column in columns))
    console.print(table)


def _shown(column: Column) -> str:
    text = plain_text(column.text).strip("\n") or "(nothing)"
    thought = f"(thought first: {len(column.thought.split()):,} words)\n" if column.thought else ""
    return thought + (text if column.is_finished else f"{text} …")
