"""Tensors that only one side of a merge has: taken for what they are if that is clear, else refused with the cause."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from architectures import ARCHITECTURES
from backmerge.checkpoints.adapter import PREFIX, TENSORS, open_weights
from backmerge.checkpoints.compare import check_same_shape
from backmerge.checkpoints.reader import SINGLE, Checkpoint, Weights
from backmerge.errors import BackmergeError, CheckpointError, MergeError
from backmerge.merging.engine import merged_tensors
from backmerge.merging.live import LiveMerge
from backmerge.merging.method import find_method
from backmerge.merging.recipe import Variant

Factory = Callable[..., Path]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def changed(model: Path, folder: Path, changes: Mapping[str, Tensor | None], **config: object) -> Path:
    """A copy of a model with other tensors and settings."""
    shutil.copytree(model, folder)
    tensors = {**load_file(folder / SINGLE), **changes}
    save_file({name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}, folder / SINGLE)
    if config:  # else the file keeps its bytes
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    return folder


def opened(base: Path, tuned: Path) -> tuple[Checkpoint, Weights]:
    """Both sides, found to fit each other."""
    ours = Checkpoint(base)
    theirs = open_weights(tuned, ours)
    check_same_shape(ours, theirs)
    return ours, theirs


def merged(base: Path, tuned: Path, method: str = "linear") -> dict[str, Tensor]:
    """The merge at λ=0.5."""
    ours, theirs = opened(base, tuned)
    return dict(merged_tensors(Variant(ours, theirs, find_method(method), 0.5)))


@pytest.fixture
def tied(make_model: Factory) -> tuple[Path, Path]:
    """A base with tied embeddings and a model tuned from it, neither with a head on disk."""
    return make_model("llama", seed=1, tied=True), make_model("llama", seed=2, tied=True)


def with_head(model: Path, folder: Path, **config: object) -> Path:
    """The model with its head saved, too."""
    return changed(model, folder, {HEAD: load_file(model / SINGLE)[EMBEDDING]}, **config)


@pytest.mark.parametrize("side", ["base", "tuned", "both"])
@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_a_tied_head_saved_on_one_side_is_the_embedding(
    tied: tuple[Path, Path], tmp_path: Path, side: str, method: str
) -> None:
    """The merge is that of the models without it; where the base has the head, the result has it, still a copy."""
    plain = merged(*tied, method)
    base, tuned = tied
    if side != "tuned":
        base = with_head(base, tmp_path / "base")
    if side != "base":
        tuned = with_head(tuned, tmp_path / "tuned")
    found = merged(base, tuned, method)
    if side != "tuned":
        assert torch.equal(found.pop(HEAD), plain[EMBEDDING])
    assert found.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in found.items())


def test_the_fingerprint_is_that_of_the_model_saved_so(tied: tuple[Path, Path], tmp_path: Path) -> None:
    """With or without the copy of its head on disk, a tuned model is the same one."""
    base, tuned = tied
    twin = with_head(tuned, tmp_path / "tuned")
    assert opened(base, twin)[1].fingerprint == opened(base, tuned)[1].fingerprint
    bases = with_head(base, tmp_path / "base")
    assert opened(bases, twin)[1].fingerprint == opened(bases, tuned)[1].fingerprint


def test_a_head_without_its_counterpart_is_refused_with_the_cause(tied: tuple[Path, Path], tmp_path: Path) -> None:
    """A head that was trained apart, or a config that says so, has nothing to be merged with."""
    base, tuned = tied
    own = {HEAD: torch.ones_like(load_file(base / SINGLE)[EMBEDDING])}
    untied = {
        "has its own head.* but the base .* ties": (base, changed(tuned, tmp_path / "1", own)),
        "not tied.*plain copy": (base, with_head(tuned, tmp_path / "2", tie_word_embeddings=False)),
        "the base .*has its own head": (changed(base, tmp_path / "3", own, tie_word_embeddings=False), tuned),
        "head would be random": (
            with_head(base, tmp_path / "4"),
            changed(tuned, tmp_path / "5", {}, tie_word_embeddings=False),
        ),
    }
    for words, (ours, theirs) in untied.items():
        with pytest.raises(MergeError, match=words) as caught:
            merged(ours, theirs)
        assert caught.value.remedy
        assert "give the base that the tuned model was made from" not in caught.value.remedy


@pytest.mark.parametrize("name", ["Gemma 3, with vision", "Qwen3-MoE", "Mixtral"])
def test_a_model_saved_under_other_names_is_the_same_model(tmp_path: Path, name: str) -> None:
    """A base in the hub's names and a tuned model in those in memory, experts stacked: merged, in the base's names."""
    architecture = next(one for one in ARCHITECTURES if one.name == name)
    for number, folder in enumerate(("base", "tuned")):
        architecture.random_model(number).save_pretrained(tmp_path / folder)
    architecture.random_model(1).save_pretrained(tmp_path / "new", save_original_format=False)
    assert Checkpoint(tmp_path / "new").infos.keys() != Checkpoint(tmp_path / "base").infos.keys()
    expected, found = (merged(tmp_path / "base", tmp_path / folder) for folder in ("tuned", "new"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def test_experts_that_only_the_base_has_stacked_are_refused_with_the_way(tmp_path: Path) -> None:
    """The remedy is tried: saved so, they merge."""
    architecture = next(one for one in ARCHITECTURES if one.name == "Qwen3-MoE")
    architecture.random_model(0).save_pretrained(tmp_path / "base", save_original_format=False)
    architecture.random_model(1).save_pretrained(tmp_path / "tuned")
    with pytest.raises(MergeError, match=r"is 4 tensors in the tuned model") as caught:
        merged(tmp_path / "base", tmp_path / "tuned")
    assert "save_original_format=False" in str(caught.value.remedy)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    model.save_pretrained(tmp_path / "new", save_original_format=False)
    assert merged(tmp_path / "base", tmp_path / "new")


BUFFERS = {
    "Llama": {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.arange(2.0) for layer in range(2)},
    "GPT-2": {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(2)},
}


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_that_the_model_computes_are_no_difference(tmp_path: Path, name: str, side: str) -> None:
    """Rotary frequencies and causal masks, as older libraries save them, may be on either side."""
    architecture = next(one for one in ARCHITECTURES if one.name == name)
    for number, folder in enumerate(("base", "tuned")):
        architecture.random_model(number).save_pretrained(tmp_path / folder)
    plain = merged(tmp_path / "base", tmp_path / "tuned")
    folders = {folder: tmp_path / folder for folder in ("base", "tuned")}
    folders[side] = changed(folders[side], tmp_path / "changed", BUFFERS[name])
    found = merged(folders["base"], folders["tuned"])
    assert found.keys() - plain.keys() == (BUFFERS[name].keys() if side == "base" else set())
    assert all(torch.equal(found[key], tensor) for key, tensor in plain.items())


@pytest.mark.parametrize("name", BUFFERS)
def test_a_model_with_such_buffers_on_disk_is_swept_in_memory(tmp_path: Path, name: str) -> None:
    """Llama 2's own files hold them; the model has no place for them, and needs none."""
    architecture = next(one for one in ARCHITECTURES if one.name == name)
    for number, folder in enumerate(("plain", "tuned")):
        architecture.random_model(number).save_pretrained(tmp_path / folder)
    base, tuned = opened(changed(tmp_path / "plain", tmp_path / "base", BUFFERS[name]), tmp_path / "tuned")
    live = AutoModelForCausalLM.from_pretrained(base.directory)
    sweep = LiveMerge(live, base)
    assert sweep.is_possible()
    sweep.set(Variant(base, tuned, lam=0.5))
    expected = merged(tmp_path / "plain", tmp_path / "tuned")
    assert all(torch.equal(live.state_dict()[key], tensor) for key, tensor in expected.items())


def test_another_tensor_on_one_side_is_still_refused(tied: tuple[Path, Path], tmp_path: Path) -> None:
    """What the model has no place for, and nobody knows to be derived, is a difference."""
    base, tuned = tied
    with pytest.raises(MergeError, match=r"'model.layers.0.extra.weight' is only in the tuned model"):
        merged(base, changed(tuned, tmp_path / "tuned", {"model.layers.0.extra.weight": torch.ones(2)}))


def test_padded_embeddings_error_has_a_remedy(tied: tuple[Path, Path], make_adapter: Factory, tmp_path: Path) -> None:
    """Rows padded to a multiple of 64 are an option on the tuned side, and a resize that is named on the other."""
    base, tuned = tied
    matrix = load_file(base / SINGLE)[EMBEDDING]
    padded = torch.cat([matrix, torch.zeros(-len(matrix) % 64, matrix.shape[1])])
    wide = {EMBEDDING: padded}
    adapter = shutil.copytree(make_adapter(base, seed=2), tmp_path / "adapter")
    save_file({**load_file(adapter / TENSORS), f"{PREFIX}{EMBEDDING}": padded}, adapter / TENSORS)
    low_rank = make_adapter(base, seed=2, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    low_rank = shutil.copytree(low_rank, tmp_path / "low-rank")
    factor = f"{PREFIX}model.embed_tokens.lora_embedding_A"
    save_file({**load_file(low_rank / TENSORS), factor: torch.ones(4, len(padded))}, low_rank / TENSORS)
    more = {"vocab_size": len(padded)}
    cases: list[tuple[Path, Path, type[BackmergeError], str]] = [
        (base, changed(tuned, tmp_path / "1", wide, **more), MergeError, "rows padded in tuning, --extra-rows tuned"),
        (changed(base, tmp_path / "2", wide, **more), tuned, MergeError, "call resize_token_embeddings"),
        (base, adapter, CheckpointError, f"resize_token_embeddings\\({len(padded)}\\)"),
        (base, low_rank, CheckpointError, f"resize_token_embeddings\\({len(padded)}\\)"),
    ]
    for ours, theirs, kind, remedy in cases:
        with pytest.raises(kind, match=remedy):
            opened(ours, theirs)
