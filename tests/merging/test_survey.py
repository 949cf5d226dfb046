"""The survey: against numpy, by hand, and the same whoever computes it; what it says of two models' relation."""

import dataclasses
import math
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from backmerge.checkpoints.adapter import open_weights
from backmerge.checkpoints.reader import SINGLE, Checkpoint
from backmerge.errors import MergeError
from backmerge.merging import survey as module
from backmerge.merging.changes import Change, combined, covered_share, relation
from backmerge.merging.methods.linear import linear
from backmerge.merging.methods.slerp import slerp
from backmerge.merging.reductions import gram_of_models
from backmerge.merging.survey import measurable, rank_of_product, slerp_gap_square, survey

Factory = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def pair(tmp_path: Path) -> Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]]:
    """`pair(base, tuned)`: two checkpoints of these tensors."""

    def make(base: Tensors, tuned: Tensors) -> tuple[Checkpoint, Checkpoint]:
        for side, tensors in (("base", base), ("tuned", tuned)):
            (tmp_path / side).mkdir(exist_ok=True)
            (tmp_path / side / "config.json").write_text('{"model_type": "llama"}')
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / side / SINGLE)
        return Checkpoint(tmp_path / "base"), Checkpoint(tmp_path / "tuned")

    return make


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Gaussian numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def participation(delta: torch.Tensor) -> float:
    """(Σσ²)² / Σσ⁴ from all singular values."""
    squares = np.linalg.svd(delta.double().numpy(), compute_uv=False) ** 2
    return float(squares.sum() ** 2 / (squares**2).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_those_of_numpy(
    dtype: torch.dtype, pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]]
) -> None:
    """Norms, cosine and unchanged elements, over more than one block, are those of the whole vectors in float64."""
    base = random(1100, 1000).to(dtype)
    tuned = (base.float() + random(1100, 1000, seed=1, scale=0.01)).to(dtype)
    tuned[:100] = base[:100]
    change = survey(*pair({"w": base}, {"w": tuned}))["w"]
    a, b = base.double().flatten().numpy(), tuned.double().flatten().numpy()
    # float32 products, summed 2^12 at a time: their roundings average out far below 2^-24
    near = {"rel": 1e-6}
    assert change.elements == a.size
    assert change.base_square == pytest.approx(a @ a, **near)
    assert change.tuned_square == pytest.approx(b @ b, **near)
    assert change.relative_norm == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), **near)
    assert change.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-7)
    assert change.unchanged == np.mean(a == b)


def test_by_hand(pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]]) -> None:
    """A vector of four elements, one of them changed."""
    base = torch.tensor([2.0, 0.0, 0.0, 0.0])
    change = survey(*pair({"w": base}, {"w": torch.tensor([2.0, 0.0, 0.0, 1.0])}))["w"]
    assert change.relative_norm == 0.5
    assert change.cosine == pytest.approx(2 / math.sqrt(5))
    assert change.unchanged == 0.75
    assert change.effective_rank is None


def test_minus_zero_is_not_zero(pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]]) -> None:
    """Unchanged means the bits, as merges at λ = 0 and 1 keep them."""
    change = survey(*pair({"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([-0.0, 1.0])}))["w"]
    assert change.unchanged == 0.5
    assert change.relative_norm == 0


def test_a_vector_of_zeros_has_no_direction(pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]]) -> None:
    """A bias that was zero and is not: the relative norm is infinite, and there is no cosine."""
    change = survey(*pair({"w": torch.zeros(3)}, {"w": torch.ones(3)}))["w"]
    assert change.relative_norm == math.inf
    assert change.cosine is None
    assert change.slerp_gap == 0


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", None])
def test_rounding_costs_are_those_of_the_formula(
    dtype: str | None, pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]]
) -> None:
    """‖round(merged) - merged‖ / ‖λΔ‖, element by element; nothing in float32."""
    base = random(700, 900, scale=0.02).bfloat16()
    tuned = (base.float() + random(700, 900, seed=1, scale=1e-4)).bfloat16()
    lams = (0.2, 0.8, 1.0)
    change = survey(*pair({"w": base}, {"w": tuned}), lams=lams, dtype=dtype)["w"]
    to = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, None: torch.bfloat16}[dtype]
    for lam in lams:
        merged = linear.function(base.float(), tuned.float(), lam=lam)
        lost = (merged.to(to).double() - merged.double()).norm()
        meant = lam * (tuned.double() - base.double()).norm()
        assert change.rounding_costs[lam] == pytest.approx(float(lost / meant), rel=1e-6)
    if dtype in {"BF16", None}:
        assert change.rounding_costs[0.2] > 0.2  # a small change is lost to a large part
        assert change.rounding_costs[1.0] == 0  # the tuned model itself
    if dtype == "F32":
        assert set(change.rounding_costs.values()) == {0.0}


def test_nothing_changed_costs_nothing_to_round(
    pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]],
) -> None:
    """Without a change there is no share of it."""
    change = survey(*pair({"w": random(5)}, {"w": random(5)}), lams=[0.5])["w"]
    assert change.rounding_costs == {0.5: None}


@pytest.mark.parametrize("spread", [0.01, 0.05, 0.3, 1.0, 5.0])
def test_slerp_differs_from_linear_as_the_methods_do(
    spread: float, pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]]
) -> None:
    """The closed form gives the distance of the two methods' results at λ = 0.5."""
    base = random(300, 400).double()
    tuned = base + spread * random(300, 400, seed=1).double()
    change = survey(*pair({"w": base}, {"w": tuned}))["w"]
    arc = slerp.function(base, tuned, [gram_of_models(base, tuned)], lam=0.5)
    gap = (arc - linear.function(base, tuned, lam=0.5)).norm() / (tuned - base).norm()
    assert change.slerp_gap == pytest.approx(float(gap), rel=1e-9)
    assert (change.slerp_gap > 0) is (spread > 0.04)  # a cosine of 0.9995 is a relative norm of 3 %


def test_slerp_of_opposites_and_of_nothing_is_linear() -> None:
    """Where the arc is not defined, `slerp` takes the chord."""
    assert slerp_gap_square(1.0, 1.0, -1.0) == 0
    assert slerp_gap_square(0.0, 1.0, 0.0) == 0
    assert slerp_gap_square(1.0, 1.0, 0.0) == pytest.approx((1 / math.sqrt(2) - 0.5) ** 2 * 2)


@pytest.mark.parametrize("shape", [(600, 40), (40, 600), (300, 4000), (3000, 400)])
def test_effective_rank_is_exact_where_a_side_is_small(
    shape: tuple[int, int], pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]]
) -> None:
    """The participation ratio is that of the singular values, over one block or several."""
    delta = random(shape[0], 7, seed=1) @ random(7, shape[1], seed=2) + random(*shape, seed=3, scale=0.3)
    change = survey(*pair({"w": torch.zeros(shape)}, {"w": delta}))["w"]
    assert change.effective_rank == pytest.approx(participation(delta), rel=1e-4)
    assert change.rank_error == 0


@pytest.mark.parametrize(("rank", "noise"), [(1, 0.0), (8, 0.0), (8, 0.2), (64, 0.5)])
def test_effective_rank_is_estimated_within_its_error(
    rank: int, noise: float, pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]]
) -> None:
    """Probes find the participation ratio of a large matrix within four of the standard errors that are documented."""
    shape = (1400, 900)
    delta = random(shape[0], rank, seed=1) @ random(rank, shape[1], seed=2) + random(*shape, seed=3, scale=noise)
    change = survey(*pair({"w": torch.zeros(shape)}, {"w": delta}))["w"]
    squares = np.linalg.svd(delta.double().numpy(), compute_uv=False) ** 2
    relative_error = math.sqrt(2 * (squares**4).sum() / module.NUM_PROBES) / (squares**2).sum()
    exact = participation(delta)
    assert change.effective_rank is not None
    assert abs(change.effective_rank - exact) < 4 * relative_error * exact
    # the error estimated from 64 squares of Gaussians is itself right to within a factor of two
    assert change.rank_error is not None
    assert 0.5 < change.rank_error / change.effective_rank / relative_error < 2


def test_only_matrices_have_a_rank(pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]]) -> None:
    """Vectors, stacks of matrices, and a delta of nothing."""
    base = {"vector": random(6), "row": random(1, 6), "stack": random(2, 3, 4), "same": random(3, 4)}
    tuned = {name: tensor + (name != "same") for name, tensor in base.items()}
    assert all(change.effective_rank is None for change in survey(*pair(base, tuned)).values())


def test_rank_of_a_product_is_that_of_the_matrix() -> None:
    """From the factors alone the same ratio as from all singular values."""
    a, b = random(5, 30), random(40, 5, seed=1)
    assert rank_of_product(a.numpy(), b.numpy()) == pytest.approx(participation(b @ a), rel=1e-5)
    assert rank_of_product(a.numpy(), np.zeros((40, 5), np.float32)) is None


def test_an_adapter_is_measured_as_the_model_that_it_makes(
    make_model: Factory, make_adapter: Factory, peft_merged: Callable[[Path, Path], Tensors], tmp_path: Path
) -> None:
    """Norms and ranks of a LoRA are those of the merged checkpoint; tensors that it leaves alone are not read."""
    base = make_model("llama", seed=0)
    adapter = make_adapter(base, seed=1, target_modules=["q_proj", "down_proj"])
    ours = Checkpoint(base)
    theirs = open_weights(adapter, ours)
    untouched = {name for name in ours.infos if "q_proj" not in name and "down_proj" not in name}
    read = _recorded(ours)
    told: list[int] = []
    changes = survey(ours, theirs, advance=told.append)
    assert sum(told) == sum(info.num_elements for info in ours.infos.values())
    assert not read & untouched
    dense = peft_merged(base, adapter)
    for name, change in changes.items():
        assert change.is_unchanged is (name in untouched)
        if name in untouched:
            assert (change.relative_norm, change.cosine, change.effective_rank) == (0, 1, None)
            continue
        delta = dense[name].double() - ours.tensor(name).double()
        assert change.relative_norm == pytest.approx(float(delta.norm() / ours.tensor(name).norm()), rel=1e-5)
        assert change.effective_rank == pytest.approx(participation(delta), rel=1e-4)
        assert change.rank_error == 0


def _recorded(weights: Checkpoint) -> set[str]:
    """The names of the tensors that are read from now on."""
    read: set[str] = set()
    block = weights.block

    def recording(name: str, start: int, stop: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        read.add(name)
        return block(name, start, stop, buffer)

    weights.block = recording  # type: ignore[method-assign]
    return read


def test_dora_has_the_rank_of_its_dense_change(make_model: Factory, make_adapter: Factory) -> None:
    """DoRA's delta is no product of its factors: its rank is found from the elements."""
    ours = Checkpoint(make_model("llama", seed=0))
    theirs = open_weights(make_adapter(ours.directory, seed=1, use_dora=True), ours)
    name = "model.layers.0.mlp.up_proj.weight"
    delta = theirs.tensor(name) - ours.tensor(name)
    assert survey(ours, theirs)[name].effective_rank == pytest.approx(participation(delta), rel=1e-4)


def large(pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]]) -> tuple[Checkpoint, Checkpoint]:
    """Two models whose tensors take several blocks."""
    base = {
        "layers.0.a.weight": random(2100, 1000, scale=0.02).bfloat16(),
        "layers.0.b.weight": random(600, 2000, seed=1, scale=0.02).bfloat16(),
        "layers.0.norm.weight": random(600, seed=2).bfloat16(),
    }
    tuned = {name: (t.float() * 1.001 + random(*t.shape, seed=5, scale=2e-4)).bfloat16() for name, t in base.items()}
    return pair(base, tuned)


def test_threads_do_not_change_the_result(
    pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]],
) -> None:
    """One thread, two or five: the same bits; torch's own threads are as they were."""
    models = large(pair)
    before = torch.get_num_threads()
    found = [survey(*models, workers=workers) for workers in (1, 2, 5)]
    assert found[0] == found[1] == found[2]
    assert torch.get_num_threads() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("survey")]


def test_blocks_do_not_change_the_result(
    pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other blocks give other roundings of the sums, and nothing else."""
    models = large(pair)
    whole = survey(*models)
    monkeypatch.setattr(module, "BLOCK", 30_011)  # no multiple of anything; less than the blocks of a part
    for name, change in survey(*models).items():
        for field, value in dataclasses.asdict(change).items():
            wanted = getattr(whole[name], field)
            if wanted is None:
                assert value is None
            else:
                # the estimated rank's float32 products
                assert value == pytest.approx(wanted, rel=1e-4 if "rank" in field else 1e-6), (name, field)


def test_progress_adds_up_to_all_elements(pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]]) -> None:
    """The progress that is told adds up to the elements, sampled or not."""
    models = large(pair)
    for sample in (1.0, 0.01):
        told: list[int] = []
        survey(*models, sample=sample, advance=told.append)
        assert sum(told) == sum(info.num_elements for info in models[0].infos.values())
        assert len(told) > len(models[0].infos)


def test_a_sample_reads_little_and_finds_much(
    pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]],
) -> None:
    """One element of a hundred gives norms and rounding costs within a few standard errors; no rank."""
    base, tuned = large(pair)
    elements: list[int] = []
    block = base.block

    def counting(name: str, start: int, stop: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        elements.append(stop - start)
        return block(name, start, stop, buffer)

    full = survey(base, tuned)
    base.block = counting  # type: ignore[method-assign]
    found = survey(base, tuned, sample=0.01)
    assert sum(elements) < 0.015 * sum(info.num_elements for info in base.infos.values())
    # some 30 thousand Gaussian squares: 0.8 % of their sum, and half of that of its root
    whole, sampled = combined(full.values()), combined(found.values())
    assert sampled.elements == whole.elements
    assert sampled.relative_norm == pytest.approx(whole.relative_norm, rel=0.03)
    assert sampled.rounding_costs[0.2] == pytest.approx(whole.rounding_costs[0.2], rel=0.03)
    assert sampled.base_square == pytest.approx(whole.base_square, rel=0.05)
    assert all(change.effective_rank is None for change in found.values())
    norm = "layers.0.norm.weight"
    assert found[norm].base_square == full[norm].base_square  # small ones are seen whole


def test_a_small_sample_takes_few_reads(pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]]) -> None:
    """A look before a merge costs by what it reads, not by the blocks of 2^20 elements that the models have."""
    base, tuned = large(pair)
    reads: list[str] = []
    block = base.block

    def counting(name: str, start: int, stop: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        reads.append(name)
        return block(name, start, stop, buffer)

    base.block = counting  # type: ignore[method-assign]
    survey(base, tuned, lams=(), sample=0.01)
    assert sorted(reads) == sorted(base.infos)


def test_a_sample_of_the_same_is_the_same(pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]]) -> None:
    """The share of unchanged elements is 1 without a rounding error."""
    tensors = {"w": random(1001, 1003)}
    assert survey(*pair(tensors, tensors), sample=0.013)["w"].is_unchanged


def test_whole_numbers_are_compared_by_their_bits(
    pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]],
) -> None:
    """A buffer of whole numbers has no norm, and is unchanged or not."""
    base = {"ids": torch.arange(4), "mask": torch.tensor([True, False])}
    change = survey(*pair(base, {"ids": torch.tensor([0, 1, 2, 9]), "mask": base["mask"]}))
    assert change["ids"].unchanged == 0.75
    assert change["mask"].is_unchanged
    assert change["ids"].base_square == 0


def test_other_dtypes_and_shapes(pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]]) -> None:
    """A float32 copy of a bfloat16 model is unchanged; what has no counterpart is not measured, and counts as such."""
    base = random(10, 10).bfloat16()
    models = pair(
        {"same": base, "grown": base, "gone": base, "empty": torch.zeros(0), "kind": torch.zeros(3)},
        {"same": base.float(), "grown": random(12, 10), "new": base, "empty": torch.zeros(0), "kind": torch.arange(3)},
    )
    assert measurable(*models) == ["same", "empty"] or measurable(*models) == ["empty", "same"]
    changes = survey(*models)
    assert changes["same"].is_unchanged
    assert changes["empty"].is_unchanged
    assert covered_share(*models, changes) == pytest.approx(100 / 323)


@pytest.mark.parametrize("sample", [0.0, -0.1, 1.1, math.nan])
def test_a_sample_is_a_share(sample: float, tiny_base: Path) -> None:
    """Anything else is refused, in words."""
    with pytest.raises(MergeError, match="is a share"):
        survey(Checkpoint(tiny_base), Checkpoint(tiny_base), sample=sample)


def test_a_dtype_that_nothing_is_rounded_to(tiny_base: Path) -> None:
    """Whole numbers are no dtype of a merge."""
    with pytest.raises(MergeError, match="rounded to I8"):
        survey(Checkpoint(tiny_base), Checkpoint(tiny_base), dtype="I8")


# --- parent and child


def test_a_model_is_itself(tiny_base: Path) -> None:
    """The same files twice."""
    changes = survey(Checkpoint(tiny_base), Checkpoint(tiny_base))
    assert relation(changes).verdict == "same"
    assert relation(changes, covered=0.9).verdict == "child"


@pytest.mark.parametrize("sample", [1.0, 0.01])
def test_models_trained_separately_are_not_related(tiny_base: Path, tiny_tuned: Path, sample: float) -> None:
    """Two random models of a shape have a cosine near 0 and a relative norm near √2."""
    changes = survey(Checkpoint(tiny_base), Checkpoint(tiny_tuned), sample=sample)
    whole = combined(changes.values())
    assert whole.cosine is not None
    assert abs(whole.cosine) < 0.15
    assert 1.2 < whole.relative_norm < 1.6
    found = relation(changes)
    assert found.verdict == "doubtful"
    assert "not parent and child" in found.reasons[0]


def test_an_adapter_of_its_base_is_a_child(make_model: Factory, make_adapter: Factory) -> None:
    """A LoRA of ordinary size is what fine-tuning leaves."""
    ours = Checkpoint(make_model("llama", seed=0))
    assert relation(survey(ours, open_weights(make_adapter(ours.directory, lora_alpha=2), ours))).verdict == "child"


def test_a_small_change_is_a_childs(tiny_base: Path, tmp_path: Path) -> None:
    """A change of three percent is a child's; one tensor trained again is named, and is no reason to doubt the rest."""
    tensors = load_file(tiny_base / SINGLE)
    tuned = {name: tensor + 0.03 * tensor.std() * random(*tensor.shape) for name, tensor in tensors.items()}
    name = "model.layers.1.self_attn.k_proj.weight"
    tuned[name] = random(*tensors[name].shape, seed=3, scale=0.2)
    (tmp_path / "config.json").write_text("{}")
    save_file(tuned, tmp_path / SINGLE)
    found = relation(survey(Checkpoint(tiny_base), Checkpoint(tmp_path)))
    assert found.verdict == "child"
    assert any(name in reason for reason in found.reasons)


def change(cosine: float, norm: float) -> Change:
    """A tensor of a base of norm 1, moved so far and so turned."""
    # |b|² - 2·cos·|b| + 1 = norm²; the larger root
    length = cosine + math.sqrt(cosine * cosine - 1 + norm * norm)
    return Change(10, 0.0, 1.0, length * length, norm * norm, cosine * length)


@pytest.mark.parametrize(
    ("cosine", "norm", "verdict"),
    [(0.91, 0.49, "child"), (0.89, 0.49, "doubtful"), (0.91, 0.51, "doubtful"), (0.999, 0.05, "child")],
)
def test_the_limits_of_doubt(cosine: float, norm: float, verdict: str) -> None:
    """A cosine below 0.9 or a relative norm above 0.5."""
    made = change(cosine, norm)
    assert made.cosine == pytest.approx(cosine)
    assert made.relative_norm == pytest.approx(norm)
    assert relation({"w": made}).verdict == verdict


def test_too_little_in_common_is_doubtful() -> None:
    """Models of which less than half can be compared, or nothing at all."""
    assert relation({"w": change(0.999, 0.05)}, covered=0.49).verdict == "doubtful"
    assert relation({}).verdict == "doubtful"


def test_what_is_not_finite_is_named_and_not_counted(
    pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]],
) -> None:
    """NaN in one tensor does not hide the others, and is reported."""
    base = {"sound": random(30, 20), "broken": random(5)}
    tuned = {"sound": base["sound"] * 1.01, "broken": torch.tensor([1.0, math.nan, 1.0, math.inf, 1.0])}
    changes = survey(*pair(base, tuned))
    assert not changes["broken"].is_finite
    assert combined(changes.values()).relative_norm == pytest.approx(0.01, rel=1e-5)
    found = relation(changes)
    assert found.verdict == "child"
    assert "'broken'" in found.reasons[-1]


def test_several_tensors_count_as_one_vector(
    pair: Callable[[Tensors, Tensors], tuple[Checkpoint, Checkpoint]],
) -> None:
    """Sums over tensors are those of their concatenation."""
    parts = [random(64), random(32, seed=1)], [random(64, seed=2), random(32, seed=1)]
    apart = survey(*pair(*({"a": a, "b": b} for a, b in parts)))
    together = survey(*pair(*({"w": torch.cat(side)} for side in parts)))["w"]
    whole = combined(apart.values())
    assert whole.relative_norm == pytest.approx(together.relative_norm)
    assert whole.cosine == pytest.approx(together.cosine)
    assert whole.unchanged == together.unchanged == pytest.approx(1 / 3)
    assert whole.rounding_costs == pytest.approx(together.rounding_costs)
