"""What tuning moved, as the report shows it: the ratios of `backmerge diff`, for every model and place."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backmerge.checkpoints.adapter import open_weights
from backmerge.checkpoints.reader import Checkpoint
from backmerge.pipeline import tuning
from backmerge.pipeline.tuning import drift_rows

Factory = Callable[..., Path]


def places(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], float | None]:
    """Each row's change by its place."""
    return {tuple(row[key] for key in ("tuned", "stack", "layer", "module")): row["relative_change"] for row in rows}


def changed(tiny_base: Path, place: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """The base with one tensor changed."""
    shutil.copytree(tiny_base, place)
    tensors = load_file(place / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


def test_every_tensor_has_its_ratio(tiny_base: Path, tiny_tuned: Path) -> None:
    """‖tuned - base‖ / ‖base‖ by layer and module, as numpy has it."""
    base = Checkpoint(tiny_base)
    found = places(drift_rows(base, {"a": open_weights(tiny_tuned, base)}))
    ours, theirs = load_file(tiny_base / "model.safetensors"), load_file(tiny_tuned / "model.safetensors")
    assert len(found) == len(ours)
    for (_, stack, layer, module), change in found.items():
        name = f"{module}.weight" if stack is None else f"{stack}.{layer}.{module}.weight"
        first, second = ours[name].double().numpy(), theirs[name].double().numpy()
        norm = ((first**2).sum()) ** 0.5
        expected = (((second - first) ** 2).sum()) ** 0.5 / norm if norm else None
        assert change == pytest.approx(expected, rel=1e-9), name


def test_each_tuned_model_has_its_rows(tiny_base: Path, make_adapter: Factory) -> None:
    """Several adapters stand one after the other; what they leave alone did not move."""
    base = Checkpoint(tiny_base)
    tuned = {f"seed-{seed}": open_weights(make_adapter(tiny_base, seed=seed), base) for seed in (1, 2)}
    rows = drift_rows(base, tuned)
    assert list(dict.fromkeys(row["tuned"] for row in rows)) == ["seed-1", "seed-2"]
    moved = {row["module"] for row in rows if row["relative_change"]}
    still = {row["module"] for row in rows if row["relative_change"] == 0}
    assert any("q_proj" in module for module in moved)
    assert any("layernorm" in module for module in still)
    assert not moved & still


def test_the_rows_are_the_same_each_time_and_plain_json(tiny_base: Path, tiny_tuned: Path) -> None:
    """What is written to results.json is a function of the weights."""
    base = Checkpoint(tiny_base)
    first, second = (drift_rows(base, {"a": open_weights(tiny_tuned, base)}) for _ in range(2))
    assert json.dumps(first, allow_nan=False) == json.dumps(second, allow_nan=False)


def test_missing_ratio_is_not_shown_as_no_change(tiny_base: Path, tmp_path: Path) -> None:
    """A value that is not finite makes no ratio, and no hole in the JSON."""
    name = "model.layers.1.mlp.up_proj.weight"

    def broken(tensor: torch.Tensor) -> torch.Tensor:
        tensor[0, 0] = math.inf
        return tensor

    base = Checkpoint(tiny_base)
    tuned = open_weights(changed(tiny_base, tmp_path / "tuned", name, broken), base)
    found = places(drift_rows(base, {"a": tuned}))
    assert found["a", "model.layers", 1, "mlp.up_proj"] is None
    assert found["a", "model.layers", 0, "mlp.up_proj"] == 0


def test_of_a_large_model_a_share_is_enough(tiny_base: Path, tiny_tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit only a part of every block is read, and the ratios stay near the whole ones."""
    base = Checkpoint(tiny_base)
    whole = places(drift_rows(base, {"a": open_weights(tiny_tuned, base)}))
    shares = []
    survey = tuning.survey

    def noted(*given: Any, sample: float, **more: Any) -> Any:
        shares.append(sample)
        return survey(*given, sample=sample, **more)

    monkeypatch.setattr(tuning, "survey", noted)
    monkeypatch.setattr(tuning, "MOST_ELEMENTS", 1)
    part = places(drift_rows(base, {"a": open_weights(tiny_tuned, base)}))
    assert shares[0] < 0.001
    assert part.keys() == whole.keys()
    for place, change in whole.items():
        assert part[place] == pytest.approx(change, rel=0.1), place
