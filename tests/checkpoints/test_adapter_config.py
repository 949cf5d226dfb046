"""An adapter's configuration: peft's defaults where a field is absent, and one message for what is no configuration."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from backmerge.checkpoints.adapter import PREFIX, TENSORS, AdapterOnBase
from backmerge.checkpoints.adapter_config import CONFIG, AdapterConfig, scaling_of
from backmerge.checkpoints.reader import CARD, Checkpoint
from backmerge.errors import CheckpointError

Factory = Callable[..., Path]
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(make_model: Factory) -> Checkpoint:
    """An untied base."""
    return Checkpoint(make_model("llama", seed=1, tied=False))


@pytest.fixture
def adapter(base: Checkpoint, make_adapter: Factory, tmp_path: Path) -> Path:
    """A copy of an adapter on it, to be changed."""
    return shutil.copytree(make_adapter(base.directory, seed=2), tmp_path / "adapter")


def change(adapter: Path, drop: tuple[str, ...] = (), **settings: Any) -> None:
    """Put other settings in an adapter's configuration, or take some out."""
    values = {**json.loads((adapter / CONFIG).read_text()), **settings}
    (adapter / CONFIG).write_text(json.dumps({key: value for key, value in values.items() if key not in drop}))


def test_defaults_are_those_of_peft() -> None:
    """Every field of peft's own configuration is checked, and has its default."""
    theirs = LoraConfig()
    ours = AdapterConfig(peft_type="LORA")
    # `runtime_config` is never read from a file
    assert set(AdapterConfig.model_fields) == {field.name for field in fields(LoraConfig)} - {"runtime_config"}
    for name in AdapterConfig.model_fields:
        if name not in ("peft_type", "peft_version"):  # not named by the file
            assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("rank", [2, 8])
def test_an_absent_alpha_is_eight(base: Checkpoint, adapter: Path, rank: int) -> None:
    """The change is 8 / r · B·A, as peft loads it, and not B·A."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rank, 32, generator=generator), torch.randn(32, rank, generator=generator)
    save_file({f"{PREFIX}{Q_PROJ}.lora_A.weight": a, f"{PREFIX}{Q_PROJ}.lora_B.weight": b}, adapter / TENSORS)
    change(adapter, ("lora_alpha", "r") if rank == 8 else ("lora_alpha",), r=rank)
    tuned = AdapterOnBase(adapter, base).tensor(f"{Q_PROJ}.weight")
    torch.testing.assert_close(tuned, base.tensor(f"{Q_PROJ}.weight") + 8 / rank * (b @ a))


def test_a_rank_that_the_factors_do_not_have_is_refused(base: Checkpoint, adapter: Path) -> None:
    """The factors are of rank 4: without `r` peft expects 8, and loads no such adapter."""
    change(adapter, drop=("r",))
    with pytest.raises(CheckpointError, match=r"have rank 4, but .* says 8"):
        AdapterOnBase(adapter, base)
    change(adapter, r=8, rank_pattern={"_proj": 4})
    with pytest.raises(CheckpointError, match=r"have rank 4, but .* says 8"):
        AdapterOnBase(adapter, base)  # a pattern is a whole name, or its end after a dot


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no alpha": ({"lora_alpha": None}, "lora_alpha"),
    "a list": ({"lora_alpha": [1]}, "lora_alpha"),
    "a text": ({"lora_alpha": "16"}, "lora_alpha"),
    "a truth value": ({"lora_alpha": True}, "lora_alpha"),
    "not a number": ({"lora_alpha": float("nan")}, "lora_alpha"),
    "no rank": ({"r": None}, "r: "),
    "rank zero": ({"r": 0}, "r: "),
    "a rank between": ({"r": 4.5}, "r: "),
    "no patterns": ({"rank_pattern": None}, "rank_pattern"),
    "a list of patterns": ({"alpha_pattern": ["q_proj"]}, "alpha_pattern"),
    "a pattern without a value": ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern"),
    "no expression": ({"rank_pattern": {"(": 3}}, "rank_pattern"),
    "an endless repetition": ({"rank_pattern": {"a{99999999999999999999}": 3}}, "rank_pattern"),
    "an endless pattern": ({"alpha_pattern": {"q" * 5000: 3}}, "alpha_pattern"),
    "rsLoRA as a text": ({"use_rslora": "yes"}, "use_rslora"),
    "tying as a number": ({"ensure_weight_tying": 1}, "ensure_weight_tying"),
    "targets as a mapping": ({"target_modules": {"q_proj": 1}}, "target_modules"),
    "parameters as a text": ({"target_parameters": "experts"}, "target_parameters"),
    "a base that is no name": ({"base_model_name_or_path": 7}, "base_model_name_or_path"),
    "a kind that is a list": ({"peft_type": ["LORA"]}, "peft_type"),
    "a bias that is a number": ({"bias": -1}, "bias"),
    "a bias of no kind": ({"bias": "some"}, "bias"),
    "a dropout above one": ({"lora_dropout": 1.5}, "lora_dropout"),
    "layers as a text": ({"layers_to_transform": "0"}, "layers_to_transform"),
    "Megatron as a truth value": ({"megatron_config": True}, "megatron_config"),
    "Megatron's module as a number": ({"megatron_core": 3}, "megatron_core"),
    "a configuration that is a list": ({"eva_config": []}, "eva_config"),
    "an initialisation that is a list": ({"init_lora_weights": ["pissa"]}, "init_lora_weights"),
}


@pytest.mark.parametrize(("settings", "words"), WRONG.values(), ids=WRONG.keys())
def test_values_of_a_wrong_kind_are_one_message(
    base: Checkpoint, adapter: Path, settings: dict[str, Any], words: str
) -> None:
    """It names file and field, in a few words however long the value is."""
    change(adapter, **settings)
    with pytest.raises(CheckpointError, match=words) as caught:
        AdapterOnBase(adapter, base)
    assert str(adapter / CONFIG) in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("value", [{}, {"top_k": 1}], ids=["empty", "filled"])
@pytest.mark.parametrize("option", ["arrow_config", "megatron_config", "kasa_config"])
def test_options_that_change_the_sum_are_refused_if_empty(adapter: Path, option: str, value: dict[str, int]) -> None:
    """Peft acts on a configuration that is there, whatever is in it; of Megatron's it imports the named module."""
    change(adapter, **{option: value})
    with pytest.raises(CheckpointError, match="cannot be read as"):
        AdapterConfig.read(adapter)


def test_an_over_long_name_is_cut(base: Checkpoint, adapter: Path) -> None:
    """The names of base, kind and tensors are somebody else's, and a message has an end."""
    change(adapter, base_model_name_or_path="~" + "x" * 50_000)
    tensors = load_file(adapter / TENSORS)
    save_file({**tensors, f"{PREFIX}{'y' * 50_000}.weight": torch.ones(2)}, adapter / TENSORS)
    with pytest.raises(CheckpointError) as caught:
        AdapterOnBase(adapter, base)
    assert len(str(caught.value)) < 1500
    change(adapter, peft_type="Z" * 50_000)
    with pytest.raises(CheckpointError, match="its kind is ZZZ") as caught:
        AdapterOnBase(adapter, base)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("pattern", ["([a-z_.0-9]+)+!", "(.*)*(.*)*(.*)*!"])
def test_an_expression_that_never_ends_is_stopped(
    base: Checkpoint, adapter: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    """Python's `re` would backtrack for hours, in peft too."""
    monkeypatch.setattr("backmerge.checkpoints.adapter_config.PATTERN_SECONDS", 0.5)
    change(adapter, alpha_pattern={pattern: 3})
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="takes more than"):
        AdapterOnBase(adapter, base)
    assert time.monotonic() - started < 10


def test_expressions_match_as_in_peft(tmp_path: Path) -> None:
    """Simple ones are matched here, others in a separate process; the first that matches counts."""
    from peft.utils.other import get_pattern_key

    patterns = [r"(0|1)\.x", r".*\.up", "^model.down", "o", r"mo.el\.\d+\.q$", "(?i:MODEL.UP)"]
    names = ["model.0.x", "model.up", "model.down", "a.model.down", "model.o", "model.oo", "model.17.q", "xmodel.up"]
    for chosen in (patterns, patterns[::-1]):
        alphas = {pattern: 3 * number for number, pattern in enumerate(chosen, start=1)}
        config = AdapterConfig(peft_type="LORA", r=3, alpha_pattern=alphas, lora_alpha=99)
        expected = {name: alphas.get(get_pattern_key(alphas, name), 99) / 3 for name in names}
        assert {name: found.scale for name, found in scaling_of(config, names, tmp_path).items()} == expected


def test_a_card_with_another_kind_of_fingerprint_is_one_message(base: Checkpoint, adapter: Path) -> None:
    """What backmerge itself leaves next to an adapter may be damaged, too."""
    (adapter / CARD).write_text('{"base_fingerprint": 0.5}')
    with pytest.raises(CheckpointError, match="base_fingerprint is not a text"):
        AdapterOnBase(adapter, base)


def test_an_adapter_saved_from_within_a_wrapper_is_refused(make_model: Any, make_adapter: Any, tmp_path: Path) -> None:
    """Names that torch.compile changed are recognised, and the error says how to save the adapter again."""
    base = make_model("llama", seed=1)
    shutil.copytree(make_adapter(base), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name.replace("model.layers", "_orig_mod.model.layers"): t for name, t in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=r"saved from a compiled model"):
        AdapterOnBase(tmp_path / "a", Checkpoint(base))
