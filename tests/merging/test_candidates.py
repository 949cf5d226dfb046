"""The candidates of experiments/: their laws, their formulas written out, and one that keeps an adapter's rank."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from lowrank_cases import config_of, put
from scipy import stats
from torch import Tensor

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.reader import Checkpoint
from backmerge.errors import MergeError
from backmerge.merging.engine import merged_tensors
from backmerge.merging.lowrank import adapter_obstacle, write_adapter
from backmerge.merging.method import Method, find_method
from backmerge.merging.randomness import TensorRandom
from backmerge.merging.recipe import Variant

FILE = Path(__file__).parents[2] / "experiments" / "candidates.py"
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="experiments/ is not next to the tests")
RNG = TensorRandom(0, "tested")
NAMES = ("spectral_flatten", "base_projection", "alignment_projection", "dg_hard")
# float32 rounding of base, delta and result, of elements below 5
CLOSE: dict[str, float] = {"rtol": 0.0, "atol": 4e-6}


@pytest.fixture(scope="module")
def candidates() -> ModuleType:
    """The file, imported as a plugin is."""
    spec = importlib.util.spec_from_file_location("candidates", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def matrices(rows: int, columns: int) -> list[Tensor]:
    """Base, tuned and unaligned."""
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(rows, columns, generator=generator) for _ in range(3)]


def low_rank(rows: int, columns: int, rank: int, scale: float = 0.1) -> Tensor:
    """A delta of that rank."""
    generator = torch.Generator().manual_seed(rank)
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return scale * left @ right


def change(method: Method, base: Tensor, tuned: Tensor, *, unaligned: Tensor | None = None, **given: Any) -> Tensor:
    """What a method makes of the delta."""
    return method(base, tuned, RNG, {} if unaligned is None else {"unaligned": unaligned}, **given) - base


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (7,), (), (3, 0), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_laws(candidates: ModuleType, name: str, shape: tuple[int, ...]) -> None:
    """λ=0 and equal models are the base bit for bit, inputs stay, λ scales the change, and any shape is taken."""
    method: Method = getattr(candidates, name)
    generator = torch.Generator().manual_seed(0)
    base, tuned, unaligned = (torch.randn(shape, generator=generator) for _ in range(3))
    base.reshape(-1)[:1] = -0.0
    extra = {"unaligned": unaligned} if method.extra_models else {}
    before = [model.clone() for model in (base, tuned, unaligned)]
    for found in (method(base, tuned, RNG, extra, lam=0.0), method(base, base.clone(), RNG, extra)):
        assert torch.equal(found.contiguous().view(torch.int32), base.view(torch.int32))
    whole, half = (method(base, tuned, RNG, extra, lam=lam) for lam in (1.0, 0.5))
    assert whole.shape == base.shape
    assert torch.allclose(half - base, (whole - base) / 2, **CLOSE)
    assert all(map(torch.equal, (base, tuned, unaligned), before))
    assert "Source:" in (method.function.__doc__ or "")


def test_flattening_moves_singular_values_to_their_mean(candidates: ModuleType) -> None:
    """σ becomes (1 - t)·σ + t·mean σ over the delta's own rank, with the same directions; t=0 is Linear."""
    base = matrices(40, 30)[0]
    delta = low_rank(40, 30, 4)
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    for t in (0.0, 0.5, 1.0):
        expected = (left[:, :4] * ((1 - t) * values[:4] + t * values[:4].mean())) @ right[:4]
        found = change(candidates.spectral_flatten, base, base + delta, t=t)
        assert torch.allclose(found.double(), expected, **CLOSE)
    with pytest.raises(MergeError, match="t is 1"):
        change(candidates.spectral_flatten, base, base + delta, t=1.5)


def test_a_projection_takes_the_base_spaces_away(candidates: ModuleType) -> None:
    """A change within the base's top directions goes, one outside stays; with all directions nothing is left."""
    base, tuned, _ = matrices(20, 30)
    left, _, right = torch.linalg.svd(base.double(), full_matrices=False)
    method = candidates.base_projection
    inside = 0.1 * torch.outer(left[:, 0], right[1]).float()
    outside = 0.1 * torch.outer(left[:, 0], right[19]).float()
    assert torch.allclose(change(method, base, base + inside, share=0.1), torch.zeros_like(base), **CLOSE)
    assert torch.allclose(change(method, base, base + inside, share=0.1, mu=0.25), 0.75 * inside, **CLOSE)
    assert torch.allclose(change(method, base, base + outside, share=0.1), outside, **CLOSE)
    expected = (tuned - base).double() @ (torch.eye(30) - right.T @ right)
    assert torch.allclose(change(method, base, tuned, share=1.0).double(), expected, **CLOSE)


@pytest.mark.parametrize(("along", "left"), [(-0.5, 0.0), (0.5, 0.5)], ids=["against", "with"])
def test_only_parts_that_undo_the_alignment_are_removed(candidates: ModuleType, along: float, left: float) -> None:
    """A delta of ±½ of the alignment and something across it keeps what is across, and what goes with the alignment."""
    base, across, unaligned = matrices(8, 5)
    alignment = base - unaligned
    across -= alignment * float((across * alignment).sum() / alignment.square().sum())
    method = candidates.alignment_projection
    found = change(method, base, base + across + along * alignment, unaligned=unaligned)
    assert torch.allclose(found, across + left * alignment, **CLOSE)
    assert torch.allclose(change(method, base, base + across, unaligned=base), across, **CLOSE)


@pytest.mark.parametrize("beta", [0.1, 0.25, 0.5, 0.75, 1.0])
def test_the_threshold_is_gavish_and_donohos(candidates: ModuleType, beta: float) -> None:
    """Within the 0.02 that they state for their cubic approximation; and the median halves a sample's spectrum."""
    factor = candidates.noise_factor(beta)
    assert factor == pytest.approx(0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43, abs=0.02)
    long = 800
    noise = np.random.default_rng(0).standard_normal((round(beta * long), long)) / math.sqrt(long)
    omega = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    # medians of random matrices vary by less than 1/long
    assert np.median(np.linalg.svd(noise, compute_uv=False)) == pytest.approx(omega / factor, rel=0.01)


def test_dg_hard_keeps_the_signal_and_drops_the_noise(candidates: ModuleType) -> None:
    """Of a rank of 3 in noise the 3 directions stay, nothing else; of noise alone, nothing; a LoRA's delta, all."""
    base = matrices(80, 60)[0]
    noise = 0.01 * torch.from_numpy(stats.norm.rvs(size=(80, 60), random_state=1)).float()
    signal = low_rank(80, 60, 3)
    assert int(torch.linalg.matrix_rank(change(candidates.dg_hard, base, base + signal + noise), rtol=1e-4)) == 3
    assert torch.allclose(change(candidates.dg_hard, base, base + noise), torch.zeros_like(base), **CLOSE)
    assert torch.allclose(change(candidates.dg_hard, base, base + signal), signal, **CLOSE)


def test_a_flattened_adapter_keeps_its_rank(
    candidates: ModuleType,
    base: Checkpoint,
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The adapter, with A multiplied from the right, and the checkpoint, from whole matrices, are the same merge."""
    tuned = AdapterOnBase(make_adapter(base.directory, seed=3, r=4), base)
    put(monkeypatch, candidates.spectral_flatten)
    variant = Variant(base, tuned, find_method("tested"), 0.6, {"t": 0.8})
    assert adapter_obstacle(variant) is None
    write_adapter(variant, tmp_path / "out")
    assert config_of(tmp_path / "out")["r"] == 4
    written = AdapterOnBase(tmp_path / "out", base)
    linear = dict(merged_tensors(Variant(base, tuned, lam=0.6)))
    changed = 0
    for name, tensor in merged_tensors(variant):
        assert torch.allclose(tensor, written.tensor(name), **CLOSE), name
        changed += not torch.allclose(tensor, linear[name], rtol=0, atol=1e-3)
    assert changed
