"""Methods that restore with one more model: by hand, and against their formulas written out with whole matrices."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backmerge.checkpoints.reader import SINGLE, Checkpoint
from backmerge.errors import MergeError
from backmerge.merging.engine import merged_tensors
from backmerge.merging.method import find_method
from backmerge.merging.methods.safe_lora import alignment_cosine, cosine, least_aligned, projected
from backmerge.merging.randomness import TensorRandom
from backmerge.merging.recipe import Variant

RNG = TensorRandom(0, "tested")
# sums of at most 40 products of float32, relative to their size
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


def merged(name: str, base: Tensor, tuned: Tensor, extra: dict[str, Tensor], **parameters: Any) -> Tensor:
    """A method's result."""
    return find_method(name)(base, tuned, RNG, extra, **parameters)


def matrices(rows: int, columns: int) -> list[Tensor]:
    """Base, tuned and unaligned."""
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(rows, columns, generator=generator) for _ in range(3)]


def test_resta_by_hand() -> None:
    """1 + ½·(3 - 1) + 2·(1 - 0.5) is 3."""
    base, tuned, unaligned = (torch.tensor([value]) for value in (1.0, 3.0, 0.5))
    assert merged("resta", base, tuned, {"unaligned": unaligned}, lam=0.5, beta=2.0).tolist() == [3.0]
    found = merged("resta", base.expand(999), tuned.expand(999), {"unaligned": unaligned.expand(999)}, drop=0.5)
    assert set(found.tolist()) == {1.5, 5.5}


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)])
def test_the_projection_is_the_papers(shape: tuple[int, int]) -> None:
    """C·Δ, however it is multiplied, is V·Vᵀ·Δ/‖V‖_F."""
    base, tuned, unaligned = matrices(*shape)
    alignment, delta = (base - unaligned).double(), (tuned - base).double()
    expected = (alignment @ alignment.T / alignment.norm()) @ delta
    found = projected(base, tuned - base, unaligned)
    assert found is not None
    torch.testing.assert_close(found.double(), expected, **FLOAT32)


def test_the_cosine_is_that_of_whole_vectors_whatever_the_threads() -> None:
    """Over more than a block: within 1e-12 of float64's, and the same bits with one thread and with two."""
    first, second = matrices(1100, 1000)[:2]
    a, b = first.double().reshape(-1), second.double().reshape(-1)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(cosine(first, second))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-12)
    assert cosine(first, torch.zeros_like(first)) == 0.0


def test_safe_lora_projects_below_the_threshold_only() -> None:
    """At a threshold above the cosine the delta is the projection, below it stays; λ scales either."""
    base, tuned, unaligned = matrices(8, 5)
    extra = {"unaligned": unaligned}
    cosine = alignment_cosine(base, tuned, unaligned)
    moved = projected(base, tuned - base, unaligned)
    assert moved is not None
    kept = merged("safe_lora", base, tuned, extra, threshold=cosine - 0.01)
    torch.testing.assert_close(kept, tuned, **FLOAT32)
    torch.testing.assert_close(
        merged("safe_lora", base, tuned, extra, threshold=cosine, lam=0.5), base + moved / 2, **FLOAT32
    )


def test_what_has_no_projection_keeps_its_delta() -> None:
    """Vectors, unchanged tensors, and a base that alignment left alone."""
    base, tuned, unaligned = matrices(4, 4)
    vector = merged("safe_lora", base[0], tuned[0], {"unaligned": unaligned[0]}, threshold=1.0)
    torch.testing.assert_close(vector, tuned[0], **FLOAT32)
    torch.testing.assert_close(merged("safe_lora", base, tuned, {"unaligned": base}, threshold=1.0), tuned, **FLOAT32)
    assert torch.equal(merged("safe_lora", base, base.clone(), {"unaligned": unaligned}, threshold=1.0), base)


def test_the_least_aligned_tensors_are_projected(tmp_path: Any, make_model: Any) -> None:
    """num_layers looks at all tensors first: that many, those of the least cosine, are not the tuned model's."""
    base, tuned, unaligned = (Checkpoint(make_model("llama", seed=seed)) for seed in (1, 2, 3))
    cosines = {
        name: alignment_cosine(base.tensor(name), tuned.tensor(name), unaligned.tensor(name))
        for name, info in base.infos.items()
        if len(info.shape) == 2
    }
    variant = Variant(base, tuned, find_method("safe_lora"), 1.0, {"num_layers": 3}, extra={"unaligned": unaligned})
    changed = {
        name for name, tensor in merged_tensors(variant) if not torch.allclose(tensor, tuned.tensor(name), **FLOAT32)
    }
    assert changed == set(sorted(cosines, key=lambda name: cosines[name])[:3])


@pytest.mark.parametrize("count", [-1, 2.5, "all"])
def test_a_number_of_layers_is_a_number(count: object) -> None:
    """Anything else is refused."""
    with pytest.raises(MergeError, match="num_layers"):
        least_aligned({"a": 0.1}, {"num_layers": count})


def test_safemerge_merges_what_left_the_subspace() -> None:
    """Below the threshold it is Linear towards the base, or towards the safe model's delta; elsewhere the tuned one."""
    base, tuned, unaligned = matrices(8, 5)
    safe = base + 1
    cosine = alignment_cosine(base, tuned, unaligned)
    extra = {"unaligned": unaligned, "safe": None}
    assert torch.equal(merged("safemerge", base, tuned, extra, lam=0.25, threshold=cosine), tuned)  # type: ignore[arg-type]
    linear = base + 0.25 * (tuned - base)
    below = {"lam": 0.25, "threshold": cosine + 0.01}
    torch.testing.assert_close(merged("safemerge", base, tuned, {"unaligned": unaligned}, **below), linear, **FLOAT32)
    torch.testing.assert_close(
        merged("safemerge", base, tuned, {"unaligned": unaligned, "safe": safe}, **below), linear + 0.75, **FLOAT32
    )


def test_an_extra_model_is_asked_for(make_model: Any, tmp_path: Any) -> None:
    """Through the engine: `unaligned` must be given, `safe` may be; its NaN is found like any other's."""
    base, tuned, unaligned = (Checkpoint(make_model("llama", seed=seed)) for seed in (1, 2, 3))
    with pytest.raises(MergeError, match="needs another model, 'unaligned'"):
        list(merged_tensors(Variant(base, tuned, find_method("safemerge"), 0.5)))
    found = dict(merged_tensors(Variant(base, tuned, find_method("safemerge"), 0.5, extra={"unaligned": unaligned})))
    assert found.keys() == base.infos.keys()
    (tmp_path / "bad").mkdir()
    for file in unaligned.directory.iterdir():
        (tmp_path / "bad" / file.name).write_bytes(file.read_bytes())
    tensors = load_file(unaligned.directory / SINGLE)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "bad" / SINGLE)
    bad = {"unaligned": Checkpoint(tmp_path / "bad")}
    with pytest.raises(MergeError, match=r"of the extra model .* NaN"):
        list(merged_tensors(Variant(base, tuned, find_method("resta"), 0.5, extra=bad)))


def test_an_extra_models_dtype_does_not_matter(make_model: Any) -> None:
    """The result has the base's."""
    base, tuned = (Checkpoint(make_model("llama", seed=seed, dtype="bfloat16")) for seed in (1, 2))
    unaligned = Checkpoint(make_model("llama", seed=3))
    found = dict(merged_tensors(Variant(base, tuned, find_method("resta"), 0.5, extra={"unaligned": unaligned})))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_an_extra_model_of_another_shape_is_named(make_model: Any) -> None:
    """By the name that the method gives it."""
    base, tuned, other = (Checkpoint(make_model(kind, seed=1)) for kind in ("llama", "llama", "gemma"))
    with pytest.raises(MergeError, match=r"the model 'unaligned' .* is a gemma"):
        list(merged_tensors(Variant(base, tuned, find_method("resta"), 0.5, extra={"unaligned": other})))
