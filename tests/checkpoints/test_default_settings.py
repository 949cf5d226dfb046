"""No language model class of transformers, at full size with its default settings, is taken for damaged."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from backmerge.checkpoints.model_config import check_settings
from backmerge.checkpoints.reader import SINGLE, Checkpoint
from backmerge.errors import CheckpointError

# names alone: the classes are imported when a test needs them
FOUND = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()]
NAMES = {name for names in FOUND for name in ((names,) if isinstance(names, str) else names)}
UNUSUAL = ["Mamba2ForCausalLM", "MllamaForCausalLM"]  # no attention; more embeddings than vocab_size


def sparse_checkpoint(name: str, folder: Path) -> Path:
    """A checkpoint in bfloat16 with all tensors' names and shapes; its file is one large hole."""
    cls: Any = getattr(transformers, name, None)
    if cls is None:
        pytest.skip("this version of transformers does not have it")
    try:
        config = cls.config_class()
        with torch.device("meta"):
            model = cls(config)
    except Exception as error:  # noqa: BLE001  boundary: transformers cannot build each class from its own defaults
        pytest.skip(f"cannot be built from its defaults: {error!r:.80}")
    config.save_pretrained(folder)
    header, end = {}, 0
    for key, tensor in model.state_dict().items():
        if key not in (model.all_tied_weights_keys or {}):
            begin, end = end, end + 2 * tensor.numel()
            header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
    os.truncate(folder / SINGLE, 8 + len(text) + end)
    return folder


@pytest.mark.parametrize("name", UNUSUAL)
def test_a_model_with_unusual_counts_is_opened(name: str, tmp_path: Path) -> None:
    """Its settings are valid, and its tensors are those that they describe."""
    folder = sparse_checkpoint(name, tmp_path)
    check_settings(folder)
    assert Checkpoint(folder).infos


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [("vocab_size", 200_000, "vocab_size of 200000"), ("num_hidden_layers", 50, "describes 50")],
)
def test_unusual_counts_are_still_checked(setting: str, value: int, words: str, tmp_path: Path) -> None:
    """More embeddings than vocab_size fit Llama 3.2 Vision, but neither fewer nor missing layers."""
    folder = sparse_checkpoint("MllamaForCausalLM", tmp_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.get("text_config", config)[setting] = value
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=words):
        Checkpoint(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(NAMES - set(UNUSUAL)))
def test_a_model_of_default_settings_is_opened(name: str, tmp_path: Path) -> None:
    """The same, for all classes."""
    test_a_model_with_unusual_counts_is_opened(name, tmp_path)
