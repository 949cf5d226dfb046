"""The laws of merge methods, over the table of methods: a new row is tested by existing."""

# ruff: noqa: ARG005 - a method takes all its arguments, whether it uses them or not

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backmerge.errors import MergeError
from backmerge.merging.method import Method, call, check_parameters, find_method, merge_method
from backmerge.merging.randomness import TensorRandom
from backmerge.registry import METHODS

# Values that arithmetic is apt to spoil: signed zeros, subnormals, the edges of the range.
AWKWARD = [0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 3.4e38, -3.4e38, 1.0, -1.0, 1.0000001]
VALUES = st.one_of(
    st.sampled_from(AWKWARD), st.floats(-10, 10, width=32), st.floats(allow_nan=False, allow_infinity=False, width=32)
)
LAMS = st.floats(0, 1, exclude_min=True, exclude_max=True)
# a float32 unit roundoff: half the distance from 1 to the next number
UNIT = 2.0**-24


def tensors(values: Any, count: int) -> Any:
    """So many tensors of one shape."""
    return st.lists(st.tuples(*[values] * count), min_size=1, max_size=24).map(
        lambda rows: tuple(torch.tensor(side, dtype=torch.float32) for side in zip(*rows, strict=True))
    )


def pairs(values: Any) -> Any:
    """Two tensors of one shape."""
    return tensors(values, 2)


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as whole numbers, so that −0.0 is not 0.0."""
    return tensor.contiguous().view(torch.int32)


def merged(
    method: Method, base: Tensor, tuned: Tensor, lam: float, seed: int = 0, others: Sequence[Tensor] = ()
) -> Tensor:
    """The method's result with its other parameters at their defaults.

    Args:
        method: The method.
        base: Any shape.
        tuned: The first tuned model.
        lam: Given to methods that have one.
        seed: Of random numbers.
        others: The further tuned models, as many as the method must have, then its extra models; where they are too
            few, the tuned model stands for more tuned ones and the base for extra ones.
    """
    given_ = {"lam": lam} if method.has_lam else {}
    num_more = method.num_tuned[0] - 1
    more = [*others[:num_more], *[tuned] * (num_more - len(others))]
    rest = [*others[num_more:], *[base] * len(method.extra_models)]
    extra = dict(zip(method.extra_models, rest, strict=False))
    return method(base, [tuned, *more] if method.takes_several else tuned, TensorRandom(seed, "t"), extra, **given_)


EXACT = [name for name in sorted(METHODS.entries) if find_method(name).has_exact_endpoints]
IDEMPOTENT = [name for name in sorted(METHODS.entries) if find_method(name).is_idempotent]


@pytest.fixture(params=sorted(METHODS.entries))
def method(request: pytest.FixtureRequest) -> Method:
    """Every method of the table."""
    return find_method(request.param)


@given(pair=pairs(VALUES))
@settings(max_examples=60)
def check_endpoints(method: Method, pair: tuple[Tensor, Tensor]) -> None:
    """λ=0 is the base and λ=1 the tuned model."""
    base, tuned = pair
    assert torch.equal(bits(merged(method, base, tuned, 0.0)), bits(base))
    assert torch.equal(bits(merged(method, base, tuned, 1.0)), bits(tuned))


@given(models=tensors(VALUES, 3), lam=LAMS)
@settings(max_examples=60)
def check_idempotence(method: Method, models: tuple[Tensor, ...], lam: float) -> None:
    """All tuned models being the base, the base is the result, whatever the extra models are."""
    base, *extra = models
    equal = [base.clone() for _ in range(method.num_tuned[0] - 1)]
    assert torch.equal(bits(merged(method, base, base.clone(), lam, others=[*equal, *extra])), bits(base))


@given(models=tensors(VALUES, 5), lam=LAMS)
@settings(max_examples=60)
def check_purity(method: Method, models: tuple[Tensor, ...], lam: float) -> None:
    """The inputs keep their bits, the global random state is not drawn on, and a seed gives one result."""
    base, tuned, *others = models
    before, state = [bits(model).clone() for model in models], torch.random.get_rng_state()
    first, second = (merged(method, base, tuned, lam, seed=7, others=others) for _ in range(2))
    assert all(torch.equal(bits(model), earlier) for model, earlier in zip(models, before, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(bits(first), bits(second))
    assert first.shape == base.shape
    assert first.dtype == torch.float32


@pytest.mark.parametrize("name", EXACT)
def test_endpoints_are_exact(name: str) -> None:
    """Law 1: bit for bit, for methods that declare it."""
    check_endpoints(find_method(name))


@pytest.mark.parametrize("name", IDEMPOTENT)
def test_merging_a_model_with_itself_changes_nothing(name: str) -> None:
    """Law 2: bit for bit, for methods that declare it, whatever their extra models are."""
    check_idempotence(find_method(name))


def test_methods_are_pure(method: Method) -> None:
    """A method changes no input and keeps no state."""
    check_purity(method)


@pytest.mark.parametrize("name", [n for n in sorted(METHODS.entries) if find_method(n).cut != "tensor"])
def test_cutting_changes_nothing(name: str) -> None:
    """Law 3: pieces, merged with the whole's statistics and the draws of their places, are those of the whole."""
    method = find_method(name)
    generator = torch.Generator().manual_seed(0)
    base, tuned, extra = (torch.randn(40, 25, generator=generator) for _ in range(3))
    models = [tuned, extra][: max(method.num_tuned[0], 1)] if method.takes_several else tuned
    data = {"base": base, "tuned": models, **dict.fromkeys(method.extra_models, extra)}
    parameters = {"lam": 0.4} if method.has_lam else {}
    whole = method(base, models, TensorRandom(1, "t"), dict.fromkeys(method.extra_models, extra), **parameters)
    statistics: list[Any] = []
    for reduction in method.reductions:
        statistics.append(call(reduction, {**data, "statistics": statistics}, {}))
    pieces = []
    bounds = [0, 7, 8, 40] if method.cut == "rows" else [0, 13, 500, 999, 1000]
    for start, stop in itertools.pairwise(bounds):

        def cut(tensor: Tensor, start: int = start, stop: int = stop) -> Tensor:
            return tensor[start:stop] if method.cut == "rows" else tensor.reshape(-1)[start:stop]

        given_ = {
            key: [cut(t) for t in value] if isinstance(value, list) else cut(value) for key, value in data.items()
        }
        offset = start * 25 if method.cut == "rows" else start
        given_ |= {"statistics": statistics, "rng": TensorRandom(1, "t", offset)}
        pieces.append(call(method.function, given_, parameters).reshape(-1))
    assert torch.equal(bits(torch.cat(pieces)), bits(whole.reshape(-1)))


@pytest.mark.parametrize("name", [n for n in sorted(METHODS.entries) if find_method(n).widens])
@pytest.mark.parametrize("sign", [1, -1])
def test_widening_inside_changes_nothing(name: str, sign: int) -> None:
    """Of 16-bit floats as stored a method makes the bits that it makes of the same numbers in float32."""
    method = find_method(name)
    base, first, other = (torch.randn(4096, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    # deltas that agree, or that cancel: Model Stock's share is positive, or negative
    tuned = [(base + delta).bfloat16() for delta in (first, sign * first, other)]
    base = base.bfloat16()
    for model in (base, *tuned):
        model[:8] = -0.0  # on which all agree
    rng = TensorRandom(0, "w")
    given = {"base": base, "tuned": tuned, "rng": rng}
    given["statistics"] = [call(reduction, given, {}) for reduction in method.reductions]
    stored = call(method.function, given, {})
    widened = call(method.function, given | {"base": base.float(), "tuned": [model.float() for model in tuned]}, {})
    assert torch.equal(bits(stored), bits(widened))
    assert torch.equal(bits(stored[:8]), bits(base[:8].float()))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (1,), (2, 3, 2)], ids=str)
def test_every_shape_is_taken(method: Method, shape: tuple[int, ...]) -> None:
    """Empty tensors, single numbers, and more than two dimensions."""
    generator = torch.Generator().manual_seed(0)
    base, tuned, *others = (torch.randn(shape, generator=generator) for _ in range(5))
    found = merged(method, base, tuned, 0.4, others=others)
    assert found.shape == shape
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("name", [n for n in sorted(METHODS.entries) if find_method(n).coefficients])
def test_coefficients_are_those_of_the_merge(name: str) -> None:
    """What makes a merge an adapter: it is base + Σ cᵢ·Δᵢ, within ten roundings of float32."""
    method = find_method(name)
    generator = torch.Generator().manual_seed(0)
    base, *tuned = (torch.randn(500, generator=generator) for _ in range(1 + method.num_tuned[0]))
    deltas = torch.stack([model - base for model in tuned]).double()
    parameters = {"lam": 0.4} if method.has_lam else {}
    assert method.coefficients is not None
    shares = method.coefficients((deltas @ deltas.T).numpy(), **parameters)
    expected = base.double() + sum(share * delta for share, delta in zip(shares, deltas, strict=True))
    found = method(base, tuned if method.takes_several else tuned[0], TensorRandom(0, "t"), **parameters)
    assert float((found.double() - expected).abs().max()) <= 10 * UNIT * float(expected.abs().max())


def test_methods_describe_themselves(method: Method) -> None:
    """Every method has a one-line summary, a source, and annotated parameters."""
    assert method.summary
    assert "Source:" in (inspect.getdoc(method.function) or "")
    annotations = inspect.get_annotations(method.function)
    assert all(name in annotations for name in method.parameters)


@pytest.mark.parametrize(
    ("check", "function"),
    [
        (check_endpoints, lambda base, tuned, rng, /, *, lam: (1 - lam) * base + lam * tuned),
        (check_idempotence, lambda base, tuned, rng, /, *, lam: (1 - lam) * base + lam * tuned),
        (check_purity, lambda base, tuned, rng, /, *, lam: base.lerp_(tuned, lam)),
        (check_purity, lambda base, tuned, rng, /, *, lam: base + torch.randn(base.shape)),
        (check_purity, lambda base, tuned, rng, /, *, lam: base.double()),
    ],
    ids=["formula at the ends", "formula with itself", "in place", "global random state", "other dtype"],
)
def test_a_broken_method_is_found(check: Any, function: Any) -> None:
    """The laws above fail on the textbook formula, which turns −0.0 into 0.0, and on methods that are not pure."""
    broken = merge_method(has_exact_endpoints=True, is_idempotent=True)(function)
    with pytest.raises(AssertionError):
        check(broken)


@given(pair=pairs(st.floats(-(2.0**99), 2.0**99, width=32)), lam=LAMS)
@settings(max_examples=200)
def test_linear_is_the_weighted_mean(pair: tuple[Tensor, Tensor], lam: float) -> None:
    """Linear equals its formula in float64.

    Within 6 roundings of float32 at the larger input's size: λ, the difference (at twice the size), its product and
    the sum, and as much again for subnormals.
    """
    base, tuned = pair
    exact = (1 - lam) * base.double() + lam * tuned.double()
    size = torch.maximum(base.abs(), tuned.abs()).double()
    error = (merged(find_method("linear"), base, tuned, lam).double() - exact).abs()
    assert bool((error <= 6 * UNIT * size + 2.0**-148).all())


def test_linear_by_hand() -> None:
    """λ is the share of the tuned side: a quarter of the way from 1 to 3 is 1.5."""
    base, tuned = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([3.0, 2.0, 8.0])
    assert merged(find_method("linear"), base, tuned, 0.25).tolist() == [1.5, -1.0, 2.0]


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"lamb": 0.5}, "did you mean 'lam'"),
        ({"lam": 0.5, "density": 0.1}, "no parameter 'density'"),
        ({}, "needs 'lam'"),
    ],
)
def test_wrong_parameters_are_named(given_: dict[str, float], words: str) -> None:
    """A parameter that a method lacks, or was not given, is an error that names it."""
    with pytest.raises(MergeError, match=words):
        check_parameters(find_method("linear"), given_)
