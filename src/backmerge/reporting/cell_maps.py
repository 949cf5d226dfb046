"""Make coloured tables for the report: harm by category over λ, and change by layer. Every cell shows a number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from backmerge.reporting.explained import KINDS
from backmerge.reporting.findings import METRIC_NAMES, percent, place_text
from backmerge.reporting.heatmap import BROKEN, STEPS, limit_of, step_of
from backmerge.reporting.heatmap import percent as short_percent
from backmerge.results import BenchmarkRow, CategoryScore, RestoreResults

SPLIT = "selection"  # every recipe was measured on it


class Square(NamedTuple):
    """One cell.

    Attributes:
        words: The number, which is read out, and shown if there is room.
        tooltip: Shown when the pointer is on it.
        share: Strength of its colour, in [0, 1]; `None` if it has a step of a scale instead.
        step: Its step on the scale of `heatmap`.
    """

    words: str
    tooltip: str
    share: float | None = None
    step: int | None = None


class Heading(NamedTuple):
    """A heading over several columns."""

    words: str
    span: int


class CellMap(NamedTuple):
    """A table of coloured cells.

    Attributes:
        title: The text above it.
        corner: What its rows are.
        groups: Headings above the column headings; none if all columns are of one kind.
        columns: Column headings.
        rows: Label to one cell for each column; `None` for an empty cell.
        tone: `bad` if more is worse, `good` if it is better, `scale` for steps.
        scale: For steps: each with the largest value in it.
    """

    title: str
    corner: str
    groups: tuple[Heading, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Square | None, ...]], ...]
    tone: str
    scale: tuple[tuple[int, str], ...] = ()


def category_maps(results: RestoreResults) -> list[CellMap]:
    """Return a map for each benchmark with categories: its primary metric at every point, mean over models."""
    rows = [row for row in results.by_category if row.split == SPLIT]
    models = _points_of_models(results, {row.model for row in rows})
    found: dict[str, dict[str, dict[str, list[CategoryScore]]]] = {}
    for row in rows:
        if row.model in models:
            of_benchmark = found.setdefault(row.benchmark, {})
            of_benchmark.setdefault(row.category, {}).setdefault(models[row.model], []).append(row)
    return [
        _category_map(results, benchmark, found[benchmark.name])
        for benchmark in results.benchmarks
        if benchmark.name in found
    ]


def _points_of_models(results: RestoreResults, models: set[str]) -> dict[str, str]:
    """Map models to points: `linear@0.4/seed-42` belongs to `linear@0.4`; the longest matching name wins."""
    names = sorted((point.point for point in results.points), key=len, reverse=True)
    return {
        model: point
        for model in models
        for point in [next((name for name in names if model == name or model.startswith(f"{name}/")), None)]
        if point is not None
    }


def _category_map(
    results: RestoreResults, benchmark: BenchmarkRow, found: Mapping[str, Mapping[str, Sequence[CategoryScore]]]
) -> CellMap:
    order = {"base": 0, "merged": 1, "tuned": 2}
    seen = {name for cells in found.values() for name in cells}
    points = sorted((p for p in results.points if p.point in seen), key=lambda p: order[p.role])
    groups: list[Heading] = []
    for point in points:
        name = "" if point.role != "merged" else point.series
        if groups and groups[-1].words == name:
            groups[-1] = Heading(name, groups[-1].span + 1)
        else:
            groups.append(Heading(name, 1))
    metric = METRIC_NAMES.get(benchmark.metric, benchmark.metric.replace("_", " "))
    return CellMap(
        title=f"{KINDS[benchmark.kind][0]} by category: {benchmark.name}",
        corner=metric,
        groups=tuple(groups),
        columns=tuple(p.role if p.role != "merged" else place_text(p.point, p.series, p.lam) or "·" for p in points),
        rows=tuple(
            (category or "no category", tuple(_rate(category, point.point, cells) for point in points))
            for category, cells in found.items()
        ),
        tone="good" if benchmark.kind in ("utility", "keep") else "bad",
    )


def _rate(category: str, point: str, cells: Mapping[str, Sequence[CategoryScore]]) -> Square | None:
    entries = cells.get(point)
    if not entries:
        return None
    scored = [entry for entry in entries if entry.value is not None]
    unscored = sum(entry.unscored for entry in entries)
    where = f"{category or 'no category'}, {point}: "
    if not scored:
        return Square("—", f"{where}nothing was scored ({unscored} unscored)", share=0.0)
    values = [entry.value for entry in entries if entry.value is not None]
    value = fmean(values)
    if len(scored) == 1:
        spread = f"[{scored[0].low * 100:.1f}, {scored[0].high * 100:.1f}]"
    else:
        spread = f"mean over {len(scored)} models, {min(values) * 100:.1f} to {max(values) * 100:.1f}"
    tooltip = f"{where}{percent(value)} ({spread}; n = {scored[0].n}{f', {unscored} unscored' if unscored else ''})"
    return Square(f"{value * 100:.0f}", tooltip, share=value)


def drift_maps(results: RestoreResults) -> list[CellMap]:
    """Return a map for each stack of layers, and one for what is outside them: mean over the tuned models."""
    places: dict[str | None, dict[str, dict[int | None, list[float | None]]]] = {}
    for row in results.drift:
        of_module = places.setdefault(row.stack, {}).setdefault(row.module, {})
        of_module.setdefault(row.layer, []).append(row.relative_change)
    top = max((value for _, _, _, value in _means(places) if value is not None), default=0.0)
    scale = tuple((step, short_percent(limit_of(step, top))) for step in range(1, STEPS + 1, 2)) if top > 0 else ()
    return [_drift_map(stack, modules, top, scale) for stack, modules in places.items()]


def _means(
    places: Mapping[str | None, Mapping[str, Mapping[int | None, Sequence[float | None]]]],
) -> Iterator[tuple[str | None, str, int | None, float | None]]:
    for stack, modules in places.items():
        for module, layers in modules.items():
            for layer, values in layers.items():
                yield stack, module, layer, _mean(values)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _drift_map(
    stack: str | None,
    modules: Mapping[str, Mapping[int | None, Sequence[float | None]]],
    top: float,
    scale: tuple[tuple[int, str], ...],
) -> CellMap:
    if stack is None:
        rows = tuple((module, (_moved(module, layers[None], top),)) for module, layers in modules.items())
        return CellMap("Outside the layers", "", (), ("change",), rows, "scale", scale)
    layers = sorted({layer for of_module in modules.values() for layer in of_module if layer is not None})
    return CellMap(
        title=f"By layer of {stack}",
        corner="layer",
        groups=(),
        columns=tuple(map(str, layers)),
        rows=tuple(
            (
                module,
                tuple(
                    _moved(f"{module}, layer {layer}", of_module[layer], top) if layer in of_module else None
                    for layer in layers
                ),
            )
            for module, of_module in modules.items()
        ),
        tone="scale",
        scale=scale,
    )


def _moved(where: str, values: Sequence[float | None], top: float) -> Square:
    mean = _mean(values)
    if mean is None:
        return Square("no ratio", f"{where}: no ratio: the base is zero there, or a value not finite", step=BROKEN)
    spread = ""
    if len(values) > 1:
        known = [value for value in values if value is not None]
        spread = f" (mean over {len(values)} models, {short_percent(min(known))} to {short_percent(max(known))})"
    return Square(short_percent(mean), f"{where}: {short_percent(mean)}{spread}", step=step_of(mean, top))
