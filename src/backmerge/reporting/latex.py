"""Tables as LaTeX with booktabs; whatever is in them stays text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from backmerge.reporting.page import visible
from backmerge.reporting.tables import Column, ColumnKind, Entry, Table, shown

WIDE = 8  # columns, from which on a table goes over both columns of a page that has two

_APART = "\ue000"  # stands between signs that would join to one; of no script, so that nobody misses it
_ESCAPES = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "`": r"\textasciigrave{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"{\char34}",
        # at the start of a row they would belong to the command before it
        "[": "{[}",
        "*": "{*}",
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        _APART: "{}",
        "–": "--",
        "—": "---",
        "±": r"$\pm$",
        "×": r"$\times$",
        "→": r"$\rightarrow$",
        "λ": r"$\lambda$",
        # signs that stand for what cannot be shown, which fonts of LaTeX lack
        "\ufffd": "?",
        **{chr(code): "?" for code in range(0x2400, 0x2422)},
    }
)


def escaped(text: str) -> str:
    """Text that LaTeX sets as it is, on one line: no command, cell, comment or formula comes of it.

    Letters beyond Latin ones are left as they are: LuaLaTeX and XeLaTeX set them where the font has them.
    """
    plain = " ".join(visible(text.replace(_APART, "?")).split())
    return re.sub(r"([-',])(?=\1)", rf"\1{_APART}", plain).translate(_ESCAPES)


def as_latex(table: Table) -> str:
    """The table as a float with its caption, for a paper to take in."""
    return "\n".join(_lines(table)) + "\n"


def _lines(table: Table) -> Iterator[str]:
    float_name = "table*" if len(table.columns) >= WIDE else "table"
    yield r"% needs \usepackage{booktabs} and \usepackage{graphicx}; made by backmerge"
    yield f"\\begin{{{float_name}}}"
    yield r"\centering"
    yield f"\\caption{{{escaped(table.caption)}}}"
    yield f"\\label{{tab:{re.sub('[^a-z0-9]+', '-', table.name.lower())}}}"
    # as it is, or as wide as the lines are where it is wider than they
    yield r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
    yield f"\\begin{{tabular}}{{{''.join('l' if column.kind == 'text' else 'r' for column in table.columns)}}}"
    yield r"\toprule"
    yield from _headings(table)
    for block in table.blocks:
        yield r"\midrule"
        for row in block:
            cells = [_set(entry, column.kind) for column, entry in zip(table.columns, row, strict=True)]
            yield f"{' & '.join(cells)} \\\\"
    yield r"\bottomrule"
    yield r"\end{tabular}}"
    if table.notes:
        yield r"\par\medskip"
        yield r"\parbox{\linewidth}{\footnotesize"
        yield from (f"{escaped(note)}\\par" for note in table.notes)
        yield "}"
    yield f"\\end{{{float_name}}}"


def _headings(table: Table) -> Iterator[str]:
    if table.groups:
        cells, rules, first = [], [], 1
        for heading, span in table.groups:
            cells.append(f"\\multicolumn{{{span}}}{{c}}{{{escaped(heading)}}}" if heading else "")
            if heading:
                rules.append(f"\\cmidrule(lr){{{first}-{first + span - 1}}}")
            first += span
        yield f"{' & '.join(cells)} \\\\"
        yield " ".join(rules)
    yield f"{' & '.join(_heads(table.columns))} \\\\"


def _heads(columns: Sequence[Column]) -> list[str]:
    # headings of numbers are centred over them
    return [
        escaped(column.heading) if column.kind == "text" else f"\\multicolumn{{1}}{{c}}{{{escaped(column.heading)}}}"
        for column in columns
    ]


def _set(entry: Entry, kind: ColumnKind) -> str:
    value, interval, remark = shown(entry, kind)
    small = " ".join(filter(None, (interval, remark and f"({remark})")))
    return escaped(value) + (f" {{\\scriptsize {escaped(small)}}}" if small else "")
