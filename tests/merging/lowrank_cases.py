"""Adapters with something put in place, and a method of the tests' own."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backmerge.checkpoints.adapter import TENSORS
from backmerge.checkpoints.adapter_config import CONFIG
from backmerge.merging.method import Method, merge_method
from backmerge.registry import METHODS

Tensors = dict[str, Tensor]


def config_of(adapter: Path) -> dict[str, Any]:
    """Its configuration."""
    values: dict[str, Any] = json.loads((adapter / CONFIG).read_text())
    return values


def changed(adapter: Path, to: Path, tensors: Tensors | None = None, **settings: Any) -> Path:
    """A copy of an adapter with some tensors and settings put in place of its own."""
    shutil.copytree(adapter, to)
    save_file({**load_file(to / TENSORS), **(tensors or {})}, to / TENSORS)
    (to / CONFIG).write_text(json.dumps(config_of(to) | settings))
    return to


def put(monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
    """Let the name `tested` be a method, for a test's duration."""
    monkeypatch.setattr(sys.modules[__name__], "TESTED", method, raising=False)
    monkeypatch.setitem(METHODS.entries, "tested", f"{__name__}:TESTED")


def shares_by_angle(gram: np.ndarray, /, *, power: float = 1.0) -> list[float]:
    """Shares that hang on every entry of the inner products, and differ from model to model."""
    total = gram.sum() or 1.0
    return [float(np.sign(row.sum()) * (abs(row.sum()) / total) ** power) for row in gram]


def inner_products(base: Tensor, tuned: Sequence[Tensor], /) -> np.ndarray:
    """The deltas' inner products, as a method for checkpoints finds them."""
    deltas = torch.stack([(one - base).double() for one in tuned])
    return (deltas @ deltas.T).numpy()


@merge_method(
    has_exact_endpoints=False,
    is_idempotent=True,
    num_tuned=(1, None),
    reductions=[inner_products],
    coefficients=shares_by_angle,
)
def by_angle(base: Tensor, tuned: Sequence[Tensor], statistics: Any, /, *, power: float = 1.0) -> Tensor:
    """Base + Σ cᵢ·Δᵢ, with shares from the angles: Model Stock's kind."""
    shares = shares_by_angle(statistics[0], power=power)
    return base + sum(share * (one - base) for share, one in zip(shares, tuned, strict=True))
