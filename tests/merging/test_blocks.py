"""One pass for many λs: what is read once, what no thread changes, what rounding costs, what stays on a device."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.files import SafetensorsFile, TensorDigests
from backmerge.checkpoints.reader import SINGLE, Checkpoint
from backmerge.errors import MergeError
from backmerge.merging.blocks import Merge
from backmerge.merging.engine import carry_out, merged_tensors
from backmerge.merging.live import LiveMerge
from backmerge.merging.method import find_method
from backmerge.merging.randomness import TensorRandom
from backmerge.merging.recipe import Variant
from backmerge.merging.reductions import BLOCK
from backmerge.merging.rounding import RoundingLoss, stochastic
from backmerge.merging.to_disk import write_all
from backmerge.registry import METHODS
from input_cases import inputs_for

Factory = Callable[..., Path]
ONE_TUNED = sorted(n for n in METHODS.entries if find_method(n).num_tuned[0] == 1 and not find_method(n).extra_models)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Checkpoint]:
    """Two bfloat16 models with a tensor of more than two blocks, one that ends within a block, and a small delta."""
    shapes = {"model.layers.0.weight": (2100, 1024), "model.layers.1.weight": (700, 1000), "model.norm.weight": (64,)}
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tuned = {name: side + 0.02 * torch.randn(side.shape, generator=generator) for name, side in base.items()}
    sides = []
    for name, tensors in (("base", base), ("tuned", tuned)):
        directory = tmp_path_factory.mktemp("large") / name
        directory.mkdir()
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, directory / SINGLE)
        (directory / "config.json").write_text("{}")
        sides.append(Checkpoint(directory))
    return sides[0], sides[1]


def gathered(merge: Merge, workers: int) -> list[dict[str, torch.Tensor]]:
    """What the sink is given, put together for each variant."""
    whole = [{n: torch.zeros(i.num_elements).bfloat16() for n, i in merge.infos.items()} for _ in merge.variants]

    def sink(number: int, name: str, start: int, block: torch.Tensor) -> None:
        assert not whole[number][name][start : start + block.numel()].any()
        whole[number][name][start : start + block.numel()] = block

    carry_out(merge, sink, workers=workers)
    return whole


@pytest.mark.parametrize("method", ONE_TUNED)
def test_threads_and_company_change_nothing(large: tuple[Checkpoint, Checkpoint], tmp_path: Path, method: str) -> None:
    """Law 3: one thread or four, one λ or three in a pass, give the same bits, random methods included."""
    recipe = Variant(*large, find_method(method), seed=3, inputs=inputs_for(method, large[0], tmp_path))
    alone = [gathered(Merge([recipe.at(lam)]), 1)[0] for lam in (0.2, 0.5, 0.9)]
    together = gathered(Merge([recipe.at(lam) for lam in (0.2, 0.5, 0.9)]), 4)
    for first, second in zip(alone, together, strict=True):
        assert all(torch.equal(first[name].view(torch.int16), second[name].view(torch.int16)) for name in first)


def test_several_lams_read_their_inputs_once(
    large: tuple[Checkpoint, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four λs in one pass read each byte of the tensors once, fingerprints included; SLERP, which must know, twice."""
    total = sum(info.length for side in large for info in side.infos.values())
    read = 0
    original = SafetensorsFile.read_into

    def counted(self: SafetensorsFile, place: memoryview, offset: int) -> None:
        nonlocal read
        read += len(place)
        original(self, place, offset)

    monkeypatch.setattr(SafetensorsFile, "read_into", counted)
    for method, times in (("linear", 1), ("slerp", 2)):
        read = 0
        recipe = Variant(*(Checkpoint(side.directory) for side in large), find_method(method))
        write_all({tmp_path / method / f"{lam}": recipe.at(lam) for lam in (0.2, 0.4, 0.6, 0.8)})
        assert read == times * total


def test_fingerprints_in_passing_are_those_of_a_reading(large: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    """What a merge gathers of its inputs and outputs is what a fresh reader finds."""
    inputs = [Checkpoint(side.directory) for side in large]
    write_all({tmp_path / "out": Variant(*inputs).at(0.5)})
    for checkpoint in inputs:
        assert "fingerprint" in vars(checkpoint)
        assert checkpoint.fingerprint == Checkpoint(checkpoint.directory).fingerprint
    shutil.copytree(tmp_path / "out", tmp_path / "changed")
    tensors = load_file(tmp_path / "changed" / SINGLE)
    tensors["model.norm.weight"][5] += 1
    save_file(tensors, tmp_path / "changed" / SINGLE)
    assert Checkpoint(tmp_path / "changed").fingerprint != Checkpoint(tmp_path / "out").fingerprint


def test_a_fingerprint_does_not_depend_on_order(large: tuple[Checkpoint, Checkpoint]) -> None:
    """Blocks may come in any order, but each in its place."""
    infos = large[0].infos
    pieces = [
        (name, start, large[0].block(name, start, min(start + BLOCK, info.num_elements)))
        for name, info in infos.items()
        for start in range(0, info.num_elements, BLOCK)
    ]
    found = []
    for order in (pieces, pieces[::-1]):
        digests = TensorDigests(infos)
        for name, start, block in order:
            assert not digests.is_complete
            digests.add(name, start, block)
        assert digests.is_complete
        found.append(digests.combined())
    assert found[0] == found[1]


def test_rounding_loss_matches_the_written_model(large: tuple[Checkpoint, Checkpoint]) -> None:
    """From 1 % of the elements within a tenth of the whole truth, for a kernel that rounds and for one that does not.

    Some 28,000 elements are sampled; their mean square is known to about 1 %.
    """
    base, tuned = large
    for method in ("linear", "slerp"):
        for lam in (0.2, 0.6):
            merge = Merge([Variant(base, tuned, find_method(method), lam)])
            merged = gathered(merge, 2)[0]
            lost = meant = 0.0
            for name in base.infos:
                start, end = base.tensor(name).double(), tuned.tensor(name).double()
                exact = start + lam * (end - start)
                lost += float((merged[name].view(start.shape).double() - exact).square().sum())
                meant += float((exact - start).square().sum())
            share = merge.losses[0].share
            assert share == pytest.approx((lost / meant) ** 0.5, rel=0.1)
            assert share > 0.05


def test_too_small_a_sample_has_no_rounding_loss() -> None:
    """Below a thousand elements, or where nothing changes, there is no share."""
    loss = RoundingLoss()
    loss.add(torch.zeros(999), torch.ones(999), torch.ones(999))
    assert loss.share is None
    loss.add(torch.zeros(1), torch.ones(1), torch.ones(1))
    assert loss.share == 0.0
    still = RoundingLoss()
    still.add(torch.ones(2000), torch.ones(2000), torch.ones(2000))
    assert still.share is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_right_on_average(dtype: torch.dtype) -> None:
    """The mean over 2^20 roundings of one number is the number, within five sigma; each is one of its neighbours.

    Numbers that the dtype has stay, zeros keep their sign, and the nearest alone would be off.
    """
    for value in (1.001, -1.001, 3e-3, 1e-7):
        exact = torch.full((BLOCK,), value)
        rounded = stochastic(exact, dtype, TensorRandom(0, "tested")).double()
        values = rounded.unique()
        assert len(values) == 2
        assert float(values[0]) < value < float(values[1])
        sigma = float(values[1] - values[0]) / 2 / BLOCK**0.5
        assert float(rounded.mean()) == pytest.approx(exact[0].double().item(), abs=5 * sigma)
        assert float(exact[:1].to(dtype).double() - exact[0].double()) != pytest.approx(0, abs=5 * sigma)
    kept = torch.tensor([0.0, -0.0, 1.0, -2.5, 65504.0 if dtype == torch.float16 else 3e38]).to(dtype)
    again = stochastic(kept.float(), dtype, TensorRandom(0, "tested"))
    assert torch.equal(kept.view(torch.int16), again.view(torch.int16))


def test_stochastic_rounding_keeps_the_endpoints(large: tuple[Checkpoint, Checkpoint]) -> None:
    """Law 1: at λ=0 and λ=1 nothing needs rounding, so that nothing is random."""
    for lam, side in ((0.0, large[0]), (1.0, large[1])):
        for name, tensor in merged_tensors(Variant(*large, lam=lam, rounding="stochastic")):
            assert torch.equal(tensor.view(torch.int16), side.tensor(name).view(torch.int16))


def test_stochastic_rounding_draws_by_position(large: tuple[Checkpoint, Checkpoint]) -> None:
    """However a tensor is cut, each element is rounded by the number that stands at its place in the whole."""
    variant = Variant(*large, lam=0.3, seed=5, rounding="stochastic")
    for name, tensor in merged_tensors(variant):
        base, tuned = (side.tensor(name).float() for side in large)
        exact = find_method("linear").function(base, tuned, lam=0.3)
        expected = stochastic(exact, torch.bfloat16, TensorRandom(5, name))
        assert torch.equal(tensor.view(torch.int16), expected.view(torch.int16)), name


def test_unchanged_tensors_must_fit_the_dtype_too(make_model: Factory, tmp_path: Path) -> None:
    """A value beyond float16 is an error where nothing is merged, and where the base itself is cast."""
    sides = []
    for seed in (1, 2):
        side = shutil.copytree(make_model("llama", seed=seed), tmp_path / str(seed))
        tensors = load_file(side / SINGLE)
        tensors["model.norm.weight"] = torch.full((32,), 1e5)
        save_file(tensors, side / SINGLE, metadata={"format": "pt"})
        sides.append(Checkpoint(side))
    for variant in (Variant(*sides, dtype="F16").at(0.5), Variant(sides[0], dtype="F16")):
        with pytest.raises(MergeError, match=r"'model.norm.weight' holds NaN or values beyond the range of F16"):
            list(merged_tensors(variant))


def test_float64_on_one_side_keeps_its_precision(make_model: Factory, tmp_path: Path) -> None:
    """A float64 tuned model comes through λ=1 bit for bit, also from a float32 base."""
    base = Checkpoint(make_model("llama", seed=1))
    tuned = shutil.copytree(make_model("llama", seed=2), tmp_path / "tuned")
    tensors = {name: tensor.double() + 1e-12 for name, tensor in load_file(tuned / SINGLE).items()}
    save_file(tensors, tuned / SINGLE, metadata={"format": "pt"})
    for name, tensor in merged_tensors(Variant(base, Checkpoint(tuned), dtype="F64").at(1.0)):
        assert torch.equal(tensor, tensors[name])


@pytest.mark.parametrize("method", ONE_TUNED)
def test_a_resident_live_merge_is_the_same(
    make_model: Factory, make_adapter: Factory, tmp_path: Path, method: str
) -> None:
    """Kept in memory or read from files, from a checkpoint or an adapter: the same tensors, and no drift."""
    base = Checkpoint(make_model("llama", seed=1, dtype="bfloat16"))
    sides: list[Any] = [Checkpoint(make_model("llama", seed=2, dtype="bfloat16"))]
    sides.append(AdapterOnBase(make_adapter(base.directory, seed=1), base))
    model = AutoModelForCausalLM.from_pretrained(base.directory)
    live = LiveMerge(model, base, resident=True)
    inputs = inputs_for(method, base, tmp_path)
    for tuned in (*sides, *sides):
        variant = Variant(base, tuned, find_method(method), 0.3, inputs=inputs)
        live.set(variant)
        for name, tensor in merged_tensors(variant):
            assert torch.equal(model.state_dict()[name].view(torch.int16), tensor.view(torch.int16)), name
    live.set(Variant(base))
    assert all(torch.equal(model.state_dict()[name], base.tensor(name)) for name in base.infos)


def test_a_resident_merge_looks_at_its_numbers(make_model: Factory, tmp_path: Path) -> None:
    """NaN in an input is found as it is taken in, an overflow at the end."""
    base = Checkpoint(make_model("llama", seed=1))
    live = LiveMerge(AutoModelForCausalLM.from_pretrained(base.directory), base, resident=True)
    for value, words in ((float("nan"), "holds NaN or infinity"), (-3e38, "values beyond the range of F32")):
        bad = shutil.copytree(make_model("llama", seed=2), tmp_path / str(value))
        tensors = load_file(bad / SINGLE)
        tensors["model.norm.weight"][0] = value
        save_file(tensors, bad / SINGLE, metadata={"format": "pt"})
        huge = shutil.copytree(base.directory, tmp_path / f"base{value}")
        tensors = load_file(huge / SINGLE)
        tensors["model.norm.weight"][0] = 3e38
        save_file(tensors, huge / SINGLE, metadata={"format": "pt"})
        with pytest.raises(MergeError, match=words):
            live.set(Variant(Checkpoint(huge), Checkpoint(bad)).at(0.5))
