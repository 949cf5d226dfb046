"""Methods that sum, trim and elect deltas: values by hand, masks by what they promise, thresholds against sorting."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backmerge.errors import MergeError
from backmerge.merging.consensus import count_lower, count_upper, elected, for_each, summed, thresholds
from backmerge.merging.method import find_method
from backmerge.merging.methods.task_vectors import pruned, ranks_of_largest, ranks_of_middle
from backmerge.merging.randomness import TensorRandom
from backmerge.merging.reductions import BLOCK

RNG = TensorRandom(0, "tested")


def merged(name: str, base: list[float], *tuned: list[float], **parameters: Any) -> list[float]:
    """A method's result on short vectors."""
    models = [torch.tensor(model) for model in tuned]
    found: list[float] = find_method(name)(torch.tensor(base), models, RNG, **parameters).tolist()
    return found


def test_task_arithmetic_by_hand() -> None:
    """1 + ½·(2·(3 - 1) + 1·(0 - 1)) is 2.5; normalised by the weights' sum of 3 it is 1.5."""
    assert merged("task_arithmetic", [1.0], [3.0], [0.0], lam=0.5, weight=(2.0, 1.0)) == [2.5]
    assert merged("task_arithmetic", [1.0], [3.0], [0.0], lam=0.5, weight=(2.0, 1.0), normalize=True) == [1.5]
    assert merged("task_arithmetic", [1.0], [3.0], lam=2.0) == [5.0]


def test_weights_that_add_up_to_nothing_divide_nothing() -> None:
    """As in mergekit, a sum of weights near zero normalises by 1."""
    assert merged("task_arithmetic", [0.0], [3.0], [1.0], lam=1.0, weight=(1.0, -1.0), normalize=True) == [2.0]


def test_signs_are_elected_by_weight() -> None:
    """+3 and +1 outvote −2: their mean is 2; where −5 outvotes, it stands alone; zeros have no vote in the mean."""
    deltas = [torch.tensor([3.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 4.0]), torch.tensor([-2.0, -5.0, 0.0])]
    assert elected(deltas, [1.0, 1.0, 1.0], lam=1.0, normalize=True).tolist() == [2.0, -5.0, 4.0]
    assert elected(deltas, [1.0, 1.0, 1.0], lam=0.5, normalize=False).tolist() == [2.0, -2.5, 2.0]
    assert elected(deltas, [1.0, 1.0, 4.0], lam=1.0, normalize=True).tolist() == [-2.0, -5.0, 4.0]
    assert deltas[0].tolist() == [3.0, 3.0, 0.0]


def test_ties_by_hand() -> None:
    """The largest half of each delta: (8, 0, −6, 0) and (0, 7, 5, 0); signs are elected, agreeing ones averaged."""
    first, second = [8.0, 1.0, -6.0, 2.0], [1.0, 7.0, 5.0, 2.0]
    assert merged("ties", [0.0] * 4, first, second, density=(0.5,)) == [8.0, 7.0, -6.0, 0.0]
    assert merged("ties", [1.0] * 4, [9.0, 2.0, -5.0, 3.0], density=(0.5,), lam=0.5) == [5.0, 1.0, -2.0, 1.0]


def test_ties_keeps_at_least_one_and_all_that_tie() -> None:
    """A density that rounds to nothing keeps the largest; equals at the border stay together; 0 keeps none."""
    assert merged("ties", [0.0] * 3, [1.0, -3.0, 2.0], density=(0.01,)) == [0.0, -3.0, 0.0]
    assert merged("ties", [0.0] * 4, [2.0, -2.0, 1.0, 2.0], density=(0.25,)) == [2.0, -2.0, 0.0, 2.0]
    assert merged("ties", [0.0] * 3, [1.0, -3.0, 2.0], density=(0.0,)) == [0.0, 0.0, 0.0]
    assert merged("ties", [0.0] * 3, [1.0, -3.0, 2.0], density=(1.0,)) == [1.0, -3.0, 2.0]


def test_breadcrumbs_drop_both_ends() -> None:
    """Of ten, the largest goes (γ = 0.1), and of the rest the five largest stay (density 0.5)."""
    tuned = [float(i) for i in range(1, 11)]
    expected = [0.0] * 4 + [5.0, 6.0, 7.0, 8.0, 9.0, 0.0]
    assert merged("breadcrumbs", [0.0] * 10, tuned, density=(0.5,), gamma=(0.1,)) == expected
    # where too much would go, the outliers stay
    assert merged("breadcrumbs", [0.0] * 10, tuned, density=(0.9,), gamma=(0.5,)) == [*tuned[:9], 0.0]
    assert merged("breadcrumbs_ties", [0.0] * 10, tuned, density=(0.5,), gamma=(0.1,)) == expected


@pytest.mark.parametrize("share", [-0.1, 20.0, math.nan])
@pytest.mark.parametrize(
    ("name", "parameter"), [("ties", "density"), ("breadcrumbs", "density"), ("breadcrumbs_ties", "gamma")]
)
def test_percentage_is_refused_as_a_share(name: str, parameter: str, share: float) -> None:
    """A density of 20 would keep everything, and one below zero something else again: both are refused."""
    with pytest.raises(MergeError, match=rf"{parameter} is .* must be in \[0, 1\]"):
        merged(name, [0.0] * 4, [1.0, 2.0, 3.0, 4.0], **{parameter: (share,)})


def test_dare_ties_sums_what_is_kept() -> None:
    """Kept elements are doubled at a drop of a half; of two opposite ones the heavier stands alone."""
    size = 4000
    found = torch.tensor(merged("dare_ties", [0.0] * size, [3.0] * size, [-1.0] * size, drop=(0.5,)))
    shares = {value: float((found == value).double().mean()) for value in (6.0, -2.0, 0.0)}
    assert math.fsum(shares.values()) == 1.0
    for value, share in ((6.0, 0.5), (-2.0, 0.25), (0.0, 0.25)):
        # five sigma of a share of 4,000
        assert shares[value] == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / size))


def test_della_keeps_large_elements_more_often() -> None:
    """Keep probabilities rise over the ranks of a row from density - ε to density + ε, and divide what is kept.

    Each estimated over 4,096 rows, within five sigma.
    """
    rows, columns, density, epsilon = 4096, 4, 0.5, 0.3
    delta = torch.tensor([4.0, -1.0, 3.0, 2.0]).expand(rows, columns).contiguous()
    found = pruned(delta.clone(), 0, RNG, density=density, epsilon=epsilon)
    for column, rank in enumerate((3, 0, 2, 1)):
        probability = density - epsilon + 2 * epsilon * rank / 3
        kept = found[:, column] != 0
        assert float(kept.double().mean()) == pytest.approx(
            probability, abs=5 * math.sqrt(probability * (1 - probability) / rows)
        )
        assert found[kept][0, column] == pytest.approx(float(delta[0, column]) / probability, rel=1e-6)


def test_della_of_one_column_and_of_everything() -> None:
    """A row of one has one rank, kept with the mean probability; a density of 1 keeps all."""
    ones = torch.ones(4000, 1)
    assert set(pruned(ones.clone(), 0, RNG, density=0.5, epsilon=0.3).unique().tolist()) == {0.0, 2.0}
    assert torch.equal(pruned(ones.clone(), 0, RNG, density=1.0, epsilon=0.3), ones)


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.5), (0.9, 0.2), (0.1, 0.15), (0.5, -0.1), (math.nan, 0.1)])
def test_della_refuses_invalid_probabilities(density: float, epsilon: float) -> None:
    """Probabilities must lie in (0, 1)."""
    with pytest.raises(MergeError, match="epsilon"):
        merged("della", [0.0], [1.0], density=(density,), epsilon=(epsilon,))


def test_a_value_for_each_or_one_for_all() -> None:
    """One value is every model's; any other number of them is a mistake."""
    assert for_each((0.3,), 3) == (0.3, 0.3, 0.3)
    assert for_each([1.0, 2.0], 2) == (1.0, 2.0)
    with pytest.raises(MergeError, match="2 values for 3 tuned models"):
        for_each((1.0, 2.0), 3)
    # where thresholds are counted first, too
    with pytest.raises(MergeError, match="2 values for 3 tuned models"):
        merged("ties", [0.0], [1.0], [2.0], [3.0], density=(0.2, 0.5))


@pytest.mark.parametrize("name", ["della_linear", "dare_ties"])
def test_random_drops_are_right_on_average(name: str) -> None:
    """The mean over 2^16 elements of delta 1 is the weighted sum, within five sigma of the masks."""
    size = 1 << 16
    base, tuned = torch.zeros(64, size // 64), torch.ones(64, size // 64)
    found = find_method(name)(base, [tuned], RNG, lam=0.5).double()
    # of a kept share p the value is ½/p: its variance is at most (1 - p)/(4p), with p ≥ 0.35
    assert float(found.mean()) == pytest.approx(0.5, abs=5 * math.sqrt(0.65 / 0.35 / 4 / size))


VALUES = st.one_of(st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([0.0, -0.0, 1.0, -1.0]))


@given(values=st.lists(VALUES, min_size=1, max_size=60), share=st.floats(0, 1))
@settings(max_examples=200)
def test_thresholds_are_those_of_sorting(values: list[float], share: float) -> None:
    """The element of a rank, found by counting twice, is that of the sorted magnitudes: ties and extremes too."""
    delta = torch.tensor(values, dtype=torch.float32)
    rank = min(int(share * len(values)), len(values) - 1)

    def ranks(count: int) -> list[int]:
        return [rank, count - 1]

    base = torch.zeros_like(delta)
    statistics = [count_upper(base, [delta])]
    statistics.append(count_lower(ranks)(base, [delta], statistics))
    ordered = delta.abs().sort().values
    assert thresholds(statistics, 0, ranks(len(values))) == [float(ordered[rank]), float(ordered[-1])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trimming_over_several_blocks(dtype: torch.dtype) -> None:
    """Counts of blocks add up: over more than two blocks TIES and Breadcrumbs keep what sorting would."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2 * BLOCK + 5, generator=generator).to(dtype).float()
    tuned = (base + 0.1 * torch.randn(base.shape, generator=generator)).to(dtype).float()
    size = (tuned - base).abs()
    ordered = size.sort().values
    count = len(size)
    found = find_method("ties")(base, [tuned], RNG, density=(0.3,))
    (rank,) = ranks_of_largest(count, density=0.3)
    assert torch.equal(found != base, (size >= ordered[rank]) & (size > 0))
    found = find_method("breadcrumbs")(base, [tuned], RNG, density=(0.3,), gamma=(0.05,))
    low, high = ranks_of_middle(count, density=0.3, gamma=0.05)
    assert torch.equal(found != base, (size >= ordered[low]) & (size <= ordered[high]))


def test_sum_does_not_change_its_inputs() -> None:
    """Deltas may be views of what others still read."""
    deltas = [torch.ones(3), torch.ones(3)]
    assert summed(deltas, [1.0, 2.0], lam=2.0, normalize=False).tolist() == [6.0] * 3
    assert all(torch.equal(delta, torch.ones(3)) for delta in deltas)
