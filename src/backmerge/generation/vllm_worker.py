"""Live weights in vLLM: its workers merge models themselves, and load the merge like a checkpoint.

vLLM's workers may be other processes, one for each GPU. So they get a description, with folders and numbers, and each
of them merges: the tensors go through the model's own loader, which knows that q, k and v are one tensor in vLLM, and
takes its share of each. Every worker reads all of the inputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backmerge.checkpoints.adapter import AdapterOnBase, open_weights
from backmerge.checkpoints.reader import Checkpoint, Weights
from backmerge.errors import BackmergeError
from backmerge.merging.engine import merged_tensors
from backmerge.merging.inputs import InputStatistics
from backmerge.merging.method import find_method
from backmerge.merging.recipe import Variant
from backmerge.registry import Permissions

if TYPE_CHECKING:
    from torch import nn

EXTENSION = f"{__name__}.LiveWeights"
DRIVER_ALLOWED = Permissions(plugins=True)  # descriptions only contain methods that the driver was allowed to load


class LiveWeights:
    """Methods that backmerge adds to vLLM's workers (`worker_extension_cls`)."""

    def set_merged_weights(self: Any, description: str) -> list[str | None] | None:
        """Overwrite the model's weights with those of a variant.

        Args:
            description: The result of `described`.

        Returns:
            Message and remedy if the merge fails because of a user error; an error's type would be lost between
            processes.
        """
        try:
            variant = variant_of(json.loads(description))
            self.reload_weights(weights_iterator=merged_tensors(variant))
        except BackmergeError as error:
            return [error.message, error.remedy]
        renew_tied_head(self.model_runner.get_model())
        return None


def renew_tied_head(model: nn.Module) -> None:
    """Update an output layer that shares the embedding after the embedding changed.

    On a CPU vLLM computes with a packed copy of each matrix; when it reloads weights, it repacks those that are in the
    checkpoint. A tied output layer is not, so it would keep the old copy.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(module, ParallelLMHead) and method is not None:
            method.process_weights_after_loading(module)


def described(variant: Variant) -> str | None:
    """Return a variant as JSON for another process; `None` if its parts are not all folders on disk."""
    models = {"base": [variant.base], "tuned": variant.tuned_models, "extra": variant.extra.values()}
    for weights in (weights for kind in models.values() for weights in kind):
        if not _is_on_disk(weights, variant.base):
            return None
    plain = {
        "base": str(variant.base.directory.resolve()),
        "tuned": [str(weights.directory.resolve()) for weights in variant.tuned_models],
        "extra": {name: str(weights.directory.resolve()) for name, weights in variant.extra.items()},
        "inputs": {name: str(statistics.path.resolve()) for name, statistics in variant.inputs.items()},
        "method": variant.method.name,
        "lam": variant.lam,
        "parameters": dict(variant.parameters),
        "seed": variant.seed,
        "dtype": variant.dtype,
        "rounding": variant.rounding,
    }
    try:
        text = json.dumps(plain)
    except (TypeError, ValueError):  # a parameter that is not plain data
        return None
    return text if json.loads(text) == plain else None


def variant_of(description: Mapping[str, Any]) -> Variant:
    """Return the variant that `described` describes."""
    base = Checkpoint(Path(description["base"]))
    tuned = [open_weights(Path(directory), base) for directory in description["tuned"]]
    return Variant(
        base,
        None if not tuned else tuned[0] if len(tuned) == 1 else tuned,
        method=find_method(description["method"], DRIVER_ALLOWED),
        lam=description["lam"],
        parameters=description["parameters"],
        seed=description["seed"],
        extra={name: open_weights(Path(directory), base) for name, directory in description["extra"].items()},
        inputs={name: InputStatistics(Path(path)) for name, path in description["inputs"].items()},
        dtype=description["dtype"],
        rounding=description["rounding"],
    )


def _is_on_disk(weights: Weights, base: Weights) -> bool:
    is_adapter = type(weights) is AdapterOnBase and weights.base.directory == base.directory
    return is_adapter or type(weights) is Checkpoint
