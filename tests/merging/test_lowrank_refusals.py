"""What cannot be an adapter is refused by name, before anything is written."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lowrank_cases import by_angle, changed, put
from safetensors.torch import load_file, save_file
from torch import Tensor

from backmerge.checkpoints.adapter import PREFIX, TENSORS, AdapterOnBase
from backmerge.checkpoints.reader import Checkpoint
from backmerge.errors import CheckpointError, MergeError
from backmerge.merging.lowrank import adapter_obstacle, write_adapter
from backmerge.merging.method import Survey, find_method, merge_method
from backmerge.merging.recipe import Variant

Factory = Callable[..., Path]
Merge = Callable[[Path, Path], dict[str, Tensor]]
Tensors = dict[str, Tensor]


def refusals(base: Checkpoint, make_model: Factory, make_adapter: Factory, tmp_path: Path) -> dict[str, Variant]:
    """A recipe for each obstacle, by the words that name it."""

    def adapter(seed: int = 2, **settings: Any) -> AdapterOnBase:
        return AdapterOnBase(make_adapter(base.directory, seed=seed, **settings), base)

    lora, other = adapter(), Checkpoint(make_model("llama", seed=5, tied=False))
    head_lora, head_saved = adapter(target_modules=["lm_head"]), adapter(3, modules_to_save=["lm_head"])
    wide = adapter(target_modules=["up_proj"])
    swapped = {"A": "B", "B": "A"}
    tensors = {
        re.sub("(?<=lora_)[AB]", lambda match: swapped[match[0]], name): tensor.T.contiguous()
        for name, tensor in load_file(wide.directory / TENSORS).items()
    }
    turned = changed(wide.directory, tmp_path / "turned", tensors, fan_in_fan_out=True)
    bare = changed(wide.directory, tmp_path / "bare")
    save_file({f"{PREFIX}model.norm.weight": torch.ones(32)}, bare / TENSORS)
    tied = Checkpoint(make_model("llama", seed=1, tied=True))
    twins = make_adapter(tied.directory, seed=2, target_modules=["q_proj", "embed_tokens"])
    return {
        "it is the base itself": Variant(base),
        "'slerp' is not a weighted sum": Variant(base, lora, find_method("slerp"), 0.5),
        "stochastic rounding": Variant(base, lora, dtype="BF16", rounding="stochastic"),
        "not written in F64": Variant(base, lora, dtype="F64"),
        "is not an unchanged checkpoint on disk": Variant(lora, AdapterOnBase(lora.directory, lora)),
        f"{other.directory} is a full checkpoint": Variant(base, other),
        "not on the base": Variant(other, lora),
        "is DoRA: its change of 'model.layers.0": Variant(base, adapter(use_dora=True)),
        "differ in fan_in_fan_out": Variant(base, [wide, AdapterOnBase(turned, base)], find_method("tested")),
        "'lm_head.weight' is trained whole, but its module also has low-rank": Variant(
            base, [head_lora, head_saved], find_method("tested")
        ),
        "no tensor has low-rank factors": Variant(base, AdapterOnBase(bare, base)),
        "needs more models": Variant(base, lora, extra={"unaligned": other}),
        "together with the tensor tied to it": Variant(
            tied, AdapterOnBase(changed(twins, tmp_path / "twins", ensure_weight_tying=True), tied)
        ),
    }


@pytest.mark.parametrize("number", range(13))
def test_unsupported_adapters_are_refused_by_name(
    base: Checkpoint,
    make_model: Factory,
    make_adapter: Factory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    """Each obstacle says what stands in the way, and nothing is written; a plain LoRA has none."""
    put(monkeypatch, by_angle)
    found = refusals(base, make_model, make_adapter, tmp_path)
    assert len(found) == 13
    words, variant = list(found.items())[number]
    obstacle = adapter_obstacle(variant)
    assert obstacle is not None
    assert words in obstacle
    with pytest.raises(MergeError, match="this recipe cannot be written as an adapter") as caught:
        write_adapter(variant, tmp_path / "out")
    assert obstacle in caught.value.message
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()
    assert adapter_obstacle(Variant(base, AdapterOnBase(make_adapter(base.directory, seed=2), base), lam=0.5)) is None


def test_method_that_surveys_the_model_cannot_be_an_adapter(
    base: Checkpoint, make_adapter: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parameters are settled on dense tensors: an obstacle only where it asks for that."""
    survey = Survey(lambda *_: 0.0, lambda _, given: given, lambda given: "top" in given)
    declare = merge_method(
        has_exact_endpoints=False, is_idempotent=True, survey=survey, coefficients=lambda *_, **__: [1.0]
    )

    def surveyed(base: Tensor, tuned: Tensor, /, *, top: float = 0.0) -> Tensor:
        return tuned

    put(monkeypatch, declare(surveyed))
    tuned = AdapterOnBase(make_adapter(base.directory, seed=2), base)
    assert adapter_obstacle(Variant(base, tuned, find_method("tested"))) is None
    assert "measures all tensors" in str(
        adapter_obstacle(Variant(base, tuned, find_method("tested"), parameters={"top": 0.5}))
    )


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ({"lam": 1.5}, "λ is 1.5"),
        ({"lam": {"atention": 0.5, "rest": 1}}, "no tensor of the base matches 'atention'"),
        ({"parameters": {"weight": 1}}, "linear has no parameter 'weight'"),
        ({"parameters": {"lam": 1}}, "'lam' is among"),
    ],
    ids=str,
)
def test_a_wrong_recipe_is_refused(
    base: Checkpoint, make_adapter: Factory, tmp_path: Path, variant: dict[str, Any], words: str
) -> None:
    """As the engine refuses it."""
    tuned = AdapterOnBase(make_adapter(base.directory, seed=2), base)
    with pytest.raises(MergeError, match=words):
        write_adapter(Variant(base, tuned, **variant), tmp_path / "out")
    with pytest.raises(MergeError, match="rank cannot be 0"):
        write_adapter(Variant(base, tuned), tmp_path / "out", rank=0)
    with pytest.raises(MergeError, match="exactly 1 tuned model"):
        write_adapter(Variant(base, [tuned, tuned]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


Q_PROJ = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("saved", [f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_B.weight", f"{PREFIX}lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_refused(
    base: Checkpoint,
    make_adapter: Factory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saved: str,
    value: float,
) -> None:
    """Law 4: one bad value is reported with its tensor and its adapter, at λ=0, too, and nothing is left."""
    put(monkeypatch, by_angle)
    source = make_adapter(base.directory, seed=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    tensor = load_file(source / TENSORS)[saved]
    tensor.view(-1)[5] = value
    bad = changed(source, tmp_path / "bad", {saved: tensor})
    sides = [AdapterOnBase(path, base) for path in (source, bad)]
    for variant in (Variant(base, sides[1], lam=0.0), Variant(base, sides, find_method("tested"))):
        with pytest.raises(MergeError, match="holds NaN or infinity") as caught:
            write_adapter(variant, tmp_path / "out")
        assert saved.removeprefix(PREFIX).partition(".lora")[0].removesuffix(".weight") in caught.value.message
        assert str(bad) in caught.value.message
    assert list(tmp_path.iterdir()) == [bad]


def test_a_base_that_is_not_finite_is_refused(base: Checkpoint, make_adapter: Factory, tmp_path: Path) -> None:
    """Where the base is read, for whole tensors, it is looked at, and not the adapter blamed."""
    source = make_adapter(base.directory, seed=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    damaged = shutil.copytree(base.directory, tmp_path / "base")
    tensors = load_file(damaged / "model.safetensors")
    tensors["lm_head.weight"][0, 3] = float("nan")
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    bad = Checkpoint(damaged)
    with pytest.raises(MergeError, match=r"'lm_head.weight' of the base .* NaN or infinity"):
        write_adapter(Variant(bad, AdapterOnBase(source, bad), lam=0.5), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_beyond_the_dtype_are_refused(base: Checkpoint, make_adapter: Factory, tmp_path: Path) -> None:
    """A scale that takes B out of float16's range is an error, not an infinity on disk."""
    source = changed(make_adapter(base.directory, seed=2), tmp_path / "adapter", lora_alpha=1e7)
    variant = Variant(base, AdapterOnBase(source, base), dtype="F16")
    with pytest.raises(MergeError, match=r"factor B of the merged .* beyond the range of F16"):
        write_adapter(variant, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_an_adapter_of_whole_numbers_is_refused(base: Checkpoint, make_adapter: Factory, tmp_path: Path) -> None:
    """A tensor that has no mean is named."""
    source = make_adapter(base.directory, seed=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    saved = f"{PREFIX}lm_head.weight"
    tensor = load_file(source / TENSORS)[saved]
    bad = changed(source, tmp_path / "bad", {saved: tensor.to(torch.int8)})
    with pytest.raises(CheckpointError, match=r"lm_head.* I8"):
        write_adapter(Variant(base, AdapterOnBase(bad, base)), tmp_path / "out")
