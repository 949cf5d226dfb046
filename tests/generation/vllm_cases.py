"""What the tests of the engine vllm ask for."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import benchmarks
from backmerge.generation.protocol import Request, Sampling
from backmerge.merging.recipe import Variant

LAMS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
GREEDY = Sampling(max_new_tokens=24)
EXAMPLES = (*benchmarks.plans().examples[:10], *benchmarks.harmful().examples[:10])
OPTIONS = {"own_process": False, "kv_cache_gb": 0.25, "gpu_memory_utilization": 0.2}


def said(engine: Any, requests: Sequence[Request], advance: Callable[[int], None] = lambda _: None) -> list[Any]:
    """Each request's completions, in the order of the requests."""
    found = dict(engine.generate_many(requests, advance))
    return [found[place] for place in range(len(requests))]


def sweep_of(base: Checkpoint, tuned: Any, lams: Sequence[float] = LAMS, sampling: Sampling = GREEDY) -> list[Request]:
    """Requests for a linear merge at several λs."""
    return [Request(Variant(base, tuned, lam=lam), EXAMPLES, sampling) for lam in lams]


def moved(base: Checkpoint, directory: Path, by: float) -> Path:
    """A copy of a model with noise in every tensor."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base.directory, directory)
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    tensors = {n: t + by * t.std() * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
