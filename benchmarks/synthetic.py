"""Checkpoints and adapters of real shapes and made-up weights, big enough to time a merge of them."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

SPREAD = 0.02  # standard deviation of the weights, as models are initialised
NUM_SHARDS = 3
VOCABULARY = 32000
RANK = 8
ALPHA = 16


class Shape(NamedTuple):
    """What decides the tensors of a Llama."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    vocabulary: int = VOCABULARY

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by name, in the order of the model."""
        key_value = self.hidden // self.num_heads * self.num_key_value_heads
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            shapes[f"{prefix}.input_layernorm.weight"] = (self.hidden,)
            shapes[f"{prefix}.mlp.down_proj.weight"] = (self.hidden, self.intermediate)
            shapes[f"{prefix}.mlp.gate_proj.weight"] = (self.intermediate, self.hidden)
            shapes[f"{prefix}.mlp.up_proj.weight"] = (self.intermediate, self.hidden)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (self.hidden,)
            shapes[f"{prefix}.self_attn.k_proj.weight"] = (key_value, self.hidden)
            shapes[f"{prefix}.self_attn.o_proj.weight"] = (self.hidden, self.hidden)
            shapes[f"{prefix}.self_attn.q_proj.weight"] = (self.hidden, self.hidden)
            shapes[f"{prefix}.self_attn.v_proj.weight"] = (key_value, self.hidden)
        return shapes | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}

    @property
    def num_bytes(self) -> int:
        """Of all tensors, in bfloat16."""
        return 2 * sum(math.prod(shape) for shape in self.tensors().values())


LLAMA_3_8B = Shape(4096, 14336, 32, 32, 8, 128256)


def shape_of(gigabytes: float) -> Shape:
    """The shape whose checkpoint comes nearest to a size: layers as of a model of 1.1 billion, as many as fit."""
    width = (2048, 5632) if gigabytes >= 0.5 else (1024, 2816)  # a half GB is two such vocabularies and some layers
    none, one = (Shape(*width, layers, 32, 4).num_bytes for layers in (0, 1))
    return Shape(*width, max(1, round((gigabytes * 1e9 - none) / (one - none))), 32, 4)


def write_models(place: Path, shape: Shape, num_tuned: int, distance: float) -> tuple[Path, list[Path]]:
    """A base and tuned models of it, in bfloat16, each a folder of several shards.

    Args:
        place: Where the folders go; those that are there already are kept.
        shape: Of all of them.
        num_tuned: How many tuned models. Half of each one's delta is common to all, as it is after fine-tuning on
            one task with several seeds.
        distance: The norm of a delta, as a share of the weights'; infinite for models that have nothing in common.

    Returns:
        The base's folder, and those of the tuned models.
    """
    base, tuned = place / "base", [place / f"tuned-{number}" for number in range(1, num_tuned + 1)]
    for number, directory in enumerate([base, *tuned]):
        if not (directory / "config.json").exists():
            _write_shards(directory, shape, number, distance)
            _write_companions(directory, shape)
    return base, tuned


def _write_shards(directory: Path, shape: Shape, number: int, distance: float) -> None:
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for index, names in enumerate(_shards(shape), start=1):
        file = f"model-{index:05}-of-{NUM_SHARDS:05}.safetensors"
        shapes = shape.tensors()
        tensors = {name: _weights(name, shapes[name], number, distance) for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index_ = {"metadata": {"total_size": shape.num_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_, indent=2))


def _shards(shape: Shape) -> Iterator[list[str]]:
    """The names of each shard: as nearly equal as whole tensors allow, and none empty."""
    shapes = list(shape.tensors().items())
    start = written = 0
    for index in range(NUM_SHARDS):
        end = start
        while end < len(shapes) - (NUM_SHARDS - 1 - index) and written < (index + 1) * shape.num_bytes / NUM_SHARDS:
            written += 2 * math.prod(shapes[end][1])
            end += 1
        yield [name for name, _ in shapes[start:end]]
        start = end


def _weights(name: str, shape: tuple[int, ...], number: int, distance: float) -> Tensor:
    """One tensor of the base (number 0) or of a tuned model."""
    import torch

    centre = 1.0 if len(shape) == 1 else 0.0  # of norms
    if number == 0 or math.isinf(distance):
        return _normal(f"{name}/{number}", shape).mul_(SPREAD).add_(centre).bfloat16()
    delta = _normal(f"{name}/common", shape).add_(_normal(f"{name}/{number}", shape)).mul_(math.sqrt(0.5))
    base = _weights(name, shape, 0, distance).float()
    size = distance * float(torch.linalg.vector_norm(base)) / math.sqrt(base.numel())
    return base.add_(delta, alpha=size).bfloat16()


def _normal(key: str, shape: tuple[int, ...]) -> Tensor:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))


def write_tokenizer(directory: Path) -> None:
    """The smallest tokenizer that can be copied."""
    from tokenizers import Tokenizer, models

    vocabulary = {token: number for number, token in enumerate(("<s>", "</s>", "<unk>"))}
    Tokenizer(models.WordLevel(vocabulary, "<unk>")).save(str(directory / "tokenizer.json"))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2))


def _write_companions(directory: Path, shape: Shape) -> None:
    """Configuration and tokenizer; the configuration last, for it marks the folder as whole."""
    write_tokenizer(directory)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def write_adapter(directory: Path, base: Path, shape: Shape, distance: float) -> Path:
    """A LoRA of rank 8 on all linear layers, whose delta has `distance` times the norm of the weights; its folder."""
    import torch
    from safetensors.torch import save_file

    if (directory / "adapter_config.json").exists():
        return directory
    directory.mkdir(parents=True)
    size = SPREAD * min(distance, 1.0)
    factors: dict[str, Tensor] = {}
    modules: set[str] = set()
    for name, sizes in shape.tensors().items():
        if "_proj." not in name:
            continue
        module = name.removesuffix(".weight")
        modules.add(module.rpartition(".")[2])
        a = _normal(f"{name}/A", (RANK, sizes[1])) / math.sqrt(sizes[1])
        # (ALPHA / RANK)·B·A has elements of this size, each a sum over the rank
        b = _normal(f"{name}/B", (sizes[0], RANK)) * size * math.sqrt(sizes[1] / RANK) * RANK / ALPHA
        factors[f"base_model.model.{module}.lora_A.weight"] = a.to(torch.float32)
        factors[f"base_model.model.{module}.lora_B.weight"] = b.to(torch.float32)
    save_file(factors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(modules),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return directory
