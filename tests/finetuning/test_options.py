"""What can be asked of the training: all weights, DoRA, averages, snapshots, smaller batches, less memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from backmerge.checkpoints.adapter import AdapterOnBase, open_weights
from backmerge.checkpoints.compare import check_same_shape
from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import model_directory
from backmerge.demo.benchmarks import plan_examples
from backmerge.errors import ConfigError
from backmerge.finetuning import model as models
from backmerge.finetuning import trainer
from backmerge.finetuning.datasets import TrainingData
from backmerge.finetuning.settings import FinetuneSettings, LoraSettings
from backmerge.finetuning.trainer import train_model
from backmerge.merging.recipe import Variant
from backmerge.merging.to_disk import write_merged

DATA = TrainingData(plan_examples()[:24], (), {}, ())
BRIEF = FinetuneSettings(dataset="demo-plans", steps=6, batch_size=4, learning_rate=8e-3)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    """The embedded model."""
    return Checkpoint(model_directory())


def trained(base: Checkpoint, place: Path, **values: Any) -> Path:
    """The folder of a model that was trained with these settings."""
    train_model(base, DATA, BRIEF.model_copy(update=values), 42, place, lambda *_: None)
    return place


def apart(first: Path, second: Path) -> float:
    """The largest difference between two adapters."""
    one, other = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_weights_can_be_trained(dtype: str, make_model: Any, tmp_path: Path) -> None:
    """The result is a checkpoint of the base's names, shapes and dtype, which merges and begins from the base."""
    base = Checkpoint(make_model("llama", seed=1, dtype=dtype))
    place = trained(base, tmp_path / "a", mode="full", learning_rate=1e-3)
    tuned = open_weights(place, base)
    assert isinstance(tuned, Checkpoint)
    check_same_shape(base, tuned)
    changed = [name for name in base.infos if not torch.equal(base.tensor(name), tuned.tensor(name))]
    assert len(changed) > len(base.infos) / 2
    # Adam's steps are of the learning rate's size at most, six of them, in weights of about 1 and rounded to the dtype
    rounding = {"float32": 1e-6, "bfloat16": 2**-7}[dtype]
    for name in base.infos:
        assert (base.tensor(name).float() - tuned.tensor(name).float()).abs().max() < 6e-3 + rounding
    write_merged(Variant(base, tuned, lam=0.5), tmp_path / "merged")
    assert {"config.json", "tokenizer.json"} <= {path.name for path in place.iterdir()}
    assert not list(place.glob("*.bin"))


def test_dora_is_trained_and_merged(base: Checkpoint, tmp_path: Path) -> None:
    """The adapter says that it is DoRA, holds magnitudes, and becomes a tuned model for merging."""
    place = trained(base, tmp_path / "a", lora=LoraSettings(dora=True))
    assert json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))["use_dora"] is True
    assert any("magnitude" in name for name in load_file(place / WEIGHTS))
    tuned = AdapterOnBase(place, base)
    assert any(not torch.equal(tuned.tensor(name), base.tensor(name)) for name in base.infos)


def test_the_average_is_that_of_the_path(base: Checkpoint, tmp_path: Path) -> None:
    """The adapter handed over is the moving average of each step's weights, computed again from the snapshots."""
    place = trained(base, tmp_path / "a", ema=0.5, keep_every=1)
    path = [load_file(place / "snapshots" / f"step-{step}" / WEIGHTS) for step in range(1, 7)]
    handed_over = load_file(place / WEIGHTS)
    # a seed decides the start, and B starts at 0
    for name in (n for n in handed_over if "lora_B" in n):
        average = torch.zeros_like(handed_over[name])
        for step, weights in enumerate(path, start=1):
            decay = min(0.5, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * weights[name]
        # six float32 steps against one fused one, some ulps of weights of at most 0.05
        torch.testing.assert_close(handed_over[name], average, rtol=0, atol=1e-7)
    assert apart(place, place / "snapshots" / "step-6") > 1e-3


def test_snapshots_are_ordinary_adapters_on_the_path(base: Checkpoint, tmp_path: Path) -> None:
    """Each can be read as an adapter, the last is the result, and keeping them changes nothing."""
    place = trained(base, tmp_path / "a", keep_every=3)
    snapshots = sorted(path.name for path in (place / "snapshots").iterdir())
    assert snapshots == ["step-3", "step-6"]
    assert apart(place, place / "snapshots" / "step-6") == 0
    assert apart(place, place / "snapshots" / "step-3") > 0
    assert AdapterOnBase(place / "snapshots" / "step-3", base).infos.keys() == base.infos.keys()
    assert apart(place, trained(base, tmp_path / "b")) == 0


def test_a_snapshot_is_the_path_of_the_whole_schedule(base: Checkpoint, tmp_path: Path) -> None:
    """Stopping at step 3 of 6 gives the very adapter that the whole training had at step 3."""
    whole = trained(base, tmp_path / "whole", keep_every=3)
    assert apart(trained(base, tmp_path / "a", snapshot_steps=3), whole / "snapshots" / "step-3") == 0


@pytest.mark.parametrize("values", [{"micro_batch_size": 1}, {"gradient_checkpointing": True}])
def test_less_memory_is_the_same_training(values: dict[str, Any], base: Checkpoint, tmp_path: Path) -> None:
    """Gradients added up from single examples, or activations computed twice, differ by rounding alone."""
    place = trained(base, tmp_path / "a", **values)
    # Adam divides by the gradient's own size, so that rounding of tiny gradients is not tiny; six steps of 8e-3
    assert apart(place, trained(base, tmp_path / "b")) < 1e-3


def test_weight_decay_shrinks_weights(base: Checkpoint, tmp_path: Path) -> None:
    """With much decay the factors A, which start away from 0, end smaller."""
    plain, decayed = trained(base, tmp_path / "a"), trained(base, tmp_path / "b", weight_decay=10.0)
    sizes = [sum(float(w.norm()) for n, w in load_file(p / WEIGHTS).items() if "lora_A" in n) for p in (plain, decayed)]
    assert sizes[1] < 0.9 * sizes[0]


def test_four_bits_without_bitsandbytes_are_refused(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra that is missing is named with the command that installs it."""
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="bitsandbytes") as caught:
        trained(base, tmp_path / "a", lora=LoraSettings(quantize="nf4"))
    assert "pip install 'backmerge[qlora]'" in str(caught.value)


def test_four_bits_are_nf4_with_doubly_quantised_scales() -> None:
    """The configuration that transformers is given is QLoRA's."""
    pytest.importorskip("bitsandbytes")
    settings = models._four_bits(torch.bfloat16).to_dict()
    assert (settings["load_in_4bit"], settings["bnb_4bit_quant_type"]) == (True, "nf4")
    assert settings["bnb_4bit_use_double_quant"] is True


def test_settings_that_contradict_each_other_are_refused() -> None:
    """A LoRA's settings next to full training, or small batches that do not fill a step."""
    with pytest.raises(ValueError, match="trains no adapter"):
        FinetuneSettings(dataset="x", mode="full", lora=LoraSettings(r=4))
    with pytest.raises(ValueError, match="not a multiple"):
        FinetuneSettings(dataset="x", batch_size=8, micro_batch_size=3)


def test_where_losses_go_is_passed_through(tmp_path: Path) -> None:
    """The Trainer is told to report where it is asked to, and nowhere else by itself."""
    for names in ((), ("tensorboard", "wandb")):
        settings = BRIEF.model_copy(update={"report_to": names})
        assert trainer._arguments(settings, 1, tmp_path, 24, has_validation=False).report_to == list(names)
