"""Markdown: a reader sees the words that were written, and nothing comes of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from backmerge.records import Estimate
from backmerge.reporting.markdown import as_markdown, escaped
from backmerge.reporting.tables import Column, Table

HOSTILE = (
    "a|b||c",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "[a](javascript:alert(1)) ![b](http://x.y/z) [c]: d",
    "**bold** _it_ ~~gone~~ `code` ``",
    "$x$ \\(y\\) \\ @someone #12 &amp; &#60;",
    "https://evil.example www.evil.example mail@evil.example",
    "line\nline\n\n| x |",
    "# title",
    "- item",
    "\\| \\\\|",
)
PLAIN = {"text", "softbreak"}


def parsed(source: str) -> list[Token]:
    """A Markdown text with tables and links, as GitHub reads it."""
    return MarkdownIt("commonmark", {"linkify": False, "html": True}).enable(["table", "strikethrough"]).parse(source)


def texts_of(source: str) -> list[str]:
    """What a reader sees of each cell, paragraph and item; fails where there is anything but text."""
    found = []
    for token in parsed(source):
        assert token.type not in {"html_block", "fence", "code_block", "heading_open"}, token
        if token.type == "inline":
            assert {child.type for child in token.children or ()} <= PLAIN | {"text_special"}, token
            found.append("".join(child.content for child in token.children or ()))
    return found


@given(st.text(max_size=50) | st.text(st.sampled_from("\\`*_{}[]()#+-.!|<>&~$@ ab\n"), max_size=50))
def test_a_cell_shows_its_words(text: str) -> None:
    """Any text in a cell comes out as that text on one line, in one cell."""
    table = Table("t", "caption", [Column("a", "a"), Column("b", "b")], [[[text, "end"]]])
    shown = texts_of(as_markdown(table))
    assert shown[:3] == ["caption", "a", "b"]
    assert len(shown) == 5
    assert shown[4] == "end"
    # control signs are made visible first
    if text.isprintable() or set(text) <= set("\n "):
        assert shown[3] == " ".join(text.split())


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_words_are_words_everywhere(words: str) -> None:
    """In caption, headings, cells and notes."""
    columns = [Column("a", words), Column("b", "b", "share", words)]
    table = Table("t", f"Title: {words}", columns, [[[words, Estimate(0.5, 0.4, 0.6, 10)]]], [f"Note: {words}"])
    once = " ".join(words.split())
    assert "<" not in as_markdown(table)
    assert texts_of(as_markdown(table)) == [
        f"Title: {once}",
        once,
        f"{once}: b",
        once,
        "50.0 [40.0, 60.0]",
        f"Note: {once}",
    ]


def test_addresses_and_mentions_become_no_links() -> None:
    """What GitHub links without any mark-up is broken for it, and reads the same."""
    source = escaped("see https://evil.example, www.evil.example, @someone and a@b.c")
    for sign in ("://", "www.", "@"):
        assert sign not in source


def test_names_and_plain_text_need_no_escapes() -> None:
    """Names of recipes, rates and brackets are readable in the source as well."""
    for text in ("linear@0.3/seed-42", "model_stock", "AdvBench (harmful requests): 3.1 % [0.9, 7.6]!", "dare_ties@1"):
        assert escaped(text).replace("\\[", "[").replace("\\]", "]") == text
