"""Model Stock and the spherical means: by hand, by what geometry promises, and against their closed forms."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backmerge.errors import MergeError
from backmerge.merging.method import find_method
from backmerge.merging.methods import model_stock, multislerp, nuslerp
from backmerge.merging.randomness import TensorRandom

RNG = TensorRandom(0, "tested")


def merged(name: str, base: Tensor, *tuned: Tensor, **parameters: Any) -> Tensor:
    """A method's result."""
    return find_method(name)(base, list(tuned), RNG, **parameters)


def close(first: Tensor, second: Tensor) -> bool:
    """Equal within a few roundings of float32."""
    return torch.allclose(first, second, rtol=1e-6, atol=1e-6)


def at(degrees: float, length: float = 1.0) -> Tensor:
    """A vector of the plane."""
    return torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]) * length


@pytest.mark.parametrize(("angle", "ratio"), [(0, 1.0), (60, 2 / 3), (90, 0.0)])
def test_model_stock_goes_as_far_as_the_deltas_agree(angle: float, ratio: float) -> None:
    """Two deltas at 60° go t = 2·½/(1 + ½) of the way to their mean; equal ones all the way, perpendicular ones not."""
    base, first, second = torch.zeros(2), at(0), at(angle)
    assert close(merged("model_stock", base, first, second), ratio * (first + second) / 2)


def test_model_stock_of_three() -> None:
    """Three deltas with pairwise cosines of a half: t = 3·½/(1 + 2·½) = ¾."""
    vectors = [torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 1.0])]
    base = torch.tensor([5.0, -1.0, 2.0])
    assert close(merged("model_stock", base, *(base + v for v in vectors)), base + 0.75 * sum(vectors) / 3)


def test_model_stock_keeps_the_base_where_deltas_cancel() -> None:
    """Opposite deltas have no finite estimate, and neither do deltas of zero."""
    base = torch.tensor([1.0, -0.0])
    assert torch.equal(merged("model_stock", base, base + at(10), base - at(10)), base)
    assert model_stock.coefficients(np.zeros((2, 2))) == [0.0, 0.0]


def test_nuslerp_turns_at_constant_speed() -> None:
    """The delta at a quarter of the second's weight is a quarter of the way round."""
    base = torch.tensor([3.0, 4.0])
    found = merged("nuslerp", base, base + at(0), base + at(80), weight=(3.0, 1.0)) - base
    assert close(found, at(20))
    assert close(merged("nuslerp", base, base + at(0), base + at(80), weight=(3.0, 1.0), lam=0.5) - base, 0.5 * at(20))


def test_nuslerp_is_linear_along_a_line() -> None:
    """Parallel and opposite deltas are interpolated linearly; weights that cancel count as halves."""
    assert nuslerp.coefficients(np.array([[1.0, 2.0], [2.0, 4.0]]), weight=(0.25, 0.75)) == [0.25, 0.75]
    assert nuslerp.coefficients(np.array([[1.0, -1.0], [-1.0, 1.0]]), weight=(1.0, -1.0)) == [0.5, 0.5]


def test_multislerp_has_the_mean_direction_and_length() -> None:
    """Of lengths 1 and 3 at ±30° the mean is of length 2 at 0°; what mergekit adds along the tangent is zero."""
    base = torch.tensor([1.0, 1.0])
    found = merged("multislerp", base, base + at(30), base + at(-30, 3.0)) - base
    assert close(found, at(0, 2.0))


def test_multislerp_of_opposites() -> None:
    """Two opposite deltas are interpolated linearly; three that cancel have no direction; weights must not cancel."""
    assert multislerp.coefficients(np.array([[1.0, -1.0], [-1.0, 1.0]])) == [0.5, 0.5]
    plane = torch.stack([at(0), at(120), at(240)]).double().numpy()
    with pytest.raises(MergeError, match="add up to zero"):
        multislerp.coefficients(plane @ plane.T)
    with pytest.raises(MergeError, match="weights of multislerp"):
        multislerp.coefficients(np.eye(2), weight=(1.0, -1.0))


def test_karcher_of_two_is_slerp() -> None:
    """Base and one tuned model of equal length: the point at λ of the angle."""
    base, tuned = at(0, 2.0), at(100, 2.0)
    for lam in (0.25, 0.5, 0.9):
        assert close(merged("karcher", base, tuned, lam=lam), at(100 * lam, 2.0))
        assert close(merged("karcher", base, tuned, lam=lam), find_method("slerp")(base, tuned, RNG, lam=lam))


def test_karcher_of_three_is_their_centre() -> None:
    """The axes' unit vectors have the diagonal as their mean, at the mean of their lengths."""
    base, first, second = torch.tensor([1.0, 0, 0]), torch.tensor([0, 2.0, 0]), torch.tensor([0, 0, 3.0])
    assert close(merged("karcher", base, first, second, lam=2 / 3), torch.full((3,), 2 / math.sqrt(3)))


def test_karcher_leaves_out_what_has_no_direction() -> None:
    """A tuned tensor of zeros pulls nowhere, and shortens the mean."""
    assert close(merged("karcher", at(20), torch.zeros(2), lam=0.25), 0.75 * at(20))
    assert merged("karcher", torch.zeros(2), torch.zeros(2), lam=0.5).tolist() == [0.0, 0.0]
