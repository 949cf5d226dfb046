"""The adapter realisation: what peft makes of it is the merge, whatever LoRAs it is of."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowrank_cases import by_angle, changed, config_of, put
from safetensors.torch import load_file
from torch import Tensor

from backmerge.checkpoints.adapter import PREFIX, TENSORS, AdapterOnBase
from backmerge.checkpoints.adapter_config import CONFIG
from backmerge.checkpoints.adapter_writer import Names, encoded
from backmerge.checkpoints.reader import CARD, Checkpoint
from backmerge.errors import CheckpointError, MergeError
from backmerge.merging import lowrank
from backmerge.merging.engine import merged_tensors
from backmerge.merging.lowrank import WrittenAdapter, write_adapter, write_adapters
from backmerge.merging.method import find_method
from backmerge.merging.recipe import Variant
from backmerge.registry import METHODS
from input_cases import inputs_for

Factory = Callable[..., Path]
Merge = Callable[[Path, Path], dict[str, Tensor]]
Tensors = dict[str, Tensor]

# W + B·A at rank 12 at most: fourteen products and sums of values below 4, and the factors that were rounded before
# them, each at 2^-24; peft, the engine and the folded factors add in other orders.
FLOAT32: dict[str, float] = {"rtol": 0.0, "atol": 4 * 16 * 2.0**-24}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("llama", {}),
    "alpha": ("llama", {"lora_alpha": 3, "r": 6}),
    "rsLoRA": ("gemma", {"use_rslora": True}),
    "rank_pattern": ("llama", {"rank_pattern": {"v_proj": 2, r".*\.0\..*o_proj": 7}}),
    "alpha_pattern": ("llama", {"alpha_pattern": {"q_proj": 32, "layers.1.mlp.up_proj": 1}}),
    "both patterns and rsLoRA": (
        "llama",
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5, "k_proj": 6}, "use_rslora": True},
    ),
    "some modules": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "modules of some layers": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "one norm": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]}),
    "all norms": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "a whole layer": ("qwen2", {"target_modules": ["down_proj"], "modules_to_save": ["layers.1"]}),
    "a layer with its bias": ("qwen2", {"target_modules": ["v_proj"], "modules_to_save": ["q_proj"]}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "alpha_pattern": {"embed_tokens": 3}}),
    "all biases": ("qwen2", {"bias": "all", "target_modules": ["q_proj", "up_proj"]}),
    "biases of adapted layers": ("qwen2", {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]}),
    "a bias in B": (
        "qwen2",
        {"lora_bias": True, "target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"q_proj": 5}},
    ),
    "a layer that is Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}


def assert_same(ours: Tensors, theirs: Tensors, **tolerance: float) -> None:
    """The same tensors, within the tolerance; a tied head that one side repeats is not looked at."""
    common = ours.keys() & theirs.keys()
    assert ours.keys() ^ theirs.keys() <= {"lm_head.weight"}
    for name in sorted(common):
        torch.testing.assert_close(
            ours[name], theirs[name], **tolerance or FLOAT32, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_realises(adapter: Path, variant: Variant, peft_merged: Merge) -> None:
    """An adapter on disk is the variant: as peft merges it, and as we read it back."""
    wanted = dict(merged_tensors(variant))
    assert_same(peft_merged(variant.base.directory, adapter), wanted)
    read = AdapterOnBase(adapter, variant.base)
    assert_same({name: read.tensor(name) for name in variant.base.infos}, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_makes_of_it_is_the_merge(
    make_base: Callable[[str], Checkpoint], make_adapter: Factory, peft_merged: Merge, tmp_path: Path, kind: str
) -> None:
    """Law 5: base + written adapter equals the merge, for peft and for us, and it has one rank and no patterns."""
    architecture, settings = KINDS[kind]
    base = make_base(architecture)
    source = make_adapter(base.directory, seed=2, **settings)
    tuned = AdapterOnBase(source, base)
    variant = Variant(base, tuned, lam=0.3)
    written = write_adapter(variant, tmp_path / "out")
    assert_realises(tmp_path / "out", variant, peft_merged)
    config = config_of(tmp_path / "out")
    assert config["lora_alpha"] == config["r"] == written.rank
    assert not any(config[option] for option in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora"))
    assert config["base_model_name_or_path"] == config_of(source)["base_model_name_or_path"]
    read = AdapterOnBase(tmp_path / "out", base)
    assert read.factors.keys() == tuned.factors.keys()
    assert {read.file.infos[factors.a].shape[0] for factors in read.factors.values()} == {written.rank}
    assert read.replaced.keys() == tuned.replaced.keys() | tuned.added.keys()
    assert bool(read.replaced) is (written.vllm_obstacle is not None and "whole tensors" in written.vllm_obstacle)


@pytest.mark.parametrize("kind", ["LoRA", "modules_to_save", "embedding", "all biases"])
def test_endpoints(make_base: Callable[[str], Checkpoint], make_adapter: Factory, tmp_path: Path, kind: str) -> None:
    """Law 1: at λ=1 the factors and whole tensors are the tuned adapter's own; at λ=0 nothing is changed, bit for bit.

    alpha is twice the rank, or a power of two times it, so that the folded scale rounds nothing.
    """
    architecture, settings = KINDS[kind]
    base = make_base(architecture)
    tuned = AdapterOnBase(make_adapter(base.directory, seed=2, **{**settings, "alpha_pattern": {}}), base)
    outputs = {tmp_path / "0": Variant(base, tuned, lam=0.0), tmp_path / "1": Variant(base, tuned, lam=1.0)}
    write_adapters(outputs)
    none, all_ = (AdapterOnBase(path, base) for path in outputs)
    for name, factors in tuned.factors.items():
        a, b = (tuned.file.float32_array(side) for side in (factors.a, factors.b))
        for read, scale in ((none, 0.0), (all_, factors.scale)):
            assert np.array_equal(read.file.float32_array(read.factors[name].a), a)
            assert np.array_equal(read.file.float32_array(read.factors[name].b), scale * b)
    for name in tuned.replaced:
        assert torch.equal(all_.tensor(name).view(torch.int32), tuned.tensor(name).view(torch.int32))
        assert torch.equal(none.tensor(name).view(torch.int32), base.tensor(name).view(torch.int32))


def test_several_lambdas_equal_single_merges(base: Checkpoint, make_adapter: Factory, tmp_path: Path) -> None:
    """Writing four λs at once gives the same files as writing each by itself."""
    settings = {"modules_to_save": ["lm_head"], "rank_pattern": {"v_proj": 2}}
    tuned = AdapterOnBase(make_adapter(base.directory, seed=2, **settings), base)
    outputs = {tmp_path / f"{lam}": Variant(base, tuned, lam=lam) for lam in (0.2, 0.4, 0.6, 0.8)}
    results = write_adapters(outputs)
    assert [result.directory for result in results] == list(outputs)
    for path, variant in outputs.items():
        write_adapter(variant, tmp_path / "alone", replace=True)
        for file in (CONFIG, TENSORS, CARD):
            assert (path / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


@pytest.mark.parametrize(
    "lam", [{"attention": 0.2, "rest": 0.8}, [0.1, 0.9], {"*layers.1.mlp*": 0, "norms": [0, 1], "rest": 1}], ids=str
)
def test_lambda_by_module(
    base: Checkpoint, make_adapter: Factory, peft_merged: Merge, tmp_path: Path, lam: Any
) -> None:
    """A table or a gradient of λ holds for factors and whole tensors as it does for the engine."""
    tuned = AdapterOnBase(make_adapter(base.directory, seed=2, modules_to_save=["norm"]), base)
    variant = Variant(base, tuned, lam=lam)
    write_adapter(variant, tmp_path / "out")
    assert_realises(tmp_path / "out", variant, peft_merged)


SEVERAL: dict[str, list[dict[str, Any]]] = {
    "two": [{}, {}],
    "three of different form": [
        {"use_rslora": True},
        {"target_modules": ["q_proj", "lm_head"], "r": 2, "alpha_pattern": {"q_proj": 3}},
        {"rank_pattern": {"v_proj": 6}, "lora_alpha": 5},
    ],
    "whole tensors in some": [
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["model.norm", "lm_head"]},
    ],
    "embedding in one": [{"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"]}],
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_adapters(
    base: Checkpoint,
    make_adapter: Factory,
    peft_merged: Merge,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Coefficients that need the angles come out of the factors as they do out of the dense deltas."""
    put(monkeypatch, by_angle)
    tuned = [AdapterOnBase(make_adapter(base.directory, seed=n, **s), base) for n, s in enumerate(SEVERAL[kind], 2)]
    variant = Variant(base, tuned, find_method("tested"), parameters={"power": {"attention": 0.5, "rest": 1.0}})
    write_adapter(variant, tmp_path / "out")
    assert_realises(tmp_path / "out", variant, peft_merged)


@pytest.mark.parametrize(
    "first", [{"bias": "all"}, {"lora_bias": True}, {"bias": "lora_only", "modules_to_save": ["lm_head"]}], ids=str
)
def test_biases_of_several_adapters(
    make_base: Callable[[str], Checkpoint],
    make_adapter: Factory,
    peft_merged: Merge,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: dict[str, Any],
) -> None:
    """A bias that one adapter trains whole and another as B's is merged from both, wherever it then belongs."""
    put(monkeypatch, by_angle)
    base = make_base("qwen2")
    settings = [{"target_modules": ["q_proj"], **first}, {"target_modules": ["v_proj"], "bias": "all"}]
    tuned = [AdapterOnBase(make_adapter(base.directory, seed=n, **s), base) for n, s in enumerate(settings, 2)]
    variant = Variant(base, tuned, find_method("tested"))
    write_adapter(variant, tmp_path / "out")
    assert_realises(tmp_path / "out", variant, peft_merged)


WITH_COEFFICIENTS = [name for name in sorted(METHODS.entries) if find_method(name).coefficients is not None]


@pytest.mark.parametrize("name", WITH_COEFFICIENTS)
def test_every_method_with_coefficients(
    base: Checkpoint, make_adapter: Factory, peft_merged: Merge, tmp_path: Path, name: str
) -> None:
    """Law 5 over the table: a method that says it is a weighted sum gives the same adapter as checkpoint."""
    method = find_method(name)
    least, most = method.num_tuned
    tuned = [
        AdapterOnBase(make_adapter(base.directory, seed=n, r=n, modules_to_save=["model.norm"]), base)
        for n in range(2, 2 + min(most or 3, max(least, 3)))
    ]
    needed = [key for key, p in method.parameters.items() if p.default is p.empty and key != "lam"]
    variant = Variant(
        base, tuned, find_method(name), 0.3, dict.fromkeys(needed, 0.7), inputs=inputs_for(name, base, tmp_path)
    )
    write_adapter(variant, tmp_path / "out")
    assert_realises(tmp_path / "out", variant, peft_merged)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_factors_of_half_precision(base: Checkpoint, make_adapter: Factory, tmp_path: Path, dtype: str) -> None:
    """In the variant's dtype each element of the factors is the float32 one, rounded as torch rounds it."""
    tuned = AdapterOnBase(make_adapter(base.directory, seed=2, modules_to_save=["lm_head"]), base)
    write_adapter(Variant(base, tuned, lam=0.3), tmp_path / "wide")
    write_adapter(Variant(base, tuned, lam=0.3, dtype=dtype), tmp_path / "half")
    wide, half = (load_file(tmp_path / name / TENSORS) for name in ("wide", "half"))
    assert wide.keys() == half.keys()
    torch_dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    for name, tensor in wide.items():
        assert half[name].dtype == torch_dtype
        assert torch.equal(half[name], tensor.to(torch_dtype))


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_bfloat16_is_rounded_to_even(bits: list[int]) -> None:
    """Any float32 becomes the bfloat16 that torch makes of it; what is not finite there is refused."""
    values = np.array(bits, dtype="<u4").view("<f4")
    wanted = torch.from_numpy(values.copy()).bfloat16()
    if wanted.isfinite().all():
        assert torch.equal(torch.from_numpy(encoded(values, "BF16", "it").view("<i2")), wanted.view(torch.int16))
    else:
        with pytest.raises(MergeError, match="it holds NaN or values beyond the range of BF16"):
            encoded(values, "BF16", "it")


def delta_of(adapter: AdapterOnBase, name: str) -> np.ndarray:
    """A module's dense change, in float64."""
    factors = adapter.factors[name]
    a, b = (adapter.file.float32_array(side).astype(np.float64) for side in (factors.a, factors.b))
    return factors.scale * b @ a


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_recompression_is_the_nearest_of_its_rank(
    base: Checkpoint, make_adapter: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Eckart–Young: the result is the truncated SVD of the dense change, and the loss is what was cut off.

    Tolerances are of float32 factors: a norm of at most 12 and a dozen roundings at 2^-24.
    """
    put(monkeypatch, by_angle)
    settings: list[dict[str, Any]] = [{}, {"r": 6, "target_modules": ["q_proj", "up_proj"]}]
    tuned = [AdapterOnBase(make_adapter(base.directory, seed=n, **s), base) for n, s in enumerate(settings, 2)]
    variant = Variant(base, tuned, find_method("tested"))
    write_adapter(variant, tmp_path / "whole")
    written = write_adapter(variant, tmp_path / "low", rank=rank)
    whole, low = (AdapterOnBase(tmp_path / name, base) for name in ("whole", "low"))
    lost = {}
    for name in whole.factors:
        left, values, right = np.linalg.svd(delta_of(whole, name))
        nearest = (left[:, :rank] * values[:rank]) @ right[:rank]
        np.testing.assert_allclose(delta_of(low, name), nearest, rtol=0, atol=144 * 2.0**-24)
        lost[name.removesuffix(".weight")] = (float((values[rank:] ** 2).sum()), float((values**2).sum()))
    shares = {name: (cut / all_) ** 0.5 for name, (cut, all_) in lost.items()}
    assert written.rank == min(rank, 10)
    assert written.recompression is not None
    cut, all_ = (sum(values) for values in zip(*lost.values(), strict=True))
    assert written.recompression.share == pytest.approx((cut / all_) ** 0.5, abs=1e-6)
    assert written.recompression.worst_share == pytest.approx(max(shares.values()), abs=1e-6)
    assert shares[written.recompression.worst_module] == pytest.approx(max(shares.values()), abs=1e-6)
    card = json.loads((tmp_path / "low" / CARD).read_text())
    assert card["recompression"] == written.recompression._asdict()


def test_a_rank_that_is_enough_costs_nothing(
    base: Checkpoint, make_adapter: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank above the factors' own keeps their bits; λ=0 loses nothing at any rank."""
    tuned = AdapterOnBase(make_adapter(base.directory, seed=2), base)
    for lam, rank in ((0.3, 64), (0.0, 1)):
        variant = Variant(base, tuned, lam=lam)
        write_adapter(variant, tmp_path / "plain", replace=True)
        written = write_adapter(variant, tmp_path / "out", rank=rank, replace=True)
        assert written.recompression is not None
        assert written.recompression.share == written.recompression.worst_share == 0
    write_adapter(Variant(base, tuned, lam=0.3), tmp_path / "plain", replace=True)
    write_adapter(Variant(base, tuned, lam=0.3), tmp_path / "out", rank=64, replace=True)
    assert (tmp_path / "plain" / TENSORS).read_bytes() == (tmp_path / "out" / TENSORS).read_bytes()


def test_a_merge_can_be_merged_again(
    base: Checkpoint, make_adapter: Factory, peft_merged: Merge, tmp_path: Path
) -> None:
    """What is written is an adapter like any other: half of a half is a quarter."""
    tuned = AdapterOnBase(make_adapter(base.directory, seed=2, lora_alpha=3, modules_to_save=["lm_head"]), base)
    write_adapter(Variant(base, tuned, lam=0.5), tmp_path / "half")
    write_adapter(Variant(base, AdapterOnBase(tmp_path / "half", base), lam=0.5), tmp_path / "quarter")
    assert_realises(tmp_path / "quarter", Variant(base, tuned, lam=0.25), peft_merged)


def test_the_base_is_not_read_for_its_fingerprint(base: Checkpoint, make_adapter: Factory, tmp_path: Path) -> None:
    """The card names the base by its fingerprint only if that is known; the identity tells recipes apart anyway."""
    source = make_adapter(base.directory, seed=2)
    variant = Variant(base, AdapterOnBase(source, base), lam=0.5)

    def card(variant: Variant) -> dict[str, Any]:
        write_adapter(variant, tmp_path / "out", replace=True)
        values: dict[str, Any] = json.loads((tmp_path / "out" / CARD).read_text())
        return values

    first = card(variant)
    assert "fingerprint" not in vars(base)
    assert "base_fingerprint" not in first
    assert first["realisation"] == "adapter"
    assert first["recipe"]["base"].startswith("layout:")
    other = AdapterOnBase(make_adapter(base.directory, seed=3), base)
    recipes = [first["recipe"], card(variant.at(0.6))["recipe"], card(Variant(base, other, lam=0.5))["recipe"]]
    assert len({json.dumps(recipe) for recipe in recipes}) == 3
    assert card(variant) == first
    known = Checkpoint(base.directory)
    _ = known.fingerprint
    full = card(Variant(known, AdapterOnBase(source, known), lam=0.5))
    assert full["base_fingerprint"] == known.fingerprint
    assert full["recipe"] == Variant(known, AdapterOnBase(source, known), lam=0.5).identity
    assert isinstance(AdapterOnBase(tmp_path / "out", base), AdapterOnBase)


def test_an_untrained_copy_of_a_tied_embedding_is_left_out(
    make_model: Factory, make_adapter: Factory, peft_merged: Merge, tmp_path: Path
) -> None:
    """What peft saved of a tied base without having trained it is no change, and stands in vLLM's way."""
    base = Checkpoint(make_model("llama", seed=1, tied=True))
    name = "model.embed_tokens.weight"
    carried = {PREFIX + name: base.tensor(name).clone()}
    source = changed(make_adapter(base.directory, seed=2), tmp_path / "source", carried)
    variant = Variant(base, AdapterOnBase(source, base), lam=0.5)
    assert write_adapter(variant, tmp_path / "out").vllm_obstacle is None
    assert PREFIX + name not in load_file(tmp_path / "out" / TENSORS)
    assert_realises(tmp_path / "out", variant, peft_merged)


def test_interrupted_write_keeps_the_old_file(
    base: Checkpoint, make_adapter: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 11: a write that fails leaves the adapter that stood there, and nothing beside it; a good one replaces it."""
    tuned = AdapterOnBase(make_adapter(base.directory, seed=2), base)
    outputs = {tmp_path / name: Variant(base, tuned, lam=lam) for name, lam in (("a", 0.2), ("b", 0.4))}
    write_adapter(Variant(base, tuned, lam=1.0), tmp_path / "a")
    before = (tmp_path / "a" / TENSORS).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lowrank, "_write_card", full)
        with pytest.raises(CheckpointError, match=r"No space left(.|\n)*free some space"):
            write_adapters(outputs, replace=True)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(CheckpointError, match="GB are free"):
            write_adapters(outputs, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / TENSORS).read_bytes() == before
    write_adapters(outputs, replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert (tmp_path / "a" / TENSORS).read_bytes() != before


@pytest.mark.parametrize(
    ("settings", "rank", "words"),
    [
        ({"target_modules": ["q_proj"]}, None, None),
        ({"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 6}, "use_rslora": True}, None, None),
        ({"target_modules": ["q_proj"], "r": 600}, None, "rank is 600, and vLLM takes at most 512"),
        ({"target_modules": ["q_proj"], "r": 600}, 16, None),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, None, "whole tensors, such as 'lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, None, "for some architectures only"),
    ],
    ids=str,
)
def test_whether_vllm_takes_it(
    base: Checkpoint,
    make_adapter: Factory,
    tmp_path: Path,
    settings: dict[str, Any],
    rank: int | None,
    words: str | None,
) -> None:
    """It is reported when the adapter is written, with the reason where it does not."""
    tuned = AdapterOnBase(make_adapter(base.directory, seed=2, **settings), base)
    written: WrittenAdapter = write_adapter(Variant(base, tuned, lam=0.5), tmp_path / "out", rank=rank)
    assert (written.vllm_obstacle is None) is (words is None)
    assert words is None or words in str(written.vllm_obstacle)


TREE = [
    "model.layers.0.q.weight",
    "model.layers.1.q.weight",
    "model.layers.0.q_norm.weight",
    "model.norm.weight",
    "tower.model.norm.weight",
    "norm.weight",
    "q.bias",
    "model.table",
]


@pytest.mark.parametrize(
    ("adapted", "whole", "targets", "saved", "obstacle"),
    [
        ({"model.layers.0.q", "model.layers.1.q", "q"}, set(), ["q"], [], None),
        ({"model.layers.0.q"}, set(), ["model.layers.0.q"], [], None),
        ({"model.layers.0.q"}, {"model.layers.0.q_norm.weight"}, ["model.layers.0.q"], ["q_norm"], None),
        ({"q"}, set(), None, None, r"none match only \['q'\]"),
        ({"model.layers.0.q"}, {"model.norm.weight"}, None, None, r"none match only \['model.norm'\]"),
        ({"model.layers.0.q"}, {"model.table"}, None, None, "tensors of 'model' itself"),
        ({"model.layers.0.q"}, {"model.layers.0.q.weight"}, None, None, "also has low-rank factors"),
        (set(), {"norm.weight"}, None, None, "no tensor has low-rank factors"),
    ],
    ids=str,
)
def test_names_mean_just_the_modules_that_are_meant(
    adapted: set[str],
    whole: set[str],
    targets: list[str] | None,
    saved: list[str] | None,
    obstacle: str | None,
) -> None:
    """Peft matches by the ends of names: short ends where they are enough, whole names else, or a refusal."""
    names = Names(TREE, adapted, whole)
    if obstacle is None:
        assert names.obstacle is None
        assert (names.targets, names.modules_to_save) == (targets, saved)
    else:
        assert names.obstacle is not None
        assert re.search(obstacle, names.obstacle)


def test_neither_torch_nor_peft_is_imported(base: Checkpoint, make_adapter: Factory, tmp_path: Path) -> None:
    """A process that writes an adapter, whole norms in it and recompressed, is done before torch would be there."""
    adapter = make_adapter(base.directory, seed=2, modules_to_save=["norm"])
    code = (
        "import sys; from pathlib import Path\n"
        "from backmerge.checkpoints.adapter import AdapterOnBase\n"
        "from backmerge.checkpoints.reader import Checkpoint\n"
        "from backmerge.merging.lowrank import write_adapter\n"
        "from backmerge.merging.recipe import Variant\n"
        "base, tuned, out = map(Path, sys.argv[1:])\n"
        "base = Checkpoint(base)\n"
        "write_adapter(Variant(base, AdapterOnBase(tuned, base), lam=0.5), out, rank=2)\n"
        "heavy = {'torch', 'transformers', 'peft', 'accelerate', 'datasets', 'scipy', 'matplotlib'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, base.directory, adapter, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"
    assert (tmp_path / "out" / TENSORS).is_file()
