"""The paper's tables and figures as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from backmerge.reporting.families import Family
from backmerge.reporting.figure_files import write_figure
from backmerge.reporting.paper import blocks_of, paper_table
from backmerge.reporting.paper_figures import BENCHMARKS, figure_rows, panels_of, paper_figure
from backmerge.reporting.run_tables import write_table
from backmerge.reporting.tables import as_csv
from backmerge.runs import write_whole


def write_paper(families: Sequence[Family], which: str, out: Path, title: str | None = None) -> list[Path]:
    """Write a table as .csv, .md and .tex, or a figure as .png, .svg and .pdf with its numbers as .csv.

    Args:
        families: The runs.
        which: `table1`, `table2`, `table3`, `figure2` or `figure3`.
        out: A folder; made if absent.
        title: Of a table.

    Returns:
        The files.
    """
    if which not in BENCHMARKS:
        return write_table(out, paper_table(families, which, title))
    panels = panels_of(blocks_of(families), which)
    numbers = out / f"{which}.csv"
    write_whole(numbers, as_csv(figure_rows(panels)))
    return [*write_figure(out / which, paper_figure(panels, which)), numbers]
