"""Adapters on their base: the same tuned model as peft's own merge, and what is refused by name."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from backmerge.checkpoints.adapter import PREFIX, TENSORS, AdapterOnBase, TrainedOn, is_adapter, open_weights
from backmerge.checkpoints.adapter_config import CONFIG
from backmerge.checkpoints.reader import SINGLE, Checkpoint
from backmerge.errors import CheckpointError
from backmerge.merging.engine import merged_tensors
from backmerge.merging.recipe import Variant

Factory = Callable[..., Path]
Merge = Callable[[Path, Path], dict[str, Tensor]]

# The sum W + scale·B·A at rank 4: six products and sums of values below 4, each rounded at 2^-24; peft may add in
# another order.
FLOAT32 = {"rtol": 0.0, "atol": 4 * 6 * 2.0**-24}

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "alpha": {"lora_alpha": 3, "r": 6},
    "rsLoRA": {"use_rslora": True},
    "some modules": {"target_modules": ["q_proj", "down_proj"]},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 32, "layers.1.mlp.up_proj": 1, "^model.layers.0.mlp.gate_proj": 2}},
    "rank_pattern": {"rank_pattern": {"v_proj": 2, r".*\.0\..*o_proj": 7}},
    "both patterns and rsLoRA": {
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 5, "k_proj": 6},
        "use_rslora": True,
    },
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"], "alpha_pattern": {"embed_tokens": 3}},
    "DoRA": {"use_dora": True},
    "DoRA with patterns": {"use_dora": True, "rank_pattern": {"q_proj": 2}, "use_rslora": True},
    "all biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]},
    "a bias in B": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"q_proj": 5}},
}
# kinds for which the architecture must have biases
BIASED = ("all biases", "biases of adapted layers", "a bias in B")


def tuned_tensors(base: Checkpoint, tuned: AdapterOnBase) -> dict[str, Tensor]:
    """The merge at λ=1."""
    return dict(merged_tensors(Variant(base, tuned, lam=1.0)))


@pytest.mark.parametrize("kind", KINDS)
def test_lambda_one_is_what_peft_merges(
    make_model: Factory, make_adapter: Factory, peft_merged: Merge, kind: str
) -> None:
    """Law 5: base + adapter at λ=1 equals merge_and_unload, and every tensor that is adapted differs from the base."""
    base = Checkpoint(make_model("qwen2" if kind in BIASED else "llama", seed=1, tied=False))
    adapter = make_adapter(base.directory, seed=2, **KINDS[kind])
    tuned = AdapterOnBase(adapter, base)
    ours, theirs = tuned_tensors(base, tuned), peft_merged(base.directory, adapter)
    assert ours.keys() == theirs.keys()
    changed = 0
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], **FLOAT32)
        changed += not torch.equal(theirs[name], base.tensor(name))
    saved = [name for name in load_file(adapter / TENSORS) if not name.endswith(".base_layer.weight")]
    # two factors (and DoRA's magnitudes) change one tensor; a bias of theirs, another
    assert changed == len({name if "bias" in name else name.rpartition(".lora_")[0] or name for name in saved})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_bfloat16(
    make_model: Factory, make_adapter: Factory, peft_merged: Merge, tmp_path: Path, kind: str
) -> None:
    """On a bfloat16 base each kind is what peft merges on the same base in float32, within one ulp of bfloat16."""
    narrow = make_model("qwen2" if kind in BIASED else "llama", seed=1, tied=False, dtype="bfloat16")
    adapter = make_adapter(narrow, seed=2, **KINDS[kind])
    wide = shutil.copytree(narrow, tmp_path / "wide")
    save_file({name: tensor.float() for name, tensor in load_file(narrow / SINGLE).items()}, wide / SINGLE)
    change_json(wide / "config.json", dtype="float32")
    base = Checkpoint(narrow)
    ours, theirs = tuned_tensors(base, AdapterOnBase(adapter, base)), peft_merged(wide, adapter)
    for name, tensor in ours.items():
        assert (tensor.dtype, theirs[name].dtype) == (torch.bfloat16, torch.float32)
        once = theirs[name].bfloat16()
        ulps = tensor.view(torch.int16).int() - once.view(torch.int16).int()
        assert int(ulps[once.abs() > 1e-4].abs().max()) <= 1


@pytest.mark.parametrize("architecture", ["llama", "gemma", "qwen2"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_bfloat16_is_what_peft_merges(
    make_model: Factory, make_adapter: Factory, peft_merged: Merge, architecture: str, tied: bool
) -> None:
    """In bfloat16 ours is the float64 sum rounded once, and peft's is within one ulp of it.

    One value in a thousand may miss by an ulp where float32's own rounding crosses a tie.
    """
    base = Checkpoint(make_model(architecture, seed=1, tied=tied, dtype="bfloat16"))
    adapter = make_adapter(base.directory, seed=2)
    ours, theirs = tuned_tensors(base, AdapterOnBase(adapter, base)), peft_merged(base.directory, adapter)
    factors = load_file(adapter / TENSORS)
    total = missed = 0
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype == torch.bfloat16
        module = PREFIX + name.removesuffix(".weight")
        exact = base.tensor(name).double()
        if f"{module}.lora_A.weight" in factors:
            exact += 2 * factors[f"{module}.lora_B.weight"].double() @ factors[f"{module}.lora_A.weight"].double()
        once = exact.bfloat16()
        for side in (tensor, theirs[name]):
            ulps = side.view(torch.int16).int() - once.view(torch.int16).int()
            assert int(ulps[once != 0].abs().max()) <= 1
        total += tensor.numel()
        missed += int((tensor != once).sum())
    assert missed <= total / 1000


def test_tensors_outside_the_adapter_keep_their_bits(make_model: Factory, make_adapter: Factory) -> None:
    """A tensor without factors is the base's own, −0.0 included."""
    base = Checkpoint(make_model("qwen2", seed=1, tied=True))
    tuned = tuned_tensors(base, AdapterOnBase(make_adapter(base.directory, seed=2, target_modules=["q_proj"]), base))
    kept = [name for name in base.infos if not name.endswith("q_proj.weight")]
    assert all(torch.equal(tuned[n].view(torch.int32), base.tensor(n).view(torch.int32)) for n in kept)
    assert len(kept) < len(base.infos)


def test_a_conv1d_delta_is_turned(make_model: Factory, make_adapter: Factory, tmp_path: Path) -> None:
    """With fan_in_fan_out the weight is stored (in, out), and the delta is (B·A) transposed."""
    base = Checkpoint(make_model("llama", seed=1))
    adapter = shutil.copytree(make_adapter(base.directory, seed=2, target_modules=["up_proj"]), tmp_path / "adapter")
    factors = load_file(adapter / TENSORS)
    turned = {}
    for name, tensor in factors.items():
        other = name.replace("lora_A", "lora_X").replace("lora_B", "lora_A").replace("lora_X", "lora_B")
        turned[other] = tensor.T.contiguous()
    straight = AdapterOnBase(adapter, base)
    name = "model.layers.0.mlp.up_proj.weight"
    expected = straight.tensor(name)
    save_file(turned, adapter / TENSORS)
    change(adapter, fan_in_fan_out=True)
    torch.testing.assert_close(AdapterOnBase(adapter, base).tensor(name), expected, **FLOAT32)


def change_json(file: Path, **settings: Any) -> None:
    """Put other values in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def change(adapter: Path, **settings: Any) -> None:
    """Put other settings in an adapter's configuration."""
    change_json(adapter / CONFIG, **settings)


@pytest.fixture
def base(make_model: Factory) -> Checkpoint:
    """An untied base."""
    return Checkpoint(make_model("llama", seed=1, tied=False))


@pytest.fixture
def adapter(base: Checkpoint, make_adapter: Factory, tmp_path: Path) -> Path:
    """A copy of an adapter on it, to be damaged."""
    return shutil.copytree(make_adapter(base.directory, seed=2), tmp_path / "adapter")


def refused(adapter: Path, base: Checkpoint, words: str) -> None:
    """The adapter is refused with those words and its folder's name, and with a remedy."""
    with pytest.raises(CheckpointError, match=words) as caught:
        open_weights(adapter, base)
    assert str(adapter) in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_lora_weights": "pissa"}, "initialised by pissa"),
        ({"init_lora_weights": "olora"}, "initialised by olora"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "it replicates layers"),
        ({"trainable_token_indices": [1, 2]}, "it trains single rows of the embedding"),
    ],
)
def test_what_peft_makes_and_a_sum_cannot_express(
    base: Checkpoint, make_adapter: Factory, settings: dict[str, Any], words: str
) -> None:
    """Law 5: adapters of other kinds, as peft itself saves them, are refused by name."""
    refused(make_adapter(base.directory, seed=2, **settings), base, words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, "its kind is IA3, not LORA"),
        ({"peft_type": "ADALORA"}, "its kind is ADALORA"),
        ({"peft_type": None}, "its kind is None"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialised by pissa_niter_4"),
        ({"init_lora_weights": "corda"}, "initialised by corda"),
        ({"init_lora_weights": "loftq"}, "initialised by loftq"),
        ({"init_lora_weights": "lora_ga"}, "initialised by lora_ga"),
        ({"init_lora_weights": "of tomorrow"}, "initialised by of tomorrow"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"monteclora_config": {"n": 1}}, "MonteCLoRA"),
        ({"arrow_config": {"top_k": 1}}, "routes between adapters"),
        ({"use_bdlora": {"n": 1}}, "BD-LoRA"),
    ],
)
def test_other_kinds_are_refused_by_name(adapter: Path, base: Checkpoint, settings: dict[str, Any], words: str) -> None:
    """So are those that the configuration alone gives away, and initialisations that are not known."""
    change(adapter, **settings)
    refused(adapter, base, words)


def test_dora_of_another_form_is_refused(adapter: Path, base: Checkpoint, make_adapter: Factory) -> None:
    """DoRA whose magnitudes are missing, or whose norms would run over columns, is refused by name."""
    change(adapter, use_dora=True)
    refused(adapter, base, "is DoRA, and its .*without .lora_magnitude_vector")
    refused(make_adapter(base.directory, seed=2, target_modules=["embed_tokens"], use_dora=True), base, "transposed")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=["replaced embedding", "low-rank head"],
)
def test_half_of_a_tied_pair_cannot_be_tuned(
    make_model: Factory, make_adapter: Factory, peft_merged: Merge, settings: dict[str, Any]
) -> None:
    """On tied embeddings peft tunes one of the two uses; the base's one tensor cannot stand for both.

    Shown first: where peft untied them, its merged model has two different tensors.
    """
    base = Checkpoint(make_model("llama", seed=1, tied=True))
    adapter = make_adapter(base.directory, seed=2, **settings)
    if "modules_to_save" in settings:
        merged = peft_merged(base.directory, adapter)
        assert not torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    refused(adapter, base, "ties to its other embedding")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_saved_embedding_that_was_not_trained_does_no_harm(
    make_model: Factory, make_adapter: Factory, tmp_path: Path, tied: bool
) -> None:
    """An adapter that merely carries the base's own embedding (save_embedding_layers=True) does not change it."""
    base = Checkpoint(make_model("llama", seed=1, tied=tied))
    adapter = shutil.copytree(make_adapter(base.directory, seed=2), tmp_path / "adapter")
    name = "model.embed_tokens.weight"
    save_file({**load_file(adapter / TENSORS), PREFIX + name: base.tensor(name).clone()}, adapter / TENSORS)
    tuned = AdapterOnBase(adapter, base)
    assert torch.equal(tuned.tensor(name), base.tensor(name))
    assert tuned.is_base(name)
    assert not tuned.dense_changes  # so that it is still a plain LoRA, for vLLM too


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks by the old name
@pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=["whole", "low-rank embedding", "low-rank head"],
)
def test_tied_embeddings_that_stay_tied_are_one_change(
    make_model: Factory, make_adapter: Factory, settings: dict[str, Any]
) -> None:
    """With ensure_weight_tying the merge is what the live model computes with, in embedding and head alike.

    peft's own merge_and_unload adds a low-rank change of the one tensor twice (0.21.2), once for each of its names:
    that is not the model that was trained, so that we hold ourselves to the live one.
    """
    base = Checkpoint(make_model("llama", seed=1, tied=True))
    adapter = make_adapter(base.directory, seed=2, ensure_weight_tying=True, **settings)
    tuned = tuned_tensors(base, AdapterOnBase(adapter, base))["model.embed_tokens.weight"]
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.directory), str(adapter))
    with torch.no_grad():
        embedded = live.get_input_embeddings()(torch.arange(len(tuned)))
        head = live.get_output_embeddings()(torch.eye(tuned.shape[1])).T
    assert not torch.equal(tuned, base.tensor("model.embed_tokens.weight"))
    torch.testing.assert_close(tuned, embedded, **FLOAT32)
    torch.testing.assert_close(tuned, head, **FLOAT32)


def test_tied_embeddings_that_were_trained_apart_are_refused(
    make_model: Factory, make_adapter: Factory, tmp_path: Path
) -> None:
    """Two different matrices have no place in one tensor; two equal ones have, whatever the configuration says."""
    base = Checkpoint(make_model("llama", seed=1, tied=True))
    adapter = shutil.copytree(make_adapter(base.directory, seed=2), tmp_path / "adapter")
    matrix = base.tensor("model.embed_tokens.weight") + 1
    rewritten(adapter, {f"{PREFIX}model.embed_tokens.weight": matrix, f"{PREFIX}lm_head.weight": matrix.clone()})
    assert torch.equal(AdapterOnBase(adapter, base).tensor("model.embed_tokens.weight"), matrix)
    rewritten(adapter, {f"{PREFIX}lm_head.weight": matrix + 1})
    refused(adapter, base, "ties to its other embedding")


def rewritten(adapter: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Put tensors in place of the adapter's own, or take them away."""
    tensors = {**load_file(adapter / TENSORS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, adapter / TENSORS)


Q_PROJ = f"{PREFIX}model.layers.0.self_attn.q_proj"
CHANGES: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no B": ({f"{Q_PROJ}.lora_B.weight": None}, r"but no '.*q_proj.lora_B.weight'"),
    "no A": ({f"{Q_PROJ}.lora_A.weight": None}, r"but no '.*q_proj.lora_A.weight'"),
    "ranks differ": ({f"{Q_PROJ}.lora_A.weight": torch.ones(3, 32)}, r"A has the shape \(3, 32\), B \(32, 4\)"),
    "too narrow": ({f"{Q_PROJ}.lora_A.weight": torch.ones(4, 16)}, r"with shape \(32, 16\).*its shape is \(32, 32\)"),
    "too tall": ({f"{Q_PROJ}.lora_B.weight": torch.ones(64, 4)}, r"with shape \(64, 32\).*its shape is \(32, 32\)"),
    "unknown module": (
        {
            f"{PREFIX}model.layers.9.x.lora_A.weight": torch.ones(4, 32),
            f"{PREFIX}model.layers.9.x.lora_B.weight": torch.ones(32, 4),
        },
        "no tensor 'model.layers.9.x.weight', either on disk",
    ),
    "unknown tensor": ({f"{Q_PROJ}.lora_magnitude_vector": torch.ones(32)}, "lora_magnitude_vector"),
    "replaced in another shape": ({f"{PREFIX}model.norm.weight": torch.ones(8)}, r"with shape \(8,\)"),
    "another base's copy": (
        {f"{Q_PROJ}.base_layer.weight": torch.ones(32, 32)},
        "unlike the base's 'model.layers.0.self_attn.q_proj.weight'",
    ),
    "replaced and adapted": ({f"{Q_PROJ}.weight": torch.ones(32, 32)}, "both replaces"),
}


@pytest.mark.parametrize(("changes", "words"), CHANGES.values(), ids=CHANGES.keys())
def test_tensors_that_do_not_fit_are_refused(
    adapter: Path, base: Checkpoint, changes: dict[str, Tensor | None], words: str
) -> None:
    """Each names the tensor and both sides, when the adapter is opened rather than half-way through a merge."""
    rewritten(adapter, changes)
    refused(adapter, base, words)


def test_the_remedy_is_never_the_base_that_was_given(adapter: Path, base: Checkpoint, tmp_path: Path) -> None:
    """An adapter that names this very base, or whose base is packed, says something else to do."""
    rewritten(adapter, {f"{PREFIX}model.layers.9.x.lora_{side}.weight": torch.ones(4, 4) for side in "AB"})
    other = shutil.copytree(base.directory, tmp_path / "other")
    for folder, quantised, words in (
        (base.directory, False, "names this base"),
        (other, False, f"give the base that the adapter was trained on: {base.directory}"),
        (other, True, "dequantise"),
    ):
        if quantised:
            change_json(other / "config.json", quantization_config={"quant_method": "mxfp4"})
        with pytest.raises(CheckpointError) as caught:
            open_weights(adapter, Checkpoint(folder))
        assert words in str(caught.value.remedy)
        assert str(folder) not in str(caught.value.remedy)


def test_adapter_that_backmerge_trained_fits_its_base_alone(
    adapter: Path, base: Checkpoint, make_model: Factory, tmp_path: Path
) -> None:
    """The card's digest of the tensors decides: another seed is refused, but a changed text file is not."""
    card = TrainedOn(base.fingerprint, base.tensors_fingerprint).as_card()
    (adapter / "backmerge.json").write_text(json.dumps(card))
    assert isinstance(open_weights(adapter, base), AdapterOnBase)
    other = Checkpoint(make_model("llama", seed=5, tied=False))
    of_base, of_other = base.tensors_fingerprint[:12], other.tensors_fingerprint[:12]
    refused(adapter, other, f"other weights than .* {of_base} and {of_other}")
    copy = shutil.copytree(base.directory, tmp_path / "copy")
    (copy / "LICENSE.txt").write_text("text")
    licensed = open_weights(adapter, Checkpoint(copy))
    assert isinstance(licensed, AdapterOnBase)
    assert licensed.is_base_proven
    (adapter / "backmerge.json").write_text("{}")
    refused(adapter, other, "other_base: .* trained on .*, which has other weights")


def test_fingerprint_of_an_earlier_version_is_no_proof_of_other_weights(
    adapter: Path, base: Checkpoint, make_model: Factory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It also covered text files: if it differs, there is a note, and the base is compared with the named one."""
    (adapter / "backmerge.json").write_text(json.dumps({"base_fingerprint": base.fingerprint}))
    copy = shutil.copytree(base.directory, tmp_path / "copy")
    (copy / "LICENSE.txt").write_text("text")
    open_weights(adapter, Checkpoint(copy))
    assert "is not exactly the base" in capsys.readouterr().err
    refused(adapter, Checkpoint(make_model("llama", seed=5, tied=False)), "other_base: .* which has other weights")


def test_a_damaged_adapter_is_refused(adapter: Path, base: Checkpoint) -> None:
    """Truncated, empty or absent tensors, and a configuration that is not JSON, are clear errors."""
    whole = (adapter / TENSORS).read_bytes()
    (adapter / TENSORS).write_bytes(whole[:-1])
    refused(adapter, base, "not a complete safetensors file")
    save_file({}, adapter / TENSORS)
    refused(adapter, base, "contains no tensors")
    (adapter / TENSORS).unlink()
    (adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refused(adapter, base, "but no adapter_model.safetensors")
    (adapter / CONFIG).write_text("{")
    refused(adapter, base, "cannot read")


def test_fingerprints_tell_adapters_apart(adapter: Path, base: Checkpoint, make_adapter: Factory) -> None:
    """An adapter's fingerprint is of its base, its factors and its configuration."""
    first = open_weights(adapter, base).fingerprint
    assert open_weights(make_adapter(base.directory, seed=2), base).fingerprint == first
    assert open_weights(make_adapter(base.directory, seed=3), base).fingerprint != first
    change(adapter, lora_alpha=16)
    assert open_weights(adapter, base).fingerprint != first
    assert is_adapter(adapter)
    assert not is_adapter(base.directory)
