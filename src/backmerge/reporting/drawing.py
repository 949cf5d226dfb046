"""Turn figures into bytes, always the same: as files, and as SVG that takes the colours of its page."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

from backmerge.results import RestoreResults
from backmerge.runs import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# the page's light colours, and their names in report.css, by which an inline figure follows into dark mode
INK, SOFT, FAINT = "#1c1f26", "#565c68", "#8b909b"
BASE, TUNED, MERGED, BAD = "#0072b2", "#d55e00", "#00855f", "#b3261e"
SERIES = (MERGED, "#7a4fb5", "#8c6a00", "#a83279", "#3f6f7f")
VARIABLES = {
    INK: "--ink",
    SOFT: "--soft",
    FAINT: "--faint",
    BASE: "--base",
    TUNED: "--tuned",
    MERGED: "--merged",
    BAD: "--bad",
    SERIES[1]: "--series-2",
    SERIES[2]: "--series-3",
    SERIES[3]: "--series-4",
    SERIES[4]: "--series-5",
}

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.parse_math": False,  # a benchmark's name may contain a $
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "backmerge",
    "pdf.fonttype": 42,  # TrueType, as publishers require
    # as in `_lay_out`, whatever the user's matplotlibrc says
    "figure.autolayout": False,
    "figure.constrained_layout.use": False,
}
UNDATED = {
    "png": dict.fromkeys(["Software"]),
    "svg": dict.fromkeys(["Date", "Creator"]),
    "pdf": dict.fromkeys(["CreationDate", "Creator", "Producer"]),
}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Apply our matplotlib settings, for drawing and for saving."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # a benchmark's name may contain characters that the font lacks: the browser's fonts have them
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def as_bytes(figure: Figure, form: str) -> bytes:
    """Return a figure as `png`, `svg` or `pdf`, on white."""
    return _rendered(figure, form, facecolor="white")


def inline_svg(figure: Figure, name: str, description: str, spots: Mapping[str, str] | None = None) -> str:
    """Return a figure as an `<svg>` element without background, in the colours of the page.

    Args:
        figure: Drawn in the colours of this module.
        name: Prefix of every id, since ids are shared with the page.
        description: A description for people who cannot see the figure.
        spots: Groups of the figure with a text that is shown when they are pointed at, focused or tapped.
    """
    text = _rendered(figure, "svg", facecolor="none").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    for group, words in (spots or {}).items():
        told = f'id="{name}-{group}" class="spot" tabindex="0" role="img" aria-label="{_attribute(words)}"'
        text = text.replace(f'<g id="{name}-{group}">', f"<g {told}><title>{_attribute(words)}</title>")
    # the size comes from the viewBox and the page
    opening, rest = text.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    # the parts of an image are not separate elements for screen readers
    role = "group" if spots else "img"
    return f'{opening} role="{role}" aria-label="{_attribute(description)}">{rest}'


def _attribute(text: str) -> str:
    from html import escape

    return escape(text, quote=True)


def _rendered(figure: Figure, form: str, *, facecolor: str) -> bytes:
    stream = io.BytesIO()
    with styled():
        _lay_out(figure)
        figure.savefig(stream, format=form, dpi=160, metadata=UNDATED[form], facecolor=facecolor)
    return stream.getvalue()


def _lay_out(figure: Figure) -> None:
    """Put axes and legends in their places, once for all formats; its engine would do so, and draw it, for each."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)


PANEL = (3.9, 3.1)  # inches: a phone's width at its text size
LINE = 0.19  # inches, height of a legend's line
LETTER = 0.09  # inches, width of a legend's letter, including its marks
LONG_NAME = 14  # characters from which names are put below each other


def percent_axis(axes: Axes, which: Literal["x", "y"], highest: float) -> None:
    """Set an axis in percent, from 0 to a little above the highest value; at most 100 % plus the size of a mark."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    top = min(1.0, max(highest * 1.15, 0.05))
    axis, set_limits = (axes.xaxis, axes.set_xlim) if which == "x" else (axes.yaxis, axes.set_ylim)
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(PercentFormatter(1.0))
    axis.grid(visible=True)
    set_limits(-0.04 * top, top * 1.06)


def ring(axes: Axes, x: float, y: float, colour: str) -> None:
    """Draw a ring around a mark."""
    axes.plot(x, y, "o", color=colour, markerfacecolor="none", markersize=13, zorder=3)


def note(axes: Axes, x: float, y: float, text: str, colour: str, **options: Any) -> None:
    """Write a few small words."""
    axes.text(x, y, text, color=colour, fontsize=8.5, **{"va": "bottom", "ha": "left", **options})


def merged_series(results: RestoreResults) -> list[str]:
    """Return the series of the recipes, in the order of the experiment."""
    return list(dict.fromkeys(row.series for row in results.points if row.role == "merged"))


def series_style(series: Sequence[str], name: str) -> str:
    """Return a series' line style: solid, then dashed or dotted once the colours repeat."""
    return ("-", "--", ":")[min(series.index(name) // len(SERIES), 2)]


def legend_below(figure: Figure, axes: Axes) -> None:
    """Draw the legend below the plot, where long names cover nothing."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if max(map(len, labels), default=0) > LONG_NAME else max(1, min(len(labels), 3))
    wrapped = [fill(label, int(figure.get_figwidth() / LETTER)) for label in labels]
    num_lines = sum(label.count("\n") + 1 for label in wrapped) if columns == 1 else -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + LINE * num_lines)
    figure.legend(handles, wrapped, loc="outside lower center", ncols=columns, fontsize=8.5)


def series_colour(series: Sequence[str], name: str) -> str:
    """Return a series' colour; a single series has the colour of merged models."""
    return SERIES[series.index(name) % len(SERIES)] if len(series) > 1 else MERGED


FORMS = ("png", "svg", "pdf")


def write_figure(place: Path, figure: Figure) -> list[Path]:
    """Write a figure in every format, as `place` with the format's suffix."""
    made = {form: as_bytes(figure, form) for form in FORMS}
    files = [place.with_name(f"{place.name}.{form}") for form in FORMS]
    for file, content in zip(files, made.values(), strict=True):
        write_whole(file, content)
    return files
