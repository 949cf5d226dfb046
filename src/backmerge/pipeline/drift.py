"""How far tuning moved each part of the model, for the report: `backmerge diff` in brief."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from backmerge.checkpoints.grown import GrownBase
from backmerge.checkpoints.reader import Checkpoint, Weights
from backmerge.merging.survey import measurable, survey
from backmerge.progress import bar
from backmerge.reporting.heatmap import Heatmap, heatmap_of

# of a model, that are looked at: of larger ones an even share, so that minutes do not become hours
MOST_ELEMENTS = 2**30


def drift_rows(base: Checkpoint, tuned: Mapping[str, Weights]) -> list[dict[str, Any]]:
    """‖tuned - base‖ / ‖base‖ of every module type in every layer, for each tuned model; a function of the weights.

    One pass over each tuned model in blocks of 2^20 elements; tensors that an adapter leaves alone are not read, and
    rows of added tokens count as unchanged. Of models with more than 2^30 elements an even share is looked at, the
    first of every block: the ratios are then estimates.

    Args:
        base: The base's weights.
        tuned: The tuned models, by name.

    Returns:
        For each model and place `tuned` (its name), `stack` (the layers' prefix, such as `model.layers`) and `layer`,
        both `None` outside the layers, `module` (such as `self_attn.q_proj`), and `relative_change`: `None` where there
        is no such ratio, as the base is zero or a side not finite.

    Raises:
        CheckpointError: a file was damaged since it was opened.
    """
    rows: list[dict[str, Any]] = []
    for name, weights in tuned.items():
        seen = GrownBase(base, weights) if isinstance(weights, Checkpoint) else base
        total = sum(seen.infos[tensor].num_elements for tensor in measurable(seen, weights))
        with bar(f"What tuning moved in {name}", total) as advance:
            share = min(1.0, MOST_ELEMENTS / max(total, 1))
            changes = survey(seen, weights, lams=(), sample=share, advance=advance)
        rows += [{"tuned": name, **row} for row in _rows(heatmap_of(changes))]
    return rows


def _rows(heatmap: Heatmap) -> Iterator[dict[str, Any]]:
    for panel in heatmap.panels:
        for module, values in panel.rows.items():
            for layer, value in zip(panel.layers, values, strict=True):
                if value is not None:
                    yield _row(panel.prefix, layer, module, value)
    for module, value in heatmap.outside.items():
        yield _row(None, None, module, value)


def _row(stack: str | None, layer: int | None, module: str, value: float) -> dict[str, Any]:
    change = value if math.isfinite(value) else None
    return {"stack": stack, "layer": layer, "module": module, "relative_change": change}
