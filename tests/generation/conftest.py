"""The embedded model and adapters on it, for the tests of engines that serve many λs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backmerge.checkpoints.adapter import open_weights
from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import model_directory


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    """The embedded model, whose embeddings are tied."""
    return Checkpoint(model_directory())


@pytest.fixture(scope="module")
def adapter(base: Checkpoint, make_adapter: Callable[..., Path]) -> Any:
    """A LoRA that is strong enough to change what is said at small λs."""
    return open_weights(make_adapter(base.directory, seed=1, lora_alpha=40), base)


@pytest.fixture(scope="module")
def wide_adapter(base: Checkpoint, make_adapter: Callable[..., Path]) -> Any:
    """A LoRA of another rank."""
    return open_weights(make_adapter(base.directory, seed=2, r=12, lora_alpha=40), base)
