"""Anchored: agreement with the dense formula, Linear as a special case, and the same merge in every realisation."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lowrank_cases import config_of
from safetensors.torch import save_file
from torch import Tensor

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.reader import Checkpoint
from backmerge.errors import CheckpointError, MergeError
from backmerge.merging.engine import merged_tensors
from backmerge.merging.inputs import (
    GatheredLayer,
    InputStatistics,
    LayerInputs,
    lam_by_direction,
    write_statistics,
)
from backmerge.merging.live import LiveMerge
from backmerge.merging.lowrank import write_adapter, write_adapters
from backmerge.merging.method import find_method
from backmerge.merging.randomness import TensorRandom
from backmerge.merging.recipe import Variant
from backmerge.merging.to_disk import write_merged
from input_cases import WIDTH, gathered, rows, statistics

Factory = Callable[..., Path]
ANCHORED, LINEAR = find_method("anchored"), find_method("linear")
RIDGE = 0.01
# float32 rounding of the directions and of the result, in products of a few dozen terms below 10
CLOSE: dict[str, float] = {"rtol": 0.0, "atol": 2e-5}


def dense(inputs: Tensor, ridge: float) -> Tensor:
    """(1 - ridge)·C + ridge·I, by its definition."""
    wide = inputs.double()
    second = wide.T @ wide
    width = len(second)
    return (1 - ridge) * second * width / second.trace() + ridge * torch.eye(width, dtype=torch.float64)


def merged(base: Tensor, tuned: Tensor, guard: Any, task: Any = None, **parameters: float) -> Tensor:
    """The method on one layer's weight."""
    return ANCHORED(base, tuned, TensorRandom(0, "t"), {"guard_inputs": guard, "task_inputs": task}, **parameters)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """A layer's weight, base and tuned: 7 outputs of 12 inputs."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(7, WIDTH, generator=generator)
    return base, base + 0.3 * torch.randn(7, WIDTH, generator=generator)


@pytest.mark.parametrize("lam", [0.03, 0.5, 0.97])
@pytest.mark.parametrize("count", [5, 40], ids=["fewer inputs than elements", "more"])
@pytest.mark.parametrize("with_task", [False, True], ids=["guard", "guard and task"])
def test_it_is_the_dense_formula(pair: tuple[Tensor, Tensor], lam: float, count: int, with_task: bool) -> None:
    """Base + λ·Δ·T·(λ·T + (1 - λ)·G)⁻¹, solved in float64 with all of G and T."""
    base, tuned = pair
    guard, task = rows(count, 1), rows(count, 2)
    second = dense(task, RIDGE) if with_task else torch.eye(WIDTH, dtype=torch.float64)
    system = lam * second + (1 - lam) * dense(guard, RIDGE)
    expected = base + lam * torch.linalg.solve(system, second @ (tuned - base).double().T).T
    found = merged(base, tuned, gathered(guard), gathered(task) if with_task else None, lam=lam, ridge=RIDGE)
    torch.testing.assert_close(found.double(), expected, **CLOSE)


def test_it_acts_like_the_base_on_guard_inputs_and_like_the_tuned_model_elsewhere(pair: tuple[Tensor, Tensor]) -> None:
    """What the method is for: at λ = 0.5 a strong guard direction keeps the base, an unseen one goes to the tuned."""
    base, tuned = pair
    found = merged(base, tuned, LayerInputs(np.eye(1, WIDTH, dtype=np.float32), np.array([WIDTH])), lam=0.5)
    on_guard, elsewhere = torch.eye(WIDTH)[0], torch.eye(WIDTH)[5]
    shares = [((found - base) @ x).norm() / ((tuned - base) @ x).norm() for x in (on_guard, elsewhere)]
    assert shares[0] == pytest.approx(0.5 / (0.5 + 0.5 * (0.99 * WIDTH + 0.01)), rel=1e-5)
    assert shares[1] == pytest.approx(0.5 / (0.5 + 0.5 * 0.01), rel=1e-5)


@pytest.mark.parametrize(
    ("guard", "ridge"),
    [
        (LayerInputs(np.eye(WIDTH, dtype=np.float32), np.ones(WIDTH, np.float32)), 0.01),
        (LayerInputs(np.zeros((0, WIDTH), np.float32), np.zeros(0, np.float32), 1.0), 0.01),
        (gathered(rows(40, 1)), 1.0),
        (None, 0.01),
    ],
    ids=["white inputs", "no direction known", "ridge 1", "no statistics"],
)
def test_it_is_linear_where_no_direction_is_like_another(
    pair: tuple[Tensor, Tensor], guard: LayerInputs | None, ridge: float
) -> None:
    """C = I, or a ridge of 1, gives every direction the same λ; so does a layer without statistics."""
    base, tuned = pair
    expected = LINEAR(base, tuned, TensorRandom(0, "t"), lam=0.3)
    torch.testing.assert_close(merged(base, tuned, guard, lam=0.3, ridge=ridge), expected, rtol=0, atol=2e-6)
    # the same statistics on both sides favour neither
    same = merged(base, tuned, gathered(rows(40, 1)), gathered(rows(40, 1)), lam=0.3)
    torch.testing.assert_close(same, expected, rtol=0, atol=2e-6)


def test_with_statistics_the_ends_are_exact_and_a_model_with_itself_is_unchanged(pair: tuple[Tensor, Tensor]) -> None:
    """Laws 1 and 2, bit for bit, with the sign of zeros."""
    base, tuned = pair
    base[0, 0], tuned[0, 0] = -0.0, 0.0
    guard, task = gathered(rows(40, 1)), gathered(rows(5, 2))
    for other in (None, task):
        for lam, end in ((0.0, base), (1.0, tuned)):
            assert torch.equal(merged(base, tuned, guard, other, lam=lam).view(torch.int32), end.view(torch.int32))
        assert torch.equal(merged(base, base.clone(), guard, other, lam=0.3).view(torch.int32), base.view(torch.int32))


@pytest.mark.parametrize("ridge", [0.0, 1e-9, -1.0, 1.5, float("nan")])
def test_a_ridge_that_guards_nothing_is_refused(pair: tuple[Tensor, Tensor], ridge: float) -> None:
    """Below 1e-6 the system of both statistics may have no solution in float64."""
    with pytest.raises(MergeError, match="ridge"):
        merged(*pair, gathered(rows(5, 1)), lam=0.5, ridge=ridge)


def test_the_worst_condition_number_is_solved(pair: tuple[Tensor, Tensor]) -> None:
    """One direction takes all of the trace, on both sides another: at the least ridge the solution still fits."""
    first, second = (LayerInputs(np.eye(WIDTH, dtype=np.float32)[i : i + 1], np.array([WIDTH])) for i in (0, 1))
    found = lam_by_direction(first, second, lam=0.5, ridge=1e-6)
    high, low = (1 - 1e-6) * WIDTH + 1e-6, 1e-6
    assert np.diag(found.shares) == pytest.approx([low / (low + high), high / (low + high)], rel=1e-6)
    assert found.rest == pytest.approx(0.5)


def test_fewer_directions_keep_the_largest_and_the_trace() -> None:
    """Beyond its limit the sketch keeps the leading directions, and spreads the rest of the trace evenly."""
    inputs = rows(200, 1)
    exact, short = gathered(inputs), gathered(inputs, max_directions=4, parts=50)
    assert short.directions.shape == (4, WIDTH)
    assert short.variances.sum() + short.rest * (WIDTH - 4) == pytest.approx(WIDTH, rel=1e-5)
    assert exact.variances.sum() == pytest.approx(WIDTH, rel=1e-5)
    # the two strongest of a spectrum that falls this fast are found to a few percent
    assert short.variances[:2] == pytest.approx(exact.variances[:2], rel=0.05)
    assert np.abs((short.directions[:2] * exact.directions[:2]).sum(axis=1)) == pytest.approx([1, 1], abs=0.05)


def test_inputs_of_zero_say_nothing_of_any_direction() -> None:
    """A layer that sees only zeros is merged linearly, not divided by nothing."""
    found = gathered(torch.zeros(6, WIDTH))
    assert (found.directions.shape, found.rest) == ((0, WIDTH), 1.0)


# ---- in the framework


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("with_task", [False, True], ids=["guard", "guard and task"])
def test_a_merge_of_a_lora_is_a_lora(
    make_base: Callable[[str], Checkpoint],
    make_adapter: Factory,
    peft_merged: Callable[[Path, Path], dict[str, Tensor]],
    tmp_path: Path,
    architecture: str,
    with_task: bool,
) -> None:
    """Law 5: peft, the adapter read back, and the dense merge agree; of the factors only A is changed, at one rank."""
    base = make_base(architecture)
    settings: dict[str, Any] = {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc"]}
    source = make_adapter(base.directory, seed=2, **(settings if architecture == "gpt2" else {}))
    tuned = AdapterOnBase(source, base)
    inputs = {"guard_inputs": statistics(base, tmp_path / "g")}
    if with_task:
        inputs["task_inputs"] = statistics(base, tmp_path / "t", seed=50)
    variant = Variant(base, tuned, find_method("anchored"), inputs=inputs)
    lams = {0.0: None, 0.3: None, 1.0: None}
    write_adapters({tmp_path / str(lam): variant.at(lam) for lam in lams})
    for lam in lams:
        place, wanted = tmp_path / str(lam), dict(merged_tensors(variant.at(lam)))
        read = AdapterOnBase(place, base)
        by_peft = peft_merged(base.directory, place)
        for name, tensor in wanted.items():
            torch.testing.assert_close(read.tensor(name), tensor, **CLOSE)
            if name in by_peft:
                torch.testing.assert_close(by_peft[name], tensor, **CLOSE)
    assert config_of(tmp_path / "0.3")["r"] == config_of(source)["r"]
    name = next(iter(tuned.factors))
    ours, theirs = (AdapterOnBase(place, base) for place in (tmp_path / "0.3", source))
    assert np.array_equal(
        ours.file.float32_array(ours.factors[name].b),
        theirs.file.float32_array(theirs.factors[name].b) * np.float32(theirs.factors[name].scale),
    )
    linear = dict(merged_tensors(replace(variant.at(0.3), method=find_method("linear"), inputs={})))
    assert float((dict(merged_tensors(variant.at(0.3)))[name] - linear[name]).abs().max()) > 0.01


def test_live_weights_and_checkpoint_are_the_same_bits(base: Checkpoint, make_model: Factory, tmp_path: Path) -> None:
    """Law 5 for two full checkpoints: what is set in memory is what is written."""
    from transformers import AutoModelForCausalLM

    tuned = Checkpoint(make_model("llama", seed=5))
    variant = Variant(
        base, tuned, find_method("anchored"), 0.4, inputs={"guard_inputs": statistics(base, tmp_path / "g")}
    )
    write_merged(variant, tmp_path / "out")
    written = Checkpoint(tmp_path / "out")
    for resident in (False, True):
        model = AutoModelForCausalLM.from_pretrained(base.directory)
        LiveMerge(model, base, resident=resident).set(variant)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, written.tensor(name))
    # what has no statistics is merged linearly
    linear = dict(merged_tensors(replace(variant, method=find_method("linear"), inputs={})))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(written.tensor(name), linear[name])


def test_several_lambdas_at_a_lower_rank_equal_single_merges(
    base: Checkpoint, make_adapter: Factory, tmp_path: Path
) -> None:
    """Recompressed together or one by one, the factors have the same bits."""
    tuned = AdapterOnBase(make_adapter(base.directory, seed=2), base)
    variant = Variant(base, tuned, find_method("anchored"), inputs={"guard_inputs": statistics(base, tmp_path / "g")})
    write_adapters({tmp_path / str(lam): variant.at(lam) for lam in (0.0, 0.3, 0.6)}, rank=2)
    write_adapter(variant.at(0.6), tmp_path / "alone", rank=2)
    file = "adapter_model.safetensors"
    assert (tmp_path / "0.6" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


def test_weights_of_one_layer_share_one_solution(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Q, k and v take the same inputs; o is read between them, as checkpoints list it."""
    guard, task = statistics(base, tmp_path / "guard"), statistics(base, tmp_path / "task", seed=50)
    solved = []
    solve = np.linalg.solve
    monkeypatch.setattr(np.linalg, "solve", lambda *given: solved.append(1) or solve(*given))
    layer = "model.layers.0.self_attn.{}_proj.weight"

    def found(part: str, lam: float) -> Any:
        inputs = [side.of(layer.format(part)) for side in (guard, task)]
        return lam_by_direction(*inputs, lam=lam, ridge=RIDGE)

    first, other = found("k", 0.5), found("o", 0.5)
    assert found("q", 0.5) is found("v", 0.5) is first is not other
    assert len(solved) == 2
    assert not np.allclose(found("v", 0.25).shares, first.shares)


def test_recipes_differ_with_their_statistics(base: Checkpoint, make_adapter: Factory, tmp_path: Path) -> None:
    """Answers of one guard are never treated as those of another."""
    tuned = AdapterOnBase(make_adapter(base.directory, seed=2), base)
    variant = Variant(
        base, tuned, find_method("anchored"), 0.4, inputs={"guard_inputs": statistics(base, tmp_path / "g")}
    )
    copied = replace(variant, inputs={"guard_inputs": statistics(base, tmp_path / "same bytes")})
    other = replace(variant, inputs={"guard_inputs": statistics(base, tmp_path / "other", seed=9)})
    assert copied.identity == variant.identity
    assert other.identity != variant.identity


def test_missing_and_misplaced_statistics_are_refused(base: Checkpoint, make_adapter: Factory, tmp_path: Path) -> None:
    """The method without a guard, another method with one, statistics of another shape, and damaged files."""
    tuned = AdapterOnBase(make_adapter(base.directory, seed=2), base)
    known = {"guard_inputs": statistics(base, tmp_path / "g")}
    with pytest.raises(MergeError, match="give a guard"):
        list(merged_tensors(Variant(base, tuned, find_method("anchored"), 0.4)))
    with pytest.raises(MergeError, match="linear takes no input statistics"):
        list(merged_tensors(Variant(base, tuned, lam=0.4, inputs=known)))
    narrow = LayerInputs(np.eye(3, dtype=np.float32), np.ones(3, np.float32))
    layer = {"l": GatheredLayer(("model.layers.0.mlp.up_proj.weight",), narrow)}
    write_statistics(tmp_path / "narrow", known["guard_inputs"].provenance, layer)
    inputs = {"guard_inputs": InputStatistics(tmp_path / "narrow")}
    with pytest.raises(CheckpointError, match="has the shape"):
        write_adapter(Variant(base, tuned, find_method("anchored"), 0.4, inputs=inputs), tmp_path / "out")
    save_file({"x": torch.zeros(1)}, tmp_path / "plain")
    with pytest.raises(CheckpointError, match="contains no input statistics"):
        InputStatistics(tmp_path / "plain")
    whole = (tmp_path / "g").read_bytes()
    (tmp_path / "torn").write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        InputStatistics(tmp_path / "torn")
    (tmp_path / "newer").write_bytes(whole.replace(b'\\"format\\":1', b'\\"format\\":7'))
    with pytest.raises(CheckpointError, match="make it again"):
        InputStatistics(tmp_path / "newer")
    (tmp_path / "zeroed").write_bytes(whole[:-64] + bytes(64))
    with pytest.raises(CheckpointError, match="zeroed was changed after it was written"):
        InputStatistics(tmp_path / "zeroed")
    older = whole.replace(b'"xxh3"', b'"none"')  # as files of earlier versions, without a digest
    (tmp_path / "older").write_bytes(older[:-64] + bytes(64))
    assert InputStatistics(tmp_path / "older").provenance == known["guard_inputs"].provenance
