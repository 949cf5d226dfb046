"""Bases that the tests of adapters are made on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from backmerge.checkpoints.reader import Checkpoint

Factory = Callable[..., Path]


@pytest.fixture(scope="session")
def make_base(make_model: Factory, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """`make_base(architecture)`: an untied base; GPT-2 is tied, and stores its layers (in, out)."""
    from transformers import AutoModelForCausalLM, GPT2Config

    def make(architecture: str) -> Checkpoint:
        if architecture != "gpt2":
            return Checkpoint(make_model(architecture, seed=1, tied=False))
        directory = tmp_path_factory.getbasetemp() / "gpt2"
        if not directory.exists():
            config = GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2)
            with torch.random.fork_rng():
                torch.manual_seed(1)
                AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        return Checkpoint(directory)

    return make


@pytest.fixture
def base(make_base: Callable[[str], Checkpoint]) -> Checkpoint:
    """An untied Llama."""
    return make_base("llama")
