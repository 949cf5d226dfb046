"""LaTeX: what stands in a table is set as text, whoever chose the words."""

from __future__ import annotations

import re
import shutil
import string
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge.records import Estimate
from backmerge.reporting.latex import as_latex, escaped
from backmerge.reporting.tables import Column, Table

HOSTILE = (
    r"\input{/etc/passwd}",
    "$x^2$ & a_b # c % d ~ {e} \\\\",
    "[1pt] at the start of a row",
    "*",
    "?` !` -- --- '' `` ,, << >> \" | < >",
    r"^^5cend{tabular}\end{table}",
    "%",
    "\x00\x1b\u202e\ue000%\ue000}\n\n\\par",
    string.printable,
)
# the commands that escaping makes, and what they set
SET = {
    r"\textbackslash{}": "\\",
    r"\textasciitilde{}": "~",
    r"\textasciicircum{}": "^",
    r"\textasciigrave{}": "`",
    r"\textless{}": "<",
    r"\textgreater{}": ">",
    r"\textbar{}": "|",
    r"{\char34}": '"',
    "{[}": "[",
    "{*}": "*",
    **{f"\\{sign}": sign for sign in "&%$#_{}"},
    "{}": "",
}
PARTS = re.compile("|".join(re.escape(part) for part in sorted(SET, key=len, reverse=True)))
NEEDS_TEX = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")


def as_set(source: str) -> str:
    """What LaTeX shows of escaped ASCII; fails on any sign with a meaning that escaping did not put there."""
    bare = PARTS.sub("", source)
    assert not set(bare) & set('\\{}$&#^_~%"<>|`['), bare
    # signs that would join to one are kept apart
    assert not re.search(r"--|''|,,", bare.replace("{}", " ")) or "{}" in source
    return PARTS.sub(lambda part: SET[part[0]], source)


def lines_of(source: str) -> list[str]:
    """The rows of the tabular, headings included."""
    inside = source[source.index("\\toprule") : source.index("\\bottomrule")]
    return [line.removesuffix(r" \\") for line in inside.splitlines() if line.endswith(r"\\")]


def cells_of(row: str) -> list[str]:
    """A row at its ampersands, those in words apart."""
    return re.split(r"(?<!\\)&", row)


def hostile_table() -> Table:
    """Words from elsewhere in every place that takes any."""
    columns = [Column("a", HOSTILE[0]), Column("b", HOSTILE[1], "share", HOSTILE[2]), Column("c", "λ", "gap")]
    cell, gap = Estimate(0.5, 0.4, 0.6, 10, unscored=1), Estimate(0.1, 0.0, 0.2, 10)
    return Table("a table_%", HOSTILE[1], columns, [[[words, cell, gap] for words in HOSTILE]], HOSTILE)


@given(st.text(st.sampled_from(string.printable), max_size=60))
def test_escaped_text_is_set_as_it_was(text: str) -> None:
    """No sign of ASCII has a meaning left, and each is what is set; white space is one space."""
    kept = "".join(sign for sign in text if sign.isprintable() or sign in "\n\t")
    if kept == text:
        assert as_set(escaped(text)) == " ".join(text.split())


@given(st.text(max_size=60))
def test_braces_are_balanced_in_any_text(text: str) -> None:
    """Whatever stands in it, a text opens and closes as many groups, and never closes one that is not its own."""
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", escaped(text).replace(r"\textbackslash", "")):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    assert "\n" not in escaped(text)


def test_signs_that_would_join_stay_apart() -> None:
    """Two hyphens are two hyphens, while our own dashes, λ and ± are set as such."""
    assert escaped("a--b---c ''x'' ,,") == "a-{}-b-{}-{}-c '{}'x'{}' ,{},"
    # what keeps them apart is ours: the same sign in a text is shown to have been there
    assert escaped("-\ue000-") == "-?-"
    assert escaped("– λ ± ×") == r"-- $\lambda$ $\pm$ $\times$"


def test_a_row_cannot_start_as_a_part_of_the_line_before() -> None:
    """After a line's end, a bracket would be its spacing and an asterisk its own."""
    source = as_latex(hostile_table())
    starts = [line.lstrip()[0] for line in lines_of(source) if line.strip()]
    assert not set(starts) & set("[*")


def test_every_row_has_its_cells() -> None:
    """No word makes a cell more or less, and no comment swallows one."""
    rows = lines_of(as_latex(hostile_table()))
    assert [len(cells_of(row)) for row in rows] == [3] * (2 + len(HOSTILE))
    assert [as_set(cells_of(row)[0].strip()) for row in rows[2:4]] == [HOSTILE[0], HOSTILE[1]]


def test_a_table_by_hand() -> None:
    """Rules, headings over neighbours, and numbers with small intervals."""
    columns = [Column("r", "run"), Column("b", "base", "share", "score"), Column("t", "tuned", "share", "score")]
    table = Table(
        "one",
        "A title",
        columns,
        [[["a_1", Estimate(0.5, 0.4, 0.6, 9), None]], [["b", None, None]]],
        ["A note."],
    )
    assert as_latex(table) == "\n".join(
        [
            r"% needs \usepackage{booktabs} and \usepackage{graphicx}; made by backmerge",
            r"\begin{table}",
            r"\centering",
            r"\caption{A title}",
            r"\label{tab:one}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            r"\begin{tabular}{lrr}",
            r"\toprule",
            r" & \multicolumn{2}{c}{score} \\",
            r"\cmidrule(lr){2-3}",
            r"run & \multicolumn{1}{c}{base} & \multicolumn{1}{c}{tuned} \\",
            r"\midrule",
            r"a\_1 & 50.0 {\scriptsize {[}40.0, 60.0]} & -- \\",
            r"\midrule",
            r"b & -- & -- \\",
            r"\bottomrule",
            r"\end{tabular}}",
            r"\par\medskip",
            r"\parbox{\linewidth}{\footnotesize",
            r"A note.\par",
            "}",
            r"\end{table}",
            "",
        ]
    )


@NEEDS_TEX
def test_latex_takes_it(tmp_path: Path) -> None:
    """A document with hostile tables in it is set without an error, and nothing of another file is in it."""
    (tmp_path / "table.tex").write_text(as_latex(hostile_table()), encoding="utf-8")
    (tmp_path / "all.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\usepackage{graphicx}\n"
        "\\begin{document}\\input{table}\\end{document}\n"
    )
    done = subprocess.run(
        ["pdflatex", "-draftmode", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "all.tex"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    assert b"passwd" not in (tmp_path / "all.aux").read_bytes()
