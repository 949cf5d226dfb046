"""The folders that other trainers leave: each is taken as the tuned model that it holds, whatever lies next to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from backmerge.checkpoints.adapter import AdapterOnBase, open_weights
from backmerge.checkpoints.reader import Checkpoint

PICKLE = b"\x80\x04K\x01."  # what torch.save would have left: never opened


@pytest.fixture(scope="module")
def base(make_model: Callable[..., Path]) -> Path:
    """The model that was tuned."""
    return make_model("llama", seed=1)


@pytest.fixture
def adapter(base: Path, make_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    """An adapter on it, alone in its folder."""
    return shutil.copytree(make_adapter(base, seed=2), tmp_path / "adapter")


def axolotl(folder: Path, base: Path) -> None:
    """`output_dir`: the base's config.json lies next to the adapter, and checkpoints in it."""
    shutil.copyfile(base / "config.json", folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, folder / name)
    shutil.copytree(folder, folder / "checkpoint-20")
    (folder / "checkpoint-20" / "optimizer.pt").write_bytes(PICKLE)


def llama_factory(folder: Path, base: Path) -> None:
    """`saves/MODEL/lora/sft`: logs, metrics, pickled arguments, and a chat template as a file."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base / name, folder / name)
    (folder / "training_args.bin").write_bytes(PICKLE)
    (folder / "trainer_log.jsonl").write_text('{"current_steps": 5}\n')
    (folder / "all_results.json").write_text('{"train_loss": 1.0}')


def unsloth(folder: Path, base: Path) -> None:
    """`save_pretrained("lora_model")`: names the 4-bit copy that it was trained on."""
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "unsloth/llama-3-8b-Instruct-bnb-4bit"
    (folder / "adapter_config.json").write_text(json.dumps(config))


def torchtune(folder: Path, base: Path) -> None:
    """`epoch_0`: few fields in the configuration, a pickled twin, and the merged model in the same folder."""
    config = json.loads((folder / "adapter_config.json").read_text())
    kept = {key: config[key] for key in ("r", "lora_alpha", "target_modules")}
    (folder / "adapter_config.json").write_text(json.dumps({**kept, "peft_type": "LORA"}))
    (folder / "adapter_model.pt").write_bytes(PICKLE)
    shutil.copyfile(base / "config.json", folder / "config.json")
    shutil.copyfile(base / "model.safetensors", folder / "model-00001-of-00001.safetensors")


@pytest.mark.parametrize("layout", [axolotl, llama_factory, unsloth, torchtune])
def test_the_adapter_is_found_among_a_trainers_files(
    layout: Callable[[Path, Path], None], base: Path, adapter: Path, tmp_path: Path
) -> None:
    """The same tuned model as the bare adapter gives."""
    folder = shutil.copytree(adapter, tmp_path / layout.__name__)
    layout(folder, base)
    on = Checkpoint(base)
    bare, found = open_weights(adapter, on), open_weights(folder, on)
    assert isinstance(found, AdapterOnBase)
    name = min(found.factors)
    assert torch.equal(found.tensor(name), bare.tensor(name))
    assert not torch.equal(found.tensor(name), on.tensor(name))


def test_torchtunes_full_model_is_a_checkpoint(base: Path, tmp_path: Path) -> None:
    """Full tuning: shards named like the hub's with an index, next to the base's files."""
    folder = tmp_path / "epoch_0"
    folder.mkdir()
    shutil.copyfile(base / "config.json", folder / "config.json")
    shutil.copyfile(base / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    weights = dict.fromkeys(Checkpoint(base).infos, "model-00001-of-00001.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "recipe_state.pt").write_bytes(PICKLE)
    found = open_weights(folder, Checkpoint(base))
    name = min(weights)
    assert torch.equal(found.tensor(name), Checkpoint(base).tensor(name))
