"""Train one model per seed, unless it exists already."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from backmerge.checkpoints.adapter import open_weights
from backmerge.checkpoints.compare import GrownBase
from backmerge.checkpoints.reader import Checkpoint, Weights
from backmerge.finetuning.datasets import TrainingData
from backmerge.finetuning.settings import FinetuneSettings, num_steps
from backmerge.finetuning.trainer import is_trained, train_model, training_key
from backmerge.merging.survey import measurable, survey
from backmerge.progress import bar
from backmerge.registry import MODELS
from backmerge.reporting.heatmap import Heatmap, heatmap_of


def tune_seeds(
    base: Checkpoint,
    base_name: str,
    settings: FinetuneSettings,
    training: Mapping[int, TrainingData],
    places: Mapping[int, Path],
    *,
    log: Callable[[str], None] = lambda _: None,
    replace: bool = True,
) -> dict[str, Weights]:
    """Train each seed's model in its place; return them by the names of their folders.

    With `accelerate launch` all processes call this together, and only the first prints and writes.

    Args:
        base: The model to tune.
        base_name: The user's name for it.
        settings: Hyper-parameters.
        training: Each seed's data.
        places: Each seed's folder.
        log: Called with each seed that was trained.
        replace: Whether to replace a model that backmerge wrote in a seed's place with other settings.

    Raises:
        BackmergeError: a user error.
    """
    # a folder's name means nothing on other machines, and a relative one not even in another folder
    is_local = base_name in MODELS.entries or Path(base_name).expanduser().exists()
    named = str(base.directory.absolute()) if is_local else base_name
    tuned: dict[str, Weights] = {}
    for seed, place in places.items():
        data = training[seed]
        if not is_trained(place, training_key(base, data, settings, seed)):
            with bar(f"Fine-tuning, seed {seed}", num_steps(settings, len(data.training))) as advance:
                train_model(base, data, settings, seed, place, advance, base_name=named, replace=replace)
            log(f"fine-tuned seed {seed}")
        tuned[place.name] = open_weights(place, base)
    return tuned


# elements of a model to read: for larger ones an even share, so that minutes do not become hours
MOST_ELEMENTS = 2**30


def drift_rows(base: Checkpoint, tuned: Mapping[str, Weights]) -> list[dict[str, Any]]:
    """Return ‖tuned - base‖ / ‖base‖ of every module type in every layer, for each tuned model.

    One pass over each tuned model in blocks of 2^20 elements; tensors that an adapter does not change are not read, and
    rows of added tokens count as unchanged. For models with more than 2^30 elements an even share is read, the first of
    every block: the ratios are then estimates.

    Args:
        base: The base's weights.
        tuned: The tuned models, by name.

    Returns:
        For each model and place `tuned` (its name), `stack` (the layers' prefix, such as `model.layers`) and `layer`,
        both `None` outside the layers, `module` (such as `self_attn.q_proj`), and `relative_change`: `None` if there is
        no such ratio, since the base is zero or a side is not finite.

    Raises:
        CheckpointError: a file was damaged after it was opened.
    """
    rows: list[dict[str, Any]] = []
    for name, weights in tuned.items():
        seen = GrownBase(base, weights) if isinstance(weights, Checkpoint) else base
        total = sum(seen.infos[tensor].num_elements for tensor in measurable(seen, weights))
        with bar(f"Changes by tuning in {name}", total) as advance:
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
