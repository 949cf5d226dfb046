"""Show where tuning changed a model: relative norm by module type and layer, for the terminal, as PNG and as HTML.

All three use one scale: nine steps, each √2 times the one before; the last ends at the largest value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from backmerge.merging.changes import Change, combined
from backmerge.merging.schedule import GROUPS, LAYER, matches
from backmerge.reporting.drawing import SOFT, styled
from backmerge.reporting.page import environment, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console

    from backmerge.reporting.diff import Diff

STEPS = 9
# matplotlib's viridis at equal distances: its order is visible without colours, and on light and dark backgrounds
PALETTE = (
    "#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725",
)  # fmt: skip
UNCHANGED, BROKEN = 0, -1  # in addition to the steps 1 to 9
COLOURS = {UNCHANGED: "#d4d6da", BROKEN: "#b3261e", **dict(enumerate(PALETTE, 1))}
SIGNS = {UNCHANGED: ".", BROKEN: "!", **{step: str(step) for step in range(1, STEPS + 1)}}
TITLE = "Relative norm of the change, ‖tuned - base‖ / ‖base‖"
WIDEST_LABEL = 34  # characters
CELL = 0.23  # inches


class Panel(NamedTuple):
    """One stack of layers.

    Attributes:
        prefix: Prefix of its tensors' names, such as `model.layers`.
        layers: The layers' numbers.
        rows: Relative norms by module type, one for each layer; `None` if a layer has no such module.
    """

    prefix: str
    layers: tuple[int, ...]
    rows: Mapping[str, tuple[float | None, ...]]


class Heatmap(NamedTuple):
    """Relative norms ‖tuned - base‖ / ‖base‖ by place; NaN if a value on either side is not finite.

    Attributes:
        panels: Usually one, since a model usually has one stack of layers.
        outside: For tensors outside the layers, by name.
    """

    panels: tuple[Panel, ...]
    outside: Mapping[str, float]

    @property
    def top(self) -> float:
        """Return the largest finite value, where the scale ends."""
        inside = [value for panel in self.panels for row in panel.rows.values() for value in row]
        values = (*inside, *self.outside.values())
        return max((value for value in values if value is not None and math.isfinite(value)), default=0.0)


class Table(NamedTuple):
    """A table for people.

    Attributes:
        headings: Column headings.
        rows: The cells of each row; the first is the row's name.
        note: The meaning of the columns.
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def module_type(name: str) -> str:
    """Return a tensor's name without its layer's number, such as `self_attn.q_proj`; other numbers become `*`.

    A tensor outside the layers keeps its whole name; the ending `.weight` is removed.
    """
    match = LAYER.match(name)
    inner = name[match.end() :] if match else name
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", inner).removesuffix(".weight")


def by_module_type(changes: Mapping[str, Change]) -> dict[str, list[str]]:
    """Return the tensors' names by module type: in layers first; attention, MLP, norms, others, embeddings."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(changes, key=_rank):
        kinds.setdefault(module_type(name), []).append(name)
    return kinds


def heatmap_of(changes: Mapping[str, Change]) -> Heatmap:
    """Return the relative norms of a survey by place; several tensors in one place (experts) count as one."""
    places: dict[str, dict[str, dict[int, list[Change]]]] = {}
    outside: dict[str, float] = {}
    for kind, names in by_module_type(changes).items():
        for name in names:
            match = LAYER.match(name)
            if match is None:
                outside[kind] = _norm([changes[name]])
            else:
                row = places.setdefault(match["prefix"], {}).setdefault(kind, {})
                row.setdefault(int(match["index"]), []).append(changes[name])
    panels = []
    for prefix, rows in places.items():
        layers = tuple(sorted({layer for row in rows.values() for layer in row}))
        values = {
            kind: tuple(_norm(row[layer]) if layer in row else None for layer in layers) for kind, row in rows.items()
        }
        panels.append(Panel(prefix, layers, values))
    return Heatmap(tuple(panels), outside)


def step_of(value: float, top: float) -> int:
    """Return a value's step on the scale: 9 down to the largest value divided by √2, 8 down to half of it, and so on.

    1 for everything smaller, 0 for no change, -1 for NaN.
    """
    if math.isnan(value):
        return BROKEN
    if value == 0:
        return UNCHANGED
    if value >= top:  # also infinite values: the base was zero
        return STEPS
    return max(1, STEPS - math.floor(2 * math.log2(top / value)))


def limit_of(step: int, top: float) -> float:
    """Return the largest value of a step."""
    return top * math.exp2((step - STEPS) / 2)


def percent(value: float) -> str:
    """Return a relative norm in percent, with three digits."""
    if not math.isfinite(value):
        return "not finite" if math.isnan(value) else "∞"
    return f"{100 * value:.3g} %"


def print_heatmap(heatmap: Heatmap, console: Console) -> None:
    """Print the map: in colour on a terminal with enough colours; elsewhere in digits, 9 for the largest values."""
    from rich.text import Text

    has_colours = console.is_terminal and console.color_system in {"256", "truecolor"} and not console.no_color
    console.print(f"{TITLE}, by module type and layer", soft_wrap=True)
    for line in _lines(heatmap, console.width):
        text = Text()
        for words, step, width in line:
            if step is None:
                text.append(words)
            elif has_colours and step != UNCHANGED:
                text.append("█" * width, style=COLOURS[step])
            else:
                text.append(SIGNS[step].ljust(width))
        text.rstrip()
        console.print(text, soft_wrap=True)


class _Piece(NamedTuple):
    """A part of a line: words, or a cell of the map with a width in characters."""

    words: str
    step: int | None = None
    width: int = 0


def _lines(heatmap: Heatmap, columns: int) -> Iterator[list[_Piece]]:
    top = heatmap.top
    labels = [*heatmap.outside, *(kind for panel in heatmap.panels for kind in panel.rows)]
    indent = min(max(map(len, labels), default=0), WIDEST_LABEL) + 2
    for panel in heatmap.panels:
        if len(heatmap.panels) > 1:
            yield [_Piece(visible(panel.prefix))]
        room = max(columns - indent, 10)
        width = 2 if 2 * len(panel.layers) <= room else 1
        for start in range(0, len(panel.layers), room // width):
            shown = slice(start, start + room // width)
            yield [_Piece(" " * indent + _ruler(panel.layers[shown], width))]
            for kind, values in panel.rows.items():
                cells = [_cell(value, top, width) for value in values[shown]]
                yield [_Piece(_label(kind).ljust(indent)), *cells]
    if heatmap.outside:
        yield [_Piece("outside the layers")]
    for name, value in heatmap.outside.items():
        yield [_Piece(_label(name).ljust(indent)), _cell(value, top, 2), _Piece(f" {percent(value)}")]
    if top > 0:
        steps = [p for step in range(1, STEPS + 1, 2) for p in (_Piece("  "), _Piece("", step, 1), _up_to(step, top))]
        yield [_Piece("scale:"), _Piece("  "), _Piece("", UNCHANGED, 1), _Piece(" unchanged"), *steps]


def _up_to(step: int, top: float) -> _Piece:
    return _Piece(f" {'up to ' if step == 1 else ''}{percent(limit_of(step, top))}")


def _cell(value: float | None, top: float, width: int) -> _Piece:
    return _Piece(" " * width) if value is None else _Piece("", step_of(value, top), width)


def _ruler(layers: Sequence[int], width: int) -> str:
    """Return a line with every fifth or tenth layer number above its cell."""
    every = 5 if width > 1 else 10
    ruler = ""
    for place, layer in enumerate(layers):
        if layer % every == 0 and len(ruler) <= place * width:
            ruler = ruler.ljust(place * width) + str(layer)
    return ruler


def _label(name: str) -> str:
    """Return a module type's name, or the end of a long one."""
    name = visible(name)
    return name if len(name) <= WIDEST_LABEL else "…" + name[1 - WIDEST_LABEL :]


def figure(heatmap: Heatmap) -> Figure:
    """Return the heat map as a figure: a row per module type, a column per layer, tensors outside below."""
    from matplotlib.figure import Figure

    stacks: list[tuple[tuple[int, ...], Mapping[str, tuple[float | None, ...]]]] = [
        (panel.layers, panel.rows) for panel in heatmap.panels
    ]
    if heatmap.outside:
        stacks.append(((), {name: (value,) for name, value in heatmap.outside.items()}))
    num_columns = max([len(layers) for layers, _ in stacks] or [1], default=1)
    num_rows = [max(len(rows), 1) for _, rows in stacks] or [1]
    with styled():
        size = (max(3.0 + CELL * max(num_columns, 8), 6.4), 1.7 + CELL * sum(num_rows) + 0.3 * len(stacks))
        made = Figure(size, layout="constrained")
        made.suptitle(TITLE, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
        panels = made.subplots(len(num_rows), 1, squeeze=False, height_ratios=num_rows)[:, 0]
        for axes, (layers, rows) in zip(panels, stacks, strict=False):
            _draw(axes, layers, rows, heatmap.top, max(num_columns, 8))
        for axes, panel in zip(panels, heatmap.panels, strict=False):
            axes.set_title(f"layers of {panel.prefix}" if len(heatmap.panels) > 1 else "by layer", fontsize=9)
        if heatmap.outside:
            panels[-1].set_title("outside the layers", fontsize=9)
        _draw_scale(made, list(panels), heatmap.top)
    return made


def _draw(
    axes: Axes, layers: Sequence[int], rows: Mapping[str, Sequence[float | None]], top: float, columns: int
) -> None:
    from matplotlib.patches import Rectangle

    for y, values in enumerate(rows.values()):
        for x, value in enumerate(values):
            if value is not None:
                colour = COLOURS[step_of(value, top)]
                axes.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, facecolor=colour, linewidth=0))
            if not layers and value is not None:
                axes.text(x + 0.8, y, percent(value), va="center", fontsize=8.5, color=SOFT)
    axes.set_xlim(-0.6, columns - 0.4)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), labels=[_label(kind) for kind in rows], fontsize=8.5)
    every = 1 if len(layers) <= 16 else 5
    labelled = [x for x, layer in enumerate(layers) if layer % every == 0]
    axes.set_xticks(labelled, labels=[str(layers[x]) for x in labelled], fontsize=8.5)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_scale(made: Figure, panels: Sequence[Axes], top: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    if top <= 0:
        return
    steps = range(STEPS + 1)
    scale = ScalarMappable(BoundaryNorm(list(steps), STEPS), ListedColormap(list(PALETTE)))
    bar = made.colorbar(scale, ax=panels, location="bottom", aspect=45, pad=0.02, drawedges=False)
    bar.set_ticks([0, *range(1, STEPS + 1, 2)])
    bar.set_ticklabels(["0", *(percent(limit_of(step, top)) for step in range(1, STEPS + 1, 2))], fontsize=8.5)
    bar.ax.minorticks_off()
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    bar.set_label("each step is √2 times the one before; grey: unchanged", fontsize=8.5, color=SOFT)


def page(document: Diff, heatmap: Heatmap, table: Table) -> str:
    """Return a self-contained HTML page without scripts; all text in it is escaped.

    Args:
        document: The findings.
        heatmap: From the same survey.
        table: From the same survey, by module type.
    """
    top = heatmap.top
    return (
        environment()
        .get_template("diff.html.j2")
        .render(
            document=document,
            heatmap=heatmap,
            table=table,
            title=TITLE,
            colours=COLOURS,
            step_of=lambda value: step_of(value, top),
            relative=percent,
            scale=[(step, percent(limit_of(step, top))) for step in range(1, STEPS + 1, 2)] if top > 0 else [],
        )
    )


def _norm(changes: Sequence[Change]) -> float:
    if not all(change.is_finite for change in changes):
        return math.nan
    return combined(changes).relative_norm


def _rank(name: str) -> tuple[bool, int, str, str]:
    """Return a tensor's sort key: in a layer or not, group, module type, and name."""
    order = ("attention", "mlp", "norms", "", "embeddings")
    group = next((group for group in GROUPS if matches(group, name)), "")
    return LAYER.match(name) is None, order.index(group), module_type(name), name
