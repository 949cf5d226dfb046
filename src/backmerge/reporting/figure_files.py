"""Figures as files: PNG for the web, SVG for editing, PDF for papers; the same bytes each time."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from backmerge.reporting.drawing import as_bytes, styled
from backmerge.runs import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMS = ("png", "svg", "pdf")


def write_figure(place: Path, figure: Figure) -> list[Path]:
    """Write a figure in every form, as `place` with the form's suffix."""
    made = {form: as_pdf(figure) if form == "pdf" else as_bytes(figure, form) for form in FORMS}
    files = [place.with_name(f"{place.name}.{form}") for form in FORMS]
    for file, content in zip(files, made.values(), strict=True):
        write_whole(file, content)
    return files


def as_pdf(figure: Figure) -> bytes:
    """A figure as PDF on white, with neither date nor maker, its text as text in TrueType, as publishers ask."""
    import matplotlib as mpl

    stream = io.BytesIO()
    undated = dict.fromkeys(("CreationDate", "Creator", "Producer"))
    with styled(), mpl.rc_context({"pdf.fonttype": 42}):
        figure.savefig(stream, format="pdf", metadata=undated, facecolor="white")
    return stream.getvalue()
