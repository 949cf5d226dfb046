"""Models and tokenizers of a few thousand numbers, made on the spot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from backmerge.demo import model_directory


def random_mixtral(directory: Path, seed: int) -> Path:
    """A random mixture of experts, which transformers fuses as it loads, with the embedded model's tokenizer."""
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        num_local_experts=2,
        num_experts_per_tok=1,
        initializer_range=0.5,  # wide, so that the best tokens are far apart and answers vary
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model_directory() / name, directory / name)
    return directory


def embedded_copy(directory: Path, changes: Mapping[str, Mapping[str, Any]]) -> Path:
    """The embedded model with other values in its JSON files; a value of `None` takes the key out."""
    shutil.copytree(model_directory(), directory)
    for name, values in changes.items():
        old = json.loads((directory / name).read_text(encoding="utf-8"))
        new = {key: value for key, value in {**old, **values}.items() if value is not None}
        (directory / name).write_text(json.dumps(new), encoding="utf-8")
    return directory


def byte_tokenizer(special: tuple[str, ...], template: str, *, bos: str | None, eos: str) -> Any:
    """A tokenizer of single bytes and some special tokens, which puts BOS in front as Llama's and Gemma's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*special, *letters))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, additional_special_tokens=list(special)
    )
    tokenizer.chat_template = template
    return tokenizer
