"""Figures to bytes: the same bytes each time, as files and as SVG that takes on the colours of the page around it."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# the page's colours in the light, and their names in report.css, by which an inline figure follows into the dark
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
    "text.parse_math": False,  # a benchmark's name may hold a $
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
}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Matplotlib's settings as ours, for drawing and for saving alike."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # a benchmark's name may hold signs that the font lacks: the browser's fonts have them
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def as_bytes(figure: Figure, form: str) -> bytes:
    """A figure as `png` or `svg`, on white."""
    return _rendered(figure, form, facecolor="white")


def inline_svg(figure: Figure, name: str, description: str, spots: Mapping[str, str] | None = None) -> str:
    """A figure as an `<svg>` element without background, its colours the page's.

    Args:
        figure: Drawn in the colours of this module.
        name: Put before every id, since ids are the whole page's.
        description: What is to be seen, for those who cannot see it.
        spots: Groups of the figure that tell something when they are pointed at, focused or tapped.
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
    # the parts of an image are nobody's to visit
    role = "group" if spots else "img"
    return f'{opening} role="{role}" aria-label="{_attribute(description)}">{rest}'


def _attribute(text: str) -> str:
    from html import escape

    return escape(text, quote=True)


def _rendered(figure: Figure, form: str, *, facecolor: str) -> bytes:
    stream = io.BytesIO()
    undated = {"Software": None} if form == "png" else {"Date": None, "Creator": None}
    with styled():
        figure.savefig(stream, format=form, dpi=160, metadata=undated, facecolor=facecolor)
    return stream.getvalue()
