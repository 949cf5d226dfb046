"""Statistics of the inputs of layers, of random inputs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backmerge.checkpoints.reader import Checkpoint
from backmerge.merging.inputs import GatheredLayer, InputStatistics, LayerInputs, Provenance, write_statistics
from backmerge.merging.method import find_method
from backmerge.merging.second_moments import SecondMoments

WIDTH = 12


def rows(count: int, seed: int, width: int = WIDTH) -> Tensor:
    """Inputs whose variances differ by three orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(1, -0.5, width)[torch.randperm(width, generator=generator)]
    return torch.randn(count, width, generator=generator) * scales


def gathered(inputs: Tensor, max_directions: int = 1024, parts: int = 3) -> LayerInputs:
    """Their second moments, taken in a few at a time."""
    moments = SecondMoments(inputs.shape[1], max_directions)
    for part in inputs.chunk(parts):
        moments.add(part)
    return moments.found()


def statistics(base: Checkpoint, path: Path, seed: int = 0, **changes: Any) -> InputStatistics:
    """Statistics of random inputs for every matrix of the layers, q with k and v."""
    provenance = Provenance(
        model=base.fingerprint, kind="ordinary", source="test", num_prompts=1, num_tokens=20, max_new_tokens=0,
        dtype="float32", max_directions=1024,
    )  # fmt: skip
    layers: dict[str, GatheredLayer] = {}
    for number, (name, info) in enumerate(base.infos.items()):
        if len(info.shape) != 2 or any(part in name for part in ("embed", "lm_head", "wte", "wpe")):
            continue
        is_transposed = name.startswith("transformer.")  # GPT-2
        inputs = gathered(rows(20, seed + number, info.shape[0 if is_transposed else 1]))
        inputs = replace(inputs, is_transposed=is_transposed)
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            continue
        tensors = (name,)
        if name.endswith("q_proj.weight"):
            tensors = tuple(name.replace("q_proj", each) for each in ("q_proj", "k_proj", "v_proj"))
        layers[name] = GatheredLayer(tensors, inputs)
    write_statistics(path, provenance.model_copy(update=changes), layers)
    return InputStatistics(path)


def inputs_for(method: str, base: Checkpoint, directory: Path) -> dict[str, InputStatistics]:
    """The statistics that a method of the table asks for: none for most."""
    return {kind: statistics(base, directory / kind) for kind in find_method(method).inputs}
