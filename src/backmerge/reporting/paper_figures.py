"""Draw the paper's figures from finished runs: score and safety over λ, for each method and task.

Source: Farn et al., arXiv 2412.19512, Figures 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from backmerge.reporting.drawing import PANEL, styled
from backmerge.reporting.families import benchmarks_of
from backmerge.reporting.lines import Line, draw_panel, line_of, panel_title, rate_of, score_of, series_with_lam
from backmerge.reporting.paper import SAFETY, Block, label_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from pathlib import Path

from backmerge.reporting.drawing import write_figure
from backmerge.reporting.families import Family
from backmerge.reporting.paper import blocks_of, paper_table
from backmerge.reporting.run_tables import write_table
from backmerge.reporting.tables import as_csv
from backmerge.runs import write_whole

BENCHMARKS = {"figure2": "hexphi", "figure3": "advbench"}
ACROSS = 4  # tasks side by side


class Panels(NamedTuple):
    """A task's two panels, one above the other, with the same methods in the same order.

    Attributes:
        block: Their runs.
        score: Its score, by method.
        safety: Its ASR, by method.
        score_of: The meaning of the score.
        safety_of: Name and metric of the safety benchmark; `None` if none was measured.
    """

    block: Block
    score: Sequence[Line]
    safety: Sequence[Line]
    score_of: str
    safety_of: tuple[str, str] | None


def panels_of(blocks: Sequence[Block], which: str) -> list[Panels]:
    """Return the panels to draw, for every task."""
    asked = BENCHMARKS[which]
    tried = [_labelled(block) for block in blocks]
    labels = list(dict.fromkeys(label for of_block in tried for label in of_block))
    found = []
    for block, of_block in zip(blocks, tried, strict=True):
        safety_of = _benchmark(block, asked)
        score: list[Line] = []
        safety: list[Line] = []
        for label in labels:
            family, series = of_block.get(label, (None, ""))
            if family is None:
                # keeps the other methods' colours
                score.append(Line(label, ()))
                safety.append(Line(label, ()))
                continue
            score.append(line_of(family, series, label, score_of(family)))
            rate = None if safety_of is None else rate_of(*safety_of)(family)
            safety.append(Line(label, ()) if rate is None else line_of(family, series, label, rate))
        names = ", ".join(name for name, _ in benchmarks_of(block.families[0], "utility"))
        found.append(Panels(block, score, safety, names, safety_of))
    return found


def paper_figure(panels: Sequence[Panels], which: str) -> Figure:
    """Draw Figure 2 or 3: a column for each task, its score above and its ASR below, over λ."""
    from matplotlib.figure import Figure

    across = min(ACROSS, len(panels))
    down = -(-len(panels) // across)
    has_models = len({one.block.model for one in panels}) > 1
    with styled():
        figure = Figure((PANEL[0] * across, PANEL[1] * 2 * down + 0.4), layout="constrained")
        grid = figure.subplots(2 * down, across, squeeze=False)
        for number, one in enumerate(panels):
            upper, lower = (
                grid[2 * (number // across)][number % across],
                grid[2 * (number // across) + 1][number % across],
            )
            model = f"{one.block.model}, " if has_models else ""
            upper.set_title(panel_title(f"{model}{one.block.task}: score ({one.score_of})"))
            draw_panel(upper, one.score, is_utility=True)
            lower.set_title(panel_title(f"ASR: {_safety_title(one, which)}"))
            draw_panel(lower, one.safety, is_utility=False)
        for number in range(len(panels), across * down):
            for row in (2 * (number // across), 2 * (number // across) + 1):
                grid[row][number % across].set_visible(False)
        drawn = {
            label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if drawn:
            figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=min(len(drawn), 4))
    return figure


def figure_rows(panels: Sequence[Panels]) -> list[dict[str, Any]]:
    """Return the drawn values, one row per point, not rounded."""
    rows = []
    for one in panels:
        asr = one.safety_of[0] if one.safety_of else ""
        for measured, benchmark, lines in (("score", one.score_of, one.score), ("asr", asr, one.safety)):
            place = {"model": one.block.model, "task": one.block.task, "measured": measured, "benchmark": benchmark}
            rows += [
                {
                    **place,
                    "method": line.label,
                    "lam": mark.lam,
                    "point": mark.point,
                    "mean": mark.value,
                    "low": mark.found.low,
                    "high": mark.found.high,
                }
                for line in lines
                for mark in line.marks
            ]
    return rows


def _labelled(block: Block) -> dict[str, Any]:
    """Return the methods of a block with several λs, by label."""
    return {
        label_of(family.runs[0].results, series): (family, series)
        for family in block.families
        for series in series_with_lam(family)
    }


def _benchmark(block: Block, asked: str) -> tuple[str, str] | None:
    """Return the figure's benchmark; if none of the paper's was measured, the first substitute."""
    measured = dict(benchmarks_of(block.families[0], "safety"))
    if asked in measured:
        return asked, measured[asked]
    if any(name in SAFETY for name in measured):
        return None
    return next(iter(measured.items()), None)


def _safety_title(one: Panels, which: str) -> str:
    words = SAFETY[BENCHMARKS[which]]
    if one.safety_of is None:
        return words
    name = one.safety_of[0]
    return words if name in SAFETY else f"{name} (in place of {words})"


def write_paper(families: Sequence[Family], which: str, out: Path, title: str | None = None) -> list[Path]:
    """Write a table as .csv, .md and .tex, or a figure as .png, .svg and .pdf with its numbers as .csv.

    Args:
        families: The runs.
        which: `table1`, `table2`, `table3`, `figure2` or `figure3`.
        out: A folder; made if absent.
        title: Title of a table.

    Returns:
        The files.
    """
    if which not in BENCHMARKS:
        return write_table(out, paper_table(families, which, title))
    panels = panels_of(blocks_of(families), which)
    numbers = out / f"{which}.csv"
    write_whole(numbers, as_csv(figure_rows(panels)))
    return [*write_figure(out / which, paper_figure(panels, which)), numbers]
