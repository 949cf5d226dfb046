"""The code blocks of a Markdown page, with what the page says of running them.

A block is left out of a run by a comment right before it that gives the reason: `<!-- not run: needs a GPU -->`. What
can be checked of it without running it, such as its options, is checked all the same.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
_NOT_RUN = re.compile(r"<!--\s*not run:(?P<reason>.*?)-->", re.DOTALL)
_TITLE = re.compile(r'title="(?P<title>[^"]+)"')


class Block(NamedTuple):
    """One block of code.

    Attributes:
        line: Where its text begins, counted from 1.
        language: The fence's; of an indented block, `python` where it is Python, else `sh`.
        text: Without the fence.
        title: The file that the block is the text of.
        reason: Why it isn't run; `None` where it is.
    """

    line: int
    language: str
    text: str
    title: str | None = None
    reason: str | None = None


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page in their order, fenced and indented ones."""
    return list(_blocks(page.read_text(encoding="utf-8")))


def _blocks(markdown: str) -> Iterator[Block]:
    reason = None
    for token in MarkdownIt("commonmark").parse(markdown):
        if token.type == "html_block":
            found = _NOT_RUN.search(token.content)
            reason = found["reason"].strip() if found else None
            continue
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            language, _, rest = token.info.strip().partition(" ")
            title = _TITLE.search(rest)
            is_fenced = token.type == "fence"
            yield Block(
                token.map[0] + 1 + is_fenced,
                language if is_fenced else _guessed(token.content),
                token.content,
                title["title"] if title else None,
                reason,
            )
        if token.block and token.nesting >= 0:
            reason = None


def _guessed(text: str) -> str:
    try:
        ast.parse(text)
    except SyntaxError:
        return "sh"
    return "python"
