"""Each method by values worked out by hand, and random numbers by what they promise."""

import math

import pytest
import torch
from torch import Tensor

from backmerge.errors import MergeError
from backmerge.merging.consensus import where
from backmerge.merging.method import find_method
from backmerge.merging.methods.arcee_fusion import importance
from backmerge.merging.randomness import BLOCK, TensorRandom
from backmerge.merging.reductions import gram_of_deltas, gram_of_models

RNG = TensorRandom(0, "tested")


def close(first: Tensor, second: Tensor) -> bool:
    """Equal within four roundings of float32: two sines, two products and a sum."""
    return torch.allclose(first, second, rtol=4 * 2.0**-24, atol=1e-7)


def raw(tensor: Tensor) -> bytes:
    """The tensor's bytes, so that −0.0 is not 0.0, and NaN is itself."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_slerp_of_a_right_angle() -> None:
    """Halfway between two unit vectors at a right angle lies the unit vector between them, not their mean."""
    merged = find_method("slerp")(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), RNG, lam=0.5)
    assert close(merged, torch.full((2,), math.sqrt(0.5)))


def test_slerp_goes_at_constant_speed() -> None:
    """At λ the angle from the base is λ of the whole."""
    base, tuned = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(2.0), math.sin(2.0)])
    for lam in (0.25, 0.5, 0.75):
        x, y = find_method("slerp")(base, tuned, RNG, lam=lam).tolist()
        assert math.atan2(y, x) == pytest.approx(2.0 * lam, rel=1e-6)


def test_slerp_weighs_the_vectors_as_they_are() -> None:
    """The sine weights apply to the unnormalised endpoints, as in mergekit."""
    merged = find_method("slerp")(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0]), RNG, lam=0.5)
    assert close(merged, torch.tensor([2 * math.sqrt(0.5), 4 * math.sqrt(0.5)]))


@pytest.mark.parametrize("tuned", [[1.0, 0.01], [-1.0, 0.01], [0.0, 0.0]], ids=["parallel", "opposite", "zero"])
def test_slerp_is_linear_without_an_angle(tuned: list[float]) -> None:
    """Beyond a cosine of 0.9995 either way, and at length zero, SLERP is Linear."""
    base, other = torch.tensor([1.0, 0.0]), torch.tensor(tuned)
    linear = find_method("linear")(base, other, RNG, lam=0.3)
    assert torch.equal(find_method("slerp")(base, other, RNG, lam=0.3), linear)


def test_slerp_is_almost_linear_at_the_size_of_lora_deltas() -> None:
    """With a delta of 1 % of the weights' norm, they differ at λ=0.5 by no more than 0.2 % of the delta."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4096, generator=generator)
    delta = torch.randn(4096, generator=generator) * 0.01
    both = [find_method(name)(base, base + delta, RNG, lam=0.5) for name in ("slerp", "linear")]
    assert float((both[0] - both[1]).norm() / delta.norm()) < 2e-3


def test_dare_keeps_or_drops_each_element() -> None:
    """An element stays the base's, or moves by λ of its delta over 1 - drop."""
    base, tuned = torch.zeros(1000), torch.ones(1000)
    merged = find_method("dare_linear")(base, tuned, RNG, lam=0.5, drop=0.75)
    assert set(merged.tolist()) == {0.0, 2.0}


def test_dare_is_the_base_at_zero_and_the_tuned_model_in_expectation_at_one() -> None:
    """λ=0 is exact; at λ=1 the mean over 2^20 elements of delta 1 is 1 within five sigma of the mask."""
    base, tuned = torch.zeros(BLOCK), torch.ones(BLOCK)
    dare = find_method("dare_linear")
    assert torch.equal(dare(base, tuned, RNG, lam=0.0, drop=0.9), base)
    sigma = math.sqrt(0.9 / 0.1 / BLOCK)  # of the mean of m / (1 - p), m Bernoulli of 1 - p = 0.1
    assert float(dare(base, tuned, RNG, lam=1.0, drop=0.9).double().mean()) == pytest.approx(1.0, abs=5 * sigma)


@pytest.mark.parametrize("drop", [-0.1, 1.0, math.nan])
def test_dare_refuses_invalid_probabilities(drop: float) -> None:
    """Dropping all leaves nothing to rescale."""
    with pytest.raises(MergeError, match="drop"):
        find_method("dare_linear")(torch.zeros(2), torch.ones(2), RNG, lam=0.5, drop=drop)


def test_nearswap_moves_no_weight_further_than_its_limit() -> None:
    """Of what is at most t apart the tuned model's bits; all else is t away; λ scales both."""
    base, tuned = torch.tensor([1.0, 1.0, 1.0, -0.0]), torch.tensor([1.25, 3.0, -3.0, 0.0])
    found = find_method("nearswap")(base, tuned, RNG, t=0.5)
    assert raw(found) == raw(torch.tensor([1.25, 1.5, 0.5, 0.0]))
    assert find_method("nearswap")(base, tuned, RNG, t=0.5, lam=0.5).tolist() == [1.125, 1.25, 0.75, 0.0]
    assert raw(find_method("nearswap")(base, tuned, RNG, t=math.inf)) == raw(tuned)
    assert torch.equal(find_method("nearswap")(base, tuned, RNG, t=0.0), base)
    for wrong in (-0.1, math.nan):
        with pytest.raises(MergeError, match=r"t is .*0 or more"):
            find_method("nearswap")(base, tuned, RNG, t=wrong)


def test_arcee_fusion_keeps_the_most_important_elements() -> None:
    """Median + 1.5·(Q3 - Q1) of |Δ|·KL, written out in float64: above it the tuned model's bits, below the base's."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(37, 19, generator=generator)
    tuned = base + 0.01 * torch.randn(base.shape, generator=generator) ** 3
    p, q = (side.double().softmax(-1) + 1e-8 for side in (tuned, base))
    scores = ((tuned - base).double().abs() * (p * (p / q).log()).sum(-1, keepdim=True)).flatten()
    first, median, third = (float(scores.sort().values[int(q * (len(scores) - 1))]) for q in (0.25, 0.5, 0.75))
    kept = (scores >= median + 1.5 * (third - first)).reshape(base.shape)
    assert 0.05 < float(kept.double().mean()) < 0.3
    assert raw(find_method("arcee_fusion")(base, tuned, RNG)) == raw(torch.where(kept, tuned, base))
    half = find_method("linear")(base, tuned, RNG, lam=0.5)
    assert raw(find_method("arcee_fusion")(base, tuned, RNG, lam=0.5)) == raw(torch.where(kept, half, base))


def test_arcee_fusion_finds_small_divergences() -> None:
    """A row in which one weight moved by 1e-4 has a KL of 1e-11, which float32 would lose; float64 has it right."""
    base = torch.linspace(-1, 1, 4000).reshape(4, 1000)
    tuned = base.clone()
    tuned[2, 500] += 1e-4
    found = find_method("arcee_fusion")(base, tuned, RNG)
    assert raw(found) == raw(tuned)
    important = importance(base, tuned)
    assert int(important.argmax()) == 2500
    # half of p·δ², p the softmax's share
    share = float(base[2].double().softmax(0)[500])
    assert float(important.max()) == pytest.approx(0.5 * share * 1e-4**3, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_choice_by_bits_is_that_of_torch(dtype: torch.dtype) -> None:
    """Signed zeros, NaN and infinities come through from either side, in any shape, and the inputs stay."""
    values = torch.tensor([0.0, -0.0, math.nan, math.inf, -1.5, 3.0], dtype=dtype)
    first = values.repeat(6).reshape(6, 6)
    second = first.T  # every pair of values; not contiguous
    kept = raw(first)
    third = torch.arange(36).reshape(6, 6) % 3 == 0
    for mask in (third, ~third, third | ~third, third & ~third):
        found = where(mask, first, second)
        assert (found.dtype, raw(found)) == (dtype, raw(torch.where(mask, first, second)))
    assert raw(first) == kept


def test_random_numbers_depend_on_seed_tensor_stream_and_position_only() -> None:
    """A chunk that starts at a later block draws what the whole would there; anything else draws other numbers."""
    whole = TensorRandom(1, "a").uniform(torch.empty(2 * BLOCK + 10))
    later = TensorRandom(1, "a", offset=BLOCK).uniform(torch.empty(BLOCK + 10))
    assert torch.equal(whole[BLOCK:], later)
    assert not torch.equal(whole[:BLOCK], whole[BLOCK : 2 * BLOCK])
    assert torch.equal(TensorRandom(1, "a").uniform(torch.empty(5, 2)), whole[:10].reshape(5, 2))
    for other in (TensorRandom(2, "a"), TensorRandom(1, "b")):
        assert not torch.equal(other.uniform(torch.empty(100)), whole[:100])
    assert not torch.equal(TensorRandom(1, "a").uniform(torch.empty(100), stream=1), whole[:100])
    assert torch.equal(TensorRandom(1, "a", offset=BLOCK - 3).uniform(torch.empty(6)), whole[BLOCK - 3 : BLOCK + 3])
    mask = TensorRandom(1, "a").keeps(torch.empty(2 * BLOCK), 0.3)
    assert torch.equal(mask, whole[: 2 * BLOCK] < round(0.3 * 2**32) / 2**32)
    assert bool(TensorRandom(1, "a").keeps(torch.empty(9), 1.0).all())
    assert not bool(TensorRandom(1, "a").keeps(torch.empty(9), 0.0).any())


def test_random_numbers_are_uniform() -> None:
    """Mean and variance of 2^20 draws are those of [0, 1) within five sigma, and no draw is 1."""
    draws = TensorRandom(3, "x").uniform(torch.empty(BLOCK))
    assert float(draws.mean()) == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / BLOCK))
    assert float(draws.var()) == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / BLOCK))
    assert float(draws.min()) >= 0.0
    assert float(draws.max()) < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_do_not_depend_on_threads_and_are_right(dtype: torch.dtype) -> None:
    """Inner products have the same bits with one thread and with two: those of float64 within 1e-7 of the norms."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(BLOCK + 7, generator=generator).to(dtype)
    tuned = [(base + 0.1 * torch.randn(base.shape, generator=generator)).to(dtype) for _ in range(2)]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([gram_of_models(base, tuned), gram_of_deltas(base, tuned)])
    finally:
        torch.set_num_threads(before)
    models = torch.stack([base, *tuned]).double()
    deltas = models[1:] - models[0]
    for first, second, exact in zip(*found, (models @ models.T, deltas @ deltas.T), strict=True):
        assert (first == second).all()
        assert torch.allclose(torch.from_numpy(first), exact, rtol=0, atol=1e-7 * float(exact.max()))
