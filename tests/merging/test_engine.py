"""Merging whole models: the three realisations, what survives, and what is refused."""

# ruff: noqa: ARG005 - a method takes all its arguments, whether it uses them or not

import errno
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from backmerge.checkpoints import writer
from backmerge.checkpoints.adapter import AdapterOnBase, open_weights
from backmerge.checkpoints.companions import Companions
from backmerge.checkpoints.reader import INDEX, SINGLE, Checkpoint
from backmerge.errors import BackmergeError, CheckpointError, ConfigError, MergeError
from backmerge.merging.engine import merged_tensors
from backmerge.merging.live import LiveMerge
from backmerge.merging.method import find_method, merge_method
from backmerge.merging.recipe import Variant
from backmerge.merging.to_disk import write_merged
from backmerge.registry import METHODS, NOTHING_ALLOWED, Permissions
from input_cases import inputs_for

ARCHITECTURES = ("llama", "gemma", "qwen2")
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
DTYPE = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
ARCHITECTURE = pytest.mark.parametrize("architecture", ARCHITECTURES)


def raw(tensor: Tensor) -> bytes:
    """The tensor's bytes, so that −0.0 is not 0.0."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def raw_all(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Every tensor's bytes by name."""
    return {name: raw(tensor) for name, tensor in tensors.items()}


def weights_of(directory: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors, read by safetensors itself."""
    return load_file(directory / SINGLE)


def copied(directory: Path, to: Path, changes: Mapping[str, Tensor | None] | None = None) -> Path:
    """A copy of a model with some tensors put in place of its own, or taken away."""
    shutil.copytree(directory, to)
    if changes:
        tensors = weights_of(directory) | dict(changes)
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, to / SINGLE, metadata={"format": "pt"})
    return to


def plugin(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Tensor]) -> None:
    """Put a method named `tested` into the table."""
    method = merge_method(has_exact_endpoints=False, is_idempotent=False)(function)
    monkeypatch.setitem(sys.modules, "tested_methods", types.SimpleNamespace(tested=method))
    monkeypatch.setitem(METHODS.entries, "tested", "tested_methods:tested")


@ARCHITECTURE
@TIED
@DTYPE
@pytest.mark.parametrize("name", [name for name in sorted(METHODS.entries) if find_method(name).has_exact_endpoints])
def test_endpoints_of_whole_models(
    make_model: Callable[..., Path], tmp_path: Path, architecture: str, tied: bool, dtype: str, name: str
) -> None:
    """Law 1 on disk: every byte of every tensor at λ=0 is the base's, and at λ=1 the tuned model's."""
    base, tuned = (make_model(architecture, seed=seed, tied=tied, dtype=dtype) for seed in (1, 2))
    inputs = inputs_for(name, Checkpoint(base), tmp_path)
    for lam, side in ((0.0, base), (1.0, tuned)):
        write_merged(
            Variant(Checkpoint(base), Checkpoint(tuned), find_method(name), lam, inputs=inputs), tmp_path / f"{lam}"
        )
        assert raw_all(weights_of(tmp_path / f"{lam}")) == raw_all(weights_of(side))


@ARCHITECTURE
@TIED
@DTYPE
def test_realisations_agree(
    make_model: Callable[..., Path], tmp_path: Path, architecture: str, tied: bool, dtype: str
) -> None:
    """Law 5: a loaded model set live equals the written checkpoint loaded by transformers, bit for bit."""
    base, tuned = (Checkpoint(make_model(architecture, seed=seed, tied=tied, dtype=dtype)) for seed in (1, 2))
    variant = Variant(base, tuned, lam=0.3)
    write_merged(variant, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    model = AutoModelForCausalLM.from_pretrained(base.directory)
    live = LiveMerge(model, base)
    assert live.is_possible()
    live.set(variant)
    assert raw_all(model.state_dict()) == raw_all(loaded)
    assert ("lm_head.weight" in weights_of(tmp_path / "merged")) is not tied


def test_live_agrees_where_the_computation_has_another_dtype(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """A bfloat16 checkpoint that is computed in float32 shows the rounded values, as it does when loaded."""
    base, tuned = (Checkpoint(make_model("llama", seed=seed, dtype="bfloat16")) for seed in (1, 2))
    variant = Variant(base, tuned, lam=0.7)
    write_merged(variant, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32)
    LiveMerge(model, base).set(variant)
    assert raw_all(model.state_dict()) == raw_all(loaded)


def test_switching_does_not_drift(tiny_base: Path, tiny_tuned: Path) -> None:
    """After fifty switches of λ the base is the base and a merge the merge, bit for bit."""
    base, tuned = Checkpoint(tiny_base), Checkpoint(tiny_tuned)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    live = LiveMerge(model, base)
    start = raw_all(model.state_dict())
    live.set(Variant(base, tuned, lam=0.4))
    merge = raw_all(model.state_dict())
    for step in range(50):
        live.set(Variant(base, tuned, lam=step / 49))
    live.set(Variant(base, tuned, lam=0.4))
    assert raw_all(model.state_dict()) == merge
    live.set(Variant(base))
    assert raw_all(model.state_dict()) == start
    assert start != merge


def test_live_merge_is_refused_if_one_parameter_is_two_tensors_on_disk(tiny_base: Path, tmp_path: Path) -> None:
    """A tied model whose file holds both embeddings is not set live: merged, the two would differ."""
    embedding = weights_of(tiny_base)["model.embed_tokens.weight"]
    both = copied(tiny_base, tmp_path / "both", {"lm_head.weight": embedding.clone()})
    model = AutoModelForCausalLM.from_pretrained(both)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert not LiveMerge(model, Checkpoint(both)).is_possible()


def test_a_live_merge_is_refused_for_a_model_of_other_tensors(make_model: Callable[..., Path]) -> None:
    """A model with tensors that the disk lacks, or the other way round, is not set live."""
    llama, qwen2 = (make_model(name, seed=1, tied=True) for name in ("llama", "qwen2"))
    assert not LiveMerge(AutoModelForCausalLM.from_pretrained(qwen2), Checkpoint(llama)).is_possible()
    assert not LiveMerge(AutoModelForCausalLM.from_pretrained(llama), Checkpoint(qwen2)).is_possible()


def test_bfloat16_is_rounded_once(make_model: Callable[..., Path]) -> None:
    """Law 3: the merge of bfloat16 models is the float64 mean rounded to bfloat16.

    One ulp is allowed where float32's own rounding crosses a tie: about one value in 2^16 / 6. Arithmetic in bfloat16,
    by contrast, misses more than one in ten.
    """
    base, tuned = (Checkpoint(make_model("llama", seed=seed, dtype="bfloat16")) for seed in (1, 2))
    total = wrong = wrong_if_rounded_twice = 0
    for name, tensor in merged_tensors(Variant(base, tuned, lam=0.37)):
        ours, theirs = base.tensor(name), tuned.tensor(name)
        exact = (0.63 * ours.double() + 0.37 * theirs.double()).bfloat16()
        total += tensor.numel()
        wrong += int((tensor != exact).sum())
        wrong_if_rounded_twice += int(((0.63 * ours + 0.37 * theirs) != exact).sum())
        off = tensor.view(torch.int16).int() - exact.view(torch.int16).int()
        assert int(off[tensor != 0].abs().max()) <= 1
    assert wrong <= 5 + total // 5000
    assert wrong_if_rounded_twice > total // 10


def test_methods_are_given_float32(make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 3: a method never sees bfloat16, so that even the plain formula is rounded once, by the engine."""
    seen = set()

    def plain(base: Tensor, tuned: Tensor, rng: Any, /, *, lam: float) -> Tensor:
        seen.update({base.dtype, tuned.dtype})
        return (1 - lam) * base + lam * tuned

    plugin(monkeypatch, plain)
    base, tuned = (Checkpoint(make_model("llama", seed=seed, dtype="bfloat16")) for seed in (1, 2))
    given = {tensor.dtype for _, tensor in merged_tensors(Variant(base, tuned, find_method("tested"), 0.37))}
    assert seen == {torch.float32}
    assert given == {torch.bfloat16}


def test_a_float64_checkpoint_keeps_its_precision(tiny_base: Path, tiny_tuned: Path, tmp_path: Path) -> None:
    """Law 1 holds for float64, too: values that float32 cannot hold come through both endpoints."""
    sides = []
    for side, offset in ((tiny_base, 1e-12), (tiny_tuned, 1e-11)):
        doubled = {name: tensor.double() + offset for name, tensor in weights_of(side).items()}
        sides.append(Checkpoint(copied(side, tmp_path / side.name, doubled)))
    for lam, side in zip((0.0, 1.0), sides, strict=True):
        for name, tensor in merged_tensors(Variant(*sides, lam=lam)):
            assert raw(tensor) == raw(side.tensor(name))


def test_what_survives_a_merge(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Law 2: names, shapes, dtypes, metadata, config, tokenizer and chat template are the base's."""
    base, tuned = (make_model("qwen2", seed=seed, tied=True, dtype="bfloat16") for seed in (1, 2))
    marked = copied(base, tmp_path / "marked")
    save_file(weights_of(base), marked / SINGLE, metadata={"format": "pt", "trained_by": "somebody"})
    write_merged(Variant(Checkpoint(marked), Checkpoint(tuned), lam=0.5), tmp_path / "merged")
    before, after = Checkpoint(marked), Checkpoint(tmp_path / "merged")
    assert {n: (i.shape, i.dtype) for n, i in before.infos.items()} == {
        n: (i.shape, i.dtype) for n, i in after.infos.items()
    }
    assert after.metadata == {"format": "pt", "trained_by": "somebody"}
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    template = AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert template == AutoTokenizer.from_pretrained(base).chat_template
    card = json.loads((tmp_path / "merged" / "backmerge.json").read_text())
    assert card["recipe"]["lam"] == 0.5
    assert card["recipe"]["base"] == before.fingerprint


def test_only_what_is_allowed_is_copied(tiny_base: Path, tiny_tuned: Path, tmp_path: Path) -> None:
    """Law 12: code and pickles next to the weights stay behind."""
    base = copied(tiny_base, tmp_path / "base")
    strangers = ("modeling_evil.py", "tokenizer.py", "pytorch_model.bin", "optimizer.pt", "tokenizer.pkl", ".env")
    for name in strangers:
        (base / name).write_text("import os")
    (base / "tokenizer_dir.json").mkdir()
    write_merged(Variant(Checkpoint(base), Checkpoint(tiny_tuned), lam=0.5), tmp_path / "merged")
    there = {file.name for file in (tmp_path / "merged").iterdir()}
    assert not there & {*strangers, "tokenizer_dir.json"}
    assert {"config.json", "tokenizer.json", SINGLE} <= there


def test_sharded_writing_reads_back(
    tiny_base: Path, tiny_tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards with their index give the same model, by our reader and by transformers; and the same bytes again."""
    variant = Variant(Checkpoint(tiny_base), Checkpoint(tiny_tuned), lam=0.5)
    write_merged(variant, tmp_path / "whole")
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 20_000)
    for name in ("first", "second"):
        write_merged(variant, tmp_path / name)
    shards = sorted(file.name for file in (tmp_path / "first").glob("*.safetensors"))
    assert len(shards) > 2
    assert (tmp_path / "first" / INDEX).is_file()
    # a shard holds no more than it may, unless it is a single tensor; 4,096 bytes of header are allowed for
    sharded = Checkpoint(tmp_path / "first")
    for shard in shards:
        names = [name for name, info in sharded.infos.items() if info.file.name == shard]
        assert (tmp_path / "first" / shard).stat().st_size <= 20_000 + 4096 or len(names) == 1
    whole = weights_of(tmp_path / "whole")
    assert raw_all({name: sharded.tensor(name) for name in sharded.infos}) == raw_all(whole)
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "first")]
    assert raw_all(loaded[0]) == raw_all(loaded[1])
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()


def test_the_result_does_not_depend_on_the_shards_read(
    tiny_base: Path, tiny_tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 3: a base in shards merges to the same tensors as the same base in one file, also with random numbers."""
    plugin(monkeypatch, lambda base, tuned, rng, /, *, lam: rng.uniform(base).float())
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 20_000)
    write_merged(Variant(Checkpoint(tiny_base)), tmp_path / "sharded")
    sharded = Checkpoint(tmp_path / "sharded")
    tuned = Checkpoint(tiny_tuned)
    whole, pieces, other = (
        raw_all(dict(merged_tensors(Variant(base, tuned, find_method("tested"), 0.5, seed=seed))))
        for base, seed in ((Checkpoint(tiny_base), 0), (sharded, 0), (sharded, 1))
    )
    assert whole == pieces
    assert whole != other
    # each tensor has noise of its own: of all that have one shape, no two are equal
    norms = [whole[name] for name in whole if "norm" in name]
    assert len(set(norms)) == len(norms) > 1


def test_an_interrupted_write_leaves_nothing(
    tiny_base: Path, tiny_tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 11: killed half-way, there is neither a model at the target nor anything next to it."""
    calls = 0

    def dies(base: Tensor, tuned: Tensor, rng: Any, /, *, lam: float) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise KeyboardInterrupt
        return base

    plugin(monkeypatch, dies)
    with pytest.raises(KeyboardInterrupt):
        write_merged(
            Variant(Checkpoint(tiny_base), Checkpoint(tiny_tuned), find_method("tested"), 0.5),
            tmp_path / "out" / "merged",
        )
    assert list(tmp_path.iterdir()) == []


def test_failed_write_keeps_the_old_file(tiny_base: Path, tiny_tuned: Path, tmp_path: Path) -> None:
    """A model that stood at the target is still there, whole, when its replacement fails; a good one replaces it."""
    target = tmp_path / "target"
    write_merged(Variant(Checkpoint(tiny_base)), target)
    nan = copied(tiny_tuned, tmp_path / "nan", {"model.norm.weight": torch.full((32,), float("nan"))})
    with pytest.raises(MergeError, match="NaN"):
        write_merged(Variant(Checkpoint(tiny_base), Checkpoint(nan), lam=0.5), target, replace=True)
    assert raw_all(weights_of(target)) == raw_all(weights_of(tiny_base))
    write_merged(Variant(Checkpoint(tiny_base), Checkpoint(tiny_tuned), lam=1.0), target, replace=True)
    assert raw_all(weights_of(target)) == raw_all(weights_of(tiny_tuned))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan", "target"]


def test_a_full_disk_is_found_before_writing(
    tiny_base: Path, tiny_tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 11: too little room is one clear error, and nothing is left."""
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="GB are free"):
        write_merged(Variant(Checkpoint(tiny_base), Checkpoint(tiny_tuned), lam=0.5), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_the_remedy_fits_the_error_of_the_disk(
    tiny_base: Path, tiny_tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a full disk is to be freed."""
    remedies = {
        errno.ENOSPC: "free some space",
        errno.EROFS: "read-only: give another --out",
        errno.EPERM: "Give another",
    }
    for number, words in remedies.items():

        def refused(*_: object, number: int = number) -> None:
            raise OSError(number, "refused")

        monkeypatch.setattr(Companions, "write", refused)
        with pytest.raises(CheckpointError, match="cannot write") as caught:
            write_merged(Variant(Checkpoint(tiny_base), Checkpoint(tiny_tuned), lam=0.5), tmp_path / "merged")
        assert caught.value.remedy is not None
        assert words in caught.value.remedy
        assert ("free" in caught.value.remedy) is (number == errno.ENOSPC)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_disk_that_fills_up_is_a_clear_error(
    tiny_base: Path, tiny_tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that another program fills meanwhile ends in an error that the user can mend, not in a traceback."""

    def full(*_: object) -> None:
        with Path("/dev/full").open("w") as stream:
            stream.write("x" * 100_000)

    monkeypatch.setattr(Companions, "write", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_merged(Variant(Checkpoint(tiny_base), Checkpoint(tiny_tuned), lam=0.5), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_a_tuned_model_in_every_realisation(
    make_model: Callable[..., Path],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Base + adapter merges as a checkpoint and live to the same bits, and λ=0 is the base."""
    base = Checkpoint(make_model("gemma", seed=1, tied=True, dtype="bfloat16"))
    tuned = open_weights(make_adapter(base.directory, seed=3), base)
    assert isinstance(tuned, AdapterOnBase)
    variant = Variant(base, tuned, lam=0.6)
    write_merged(variant, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(base.directory)
    live = LiveMerge(model, base)
    live.set(variant)
    assert raw_all(model.state_dict()) == raw_all(
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    )
    live.set(Variant(base, tuned, lam=0.0))
    assert raw_all(model.state_dict()) == raw_all(AutoModelForCausalLM.from_pretrained(base.directory).state_dict())


CHANGES: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "missing": ({"model.norm.weight": None}, "'model.norm.weight' is only in the base"),
    "extra": ({"model.extra.weight": torch.ones(3)}, "'model.extra.weight' is only in the tuned model"),
    "other shape": ({"model.norm.weight": torch.ones(16)}, r"\(32,\) in the base and \(16,\) in the tuned"),
    "other kind": ({"model.norm.weight": torch.ones(32, dtype=torch.int32)}, "F32 in the base and I32 in the tuned"),
    "more rows": ({"model.layers.0.mlp.up_proj.weight": torch.ones(52, 32)}, r"\(48, 32\).*\(52, 32\)"),
}


@pytest.mark.parametrize(("changes", "words"), CHANGES.values(), ids=CHANGES.keys())
def test_models_that_do_not_fit_are_refused(
    tiny_base: Path, tiny_tuned: Path, tmp_path: Path, changes: dict[str, Tensor | None], words: str
) -> None:
    """Law 4: the tensor, both sides and both folders are named; nothing is cropped, skipped or written."""
    tuned = copied(tiny_tuned, tmp_path / "tuned", changes)
    with pytest.raises(MergeError, match=words) as caught:
        write_merged(Variant(Checkpoint(tiny_base), Checkpoint(tuned), lam=0.5), tmp_path / "merged")
    assert str(tiny_base) in str(caught.value)
    assert str(tuned) in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_many_differences_are_counted(tiny_base: Path, make_model: Callable[..., Path], tmp_path: Path) -> None:
    """A long list of differences is shown in part, and the rest is counted."""
    changes = dict.fromkeys([name for name in weights_of(tiny_base) if "mlp" in name or "norm" in name])
    tuned = copied(tiny_base, tmp_path / "tuned", changes)
    with pytest.raises(MergeError, match=f"and {len(changes) - 5} more"):
        list(merged_tensors(Variant(Checkpoint(tiny_base), Checkpoint(tuned), lam=0.5)))


def test_architectures_are_distinguished(make_model: Callable[..., Path]) -> None:
    """A tuned model of another architecture is refused by the names of both."""
    base, tuned = (Checkpoint(make_model(name, seed=1, tied=True)) for name in ("llama", "qwen2"))
    with pytest.raises(MergeError, match=r"is a qwen2, the base .* a llama"):
        list(merged_tensors(Variant(base, tuned, lam=0.5)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("damaged", ["base", "tuned model"])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_non_finite_values_are_refused(
    tiny_base: Path, tiny_tuned: Path, tmp_path: Path, value: float, damaged: str, lam: float
) -> None:
    """Law 4: one bad value on either side is reported with its tensor and side, whatever λ."""
    sides = {"base": tiny_base, "tuned model": tiny_tuned}
    bad = weights_of(sides[damaged])["model.norm.weight"]
    bad[7] = value
    sides[damaged] = copied(sides[damaged], tmp_path / "bad", {"model.norm.weight": bad})
    variant = Variant(Checkpoint(sides["base"]), Checkpoint(sides["tuned model"]), lam=lam)
    with pytest.raises(MergeError, match=f"'model.norm.weight' of the {damaged} .* NaN or infinity"):
        list(merged_tensors(variant))


def test_a_result_that_is_not_finite_is_refused(
    tiny_base: Path, tiny_tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite models whose merge is not: the difference of two huge values overflows, and a method may return NaN."""
    sides = [
        Checkpoint(copied(side, tmp_path / side.name, {"model.norm.weight": torch.full((32,), value)}))
        for side, value in ((tiny_base, 3e38), (tiny_tuned, -3e38))
    ]
    with pytest.raises(MergeError, match=r"'model.norm.weight' holds NaN or values beyond the range of F32"):
        list(merged_tensors(Variant(*sides, lam=0.5)))
    plugin(monkeypatch, lambda base, tuned, rng, /, *, lam: base / 0 * 0)
    with pytest.raises(MergeError, match="holds NaN"):
        list(merged_tensors(Variant(Checkpoint(tiny_base), Checkpoint(tiny_tuned), find_method("tested"), 0.5)))


def test_a_method_that_changes_the_shape_is_refused(
    tiny_base: Path, tiny_tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scalar would be spread over a live model's tensors without a word."""
    plugin(monkeypatch, lambda base, tuned, rng, /, *, lam: base.mean())
    with pytest.raises(MergeError, match="the shape"):
        list(merged_tensors(Variant(Checkpoint(tiny_base), Checkpoint(tiny_tuned), find_method("tested"), 0.5)))


def test_whole_numbers_pass_only_where_they_agree(tiny_base: Path, tiny_tuned: Path, tmp_path: Path) -> None:
    """A buffer of whole numbers comes through if both sides have the same, and is refused otherwise."""
    extra = {"model.steps": torch.tensor([3, 4]), "model.mask": torch.tensor([True, False, True])}
    base = Checkpoint(copied(tiny_base, tmp_path / "base", extra))
    same = Checkpoint(copied(tiny_tuned, tmp_path / "same", extra))
    write_merged(Variant(base, same, lam=0.5), tmp_path / "merged")
    assert weights_of(tmp_path / "merged")["model.steps"].tolist() == [3, 4]
    assert weights_of(tmp_path / "merged")["model.mask"].tolist() == [True, False, True]
    other = Checkpoint(copied(tiny_tuned, tmp_path / "other", {**extra, "model.steps": torch.tensor([3, 5])}))
    with pytest.raises(MergeError, match=r"'model.steps' has dtype I64, and differs"):
        list(merged_tensors(Variant(base, other, lam=0.5)))


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"lam": 1.5}, MergeError, "λ is 1.5"),
        ({"lam": -0.1}, MergeError, "λ is -0.1"),
        ({"lam": float("nan")}, MergeError, "λ is nan"),
        ({"parameters": {"lam": 0.9}}, MergeError, "'lam' is among"),
        ({"parameters": {"density": 0.9}}, MergeError, "no parameter 'density'"),
    ],
)
def test_a_wrong_recipe_is_refused(
    tiny_base: Path, tiny_tuned: Path, settings: dict[str, Any], kind: type[BackmergeError], words: str
) -> None:
    """λ outside its range, an unknown parameter, or λ given twice is refused before anything is read."""
    with pytest.raises(kind, match=words):
        next(merged_tensors(Variant(Checkpoint(tiny_base), Checkpoint(tiny_tuned), **settings)))


@pytest.mark.parametrize(
    ("name", "permissions", "kind", "words"),
    [
        ("lineer", NOTHING_ALLOWED, ConfigError, "did you mean 'linear'"),
        ("os.path:join", NOTHING_ALLOWED, ConfigError, "your own code"),
        ("os.path:join", Permissions(plugins=True), MergeError, "is not a merge method"),
    ],
)
def test_plugin_that_is_not_a_method_is_refused(
    name: str, permissions: Permissions, kind: type[BackmergeError], words: str
) -> None:
    """An unknown name, a plugin without permission, and a function that is not declared a merge method."""
    with pytest.raises(kind, match=words):
        find_method(name, permissions)


def test_a_plugin_is_named_as_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name in cards and keys of answers is the path of its code, which no table knows."""
    monkeypatch.setitem(sys.modules, "own_methods_8", types.SimpleNamespace(mine=find_method("slerp")))
    found = find_method("own_methods_8:mine", Permissions(plugins=True))
    assert found.name == "own_methods_8:mine"
    assert found.function is find_method("slerp").function


def test_equal_identities_mean_equal_models(tiny_base: Path, tiny_tuned: Path) -> None:
    """The identity changes with every part of the recipe, and with nothing else."""
    base, tuned = Checkpoint(tiny_base), Checkpoint(tiny_tuned)
    variants = [
        Variant(base),
        Variant(tuned),
        Variant(base, tuned),
        Variant(tuned, base),
        Variant(base, tuned, lam=0.5),
        Variant(base, tuned, lam=0.5, seed=1),
        Variant(base, tuned, find_method("slerp"), lam=0.5),
        Variant(base, tuned, lam=0.5, parameters={"density": 0.1}),
    ]
    identities = [json.dumps(variant.identity, sort_keys=True) for variant in variants]
    assert len(set(identities)) == len(identities)
    again = Variant(Checkpoint(tiny_base), Checkpoint(tiny_tuned), lam=0.5)
    assert again.identity == variants[4].identity


def test_merging_imports_neither_transformers_nor_peft(tiny_base: Path, tiny_tuned: Path, tmp_path: Path) -> None:
    """Law 15: a merge from two checkpoints needs torch only."""
    code = (
        "import sys; from pathlib import Path\n"
        "from backmerge.checkpoints.reader import Checkpoint\n"
        "from backmerge.merging.to_disk import write_merged\n"
        "from backmerge.merging.recipe import Variant\n"
        "base, tuned, out = map(Path, sys.argv[1:])\n"
        "write_merged(Variant(Checkpoint(base), Checkpoint(tuned), lam=0.5), out)\n"
        "heavy = {'transformers', 'peft', 'accelerate', 'datasets', 'scipy', 'matplotlib'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tiny_base, tiny_tuned, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"
    assert (tmp_path / "out" / SINGLE).is_file()
