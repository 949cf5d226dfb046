"""Write tables as LaTeX with booktabs; all content remains text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from backmerge.reporting.page import visible
from backmerge.reporting.tables import Column, ColumnKind, Entry, Table, shown

WIDE = 8  # columns from which a table spans both columns of a two-column page

_APART = "\ue000"  # put between characters that would combine; not part of any script
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
        # symbols for control characters, which LaTeX fonts lack
        "\ufffd": "?",
        **{chr(code): "?" for code in range(0x2400, 0x2422)},
    }
)


def escaped(text: str) -> str:
    """Return text that LaTeX prints unchanged, on one line: it cannot become a command, cell, comment or formula.

    Non-Latin letters are kept: LuaLaTeX and XeLaTeX print them if the font has them.
    """
    plain = " ".join(visible(text.replace(_APART, "?")).split())
    return re.sub(r"([-',])(?=\1)", rf"\1{_APART}", plain).translate(_ESCAPES)


def as_latex(table: Table) -> str:
    """Return the table as a float with its caption, to be included in a paper."""
    return "\n".join(_lines(table)) + "\n"


def _lines(table: Table) -> Iterator[str]:
    float_name = "table*" if len(table.columns) >= WIDE else "table"
    yield r"% needs \usepackage{booktabs} and \usepackage{graphicx}; made by backmerge"
    yield f"\\begin{{{float_name}}}"
    yield r"\centering"
    yield f"\\caption{{{escaped(table.caption)}}}"
    yield f"\\label{{tab:{re.sub('[^a-z0-9]+', '-', table.name.lower())}}}"
    # in its natural size, or scaled down to the line width if it is wider
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
    # headings of numbers are centred above them
    return [
        escaped(column.heading) if column.kind == "text" else f"\\multicolumn{{1}}{{c}}{{{escaped(column.heading)}}}"
        for column in columns
    ]


def _set(entry: Entry, kind: ColumnKind) -> str:
    value, interval, remark = shown(entry, kind)
    small = " ".join(filter(None, (interval, remark and f"({remark})")))
    return escaped(value) + (f" {{\\scriptsize {escaped(small)}}}" if small else "")
