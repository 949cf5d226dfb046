"""What differs next to the weights, line by line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.differences import differences
from backmerge.checkpoints.reader import SINGLE, Checkpoint
from backmerge.errors import CheckpointError

Factory = Callable[..., Path]


@pytest.fixture
def pair(make_model: Factory, tmp_path: Path) -> tuple[Path, Path]:
    """A model and a copy of it, to be changed."""
    base = make_model("llama", seed=1)
    return base, shutil.copytree(base, tmp_path / "tuned")


def found(base: Path, tuned: Path) -> dict[str, list[str]]:
    """The lines by topic."""
    topics: dict[str, list[str]] = {}
    for topic, line in differences(Checkpoint(base), Checkpoint(tuned)):
        topics.setdefault(topic, []).append(line)
    return topics


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file."""
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def test_nothing_differs_between_copies(pair: tuple[Path, Path]) -> None:
    """A copy, whatever its values, has no line; neither have keys that say nothing of the model."""
    rewrite(pair[1] / "config.json", lambda config: config.update(transformers_version="0", _name_or_path="x"))
    assert found(*pair) == {}


def test_tensors_are_named_with_both_sides(pair: tuple[Path, Path]) -> None:
    """Missing, added, of another shape, of another dtype."""
    tensors = load_file(pair[1] / SINGLE)
    tensors["model.extra.weight"] = torch.zeros(2)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.zeros(8)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
    save_file(tensors, pair[1] / SINGLE)
    lines = "\n".join(found(*pair)["tensors"])
    for words in ("model.extra.weight", "model.layers.1.mlp.up_proj.weight", "(32,)", "(8,)", "F32", "BF16"):
        assert words in lines


def test_tokens_template_and_config(pair: tuple[Path, Path]) -> None:
    """Added and special tokens, another chat template, and settings that decide what the model computes."""
    tuned = pair[1]
    rewrite(tuned / "tokenizer.json", lambda t: t["model"]["vocab"].update({"<|new|>": len(t["model"]["vocab"])}))
    rewrite(tuned / "tokenizer_config.json", lambda t: t.update({"eos_token": "<|user|>"}))
    (tuned / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    rewrite(tuned / "config.json", lambda config: config.update(rope_theta=5e5, max_position_embeddings=512))
    topics = found(*pair)
    assert "<|new|>" in "\n".join(topics["vocabulary"])
    assert "<|user|>" in "\n".join(topics["special tokens"])
    assert topics["chat template"]
    config = "\n".join(topics["config"])
    assert "max_position_embeddings" in config
    assert "512" in config


def test_adapter_is_described(make_model: Factory, make_adapter: Factory) -> None:
    """Its rank, alpha, targets, and what it trains whole."""
    base = Checkpoint(make_model("llama", seed=1))
    adapter = make_adapter(base.directory, seed=1, target_modules=["q_proj"], modules_to_save=["lm_head"])
    lines = "\n".join(line for topic, line in differences(base, AdapterOnBase(adapter, base)) if topic == "adapter")
    for words in ("4", "8", "q_proj", "lm_head"):
        assert words in lines


def test_four_bit_base_is_reported(make_model: Factory, make_adapter: Factory, tmp_path: Path) -> None:
    """An adapter that was trained on a quantised base says what it is merged onto."""
    base = Checkpoint(make_model("llama", seed=1))
    adapter = shutil.copytree(make_adapter(base.directory, seed=1), tmp_path / "adapter")
    rewrite(adapter / "adapter_config.json", lambda c: c.update(base_model_name_or_path="unsloth/llama-3-8b-bnb-4bit"))
    opened = AdapterOnBase(adapter, base)
    assert opened.note is not None
    assert "trained on a quantised base (unsloth/llama-3-8b-bnb-4bit)" in opened.note
    assert str(base.directory) in opened.note
    assert any("quantised" in line for _, line in differences(base, opened))
    assert AdapterOnBase(make_adapter(base.directory, seed=1), base).note is None


def test_a_damaged_file_is_an_error(pair: tuple[Path, Path]) -> None:
    """Half a JSON file is named."""
    (pair[1] / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        found(*pair)
