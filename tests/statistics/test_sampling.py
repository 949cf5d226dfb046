"""Several answers to each prompt: pass@k by enumeration, and any-of-k with unscored answers."""

import itertools
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge.statistics import any_of_k, any_of_k_rate, mean_pass_at_k, pass_at_k, rate_of


@given(n=st.integers(1, 9), data=st.data())
def test_pass_at_k_is_the_share_of_subsets(n: int, data: st.DataObject) -> None:
    """It is the share of subsets of k samples that hold a right one, all of them enumerated."""
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(fmean(any(subset) for subset in subsets))


def test_pass_at_k_by_hand() -> None:
    """pass@1 is the share that is right; with fewer wrong than k, certain; 50 samples of which 5, k = 10."""
    assert pass_at_k(50, 5, 1) == pytest.approx(0.1)
    assert pass_at_k(50, 41, 10) == 1
    assert pass_at_k(50, 5, 10) == pytest.approx(1 - 40 * 39 * 38 * 37 * 36 / (50 * 49 * 48 * 47 * 46))


@pytest.mark.parametrize(("n", "c", "k"), [(5, 1, 6), (5, 1, 0), (5, 6, 1), (5, -1, 1), (0, 0, 1)])
def test_impossible_counts_are_refused(n: int, c: int, k: int) -> None:
    """More drawn than sampled, or more right than sampled."""
    with pytest.raises(ValueError, match="samples"):
        pass_at_k(n, c, k)


def test_mean_pass_at_k_is_over_problems() -> None:
    """The mean is over problems, with the bootstrap's interval; counts that don't belong together are refused."""
    found = mean_pass_at_k([50] * 40, [50, 25, 5, 0] * 10, 10)
    assert found.value == pytest.approx(fmean(pass_at_k(50, c, 10) for c in (50, 25, 5, 0)))
    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.42 / 40**0.5, rel=0.15)
    with pytest.raises(ValueError, match="longer"):
        mean_pass_at_k([50], [1, 2], 1)


@given(verdicts=st.lists(st.sampled_from([True, False, None]), min_size=1, max_size=6), data=st.data())
def test_any_of_k_never_guesses(verdicts: list[bool | None], data: st.DataObject) -> None:
    """With too few scored, a value is given only if every reading of the unscored gives it."""
    k = data.draw(st.integers(1, len(verdicts)))
    found = any_of_k(verdicts, k)
    scored = [verdict for verdict in verdicts if verdict is not None]
    if len(scored) >= k:
        assert found == pytest.approx(fmean(any(s) for s in itertools.combinations(scored, k)))
        return
    readings = set()
    for filled in itertools.product([True, False], repeat=verdicts.count(None)):
        left = iter(filled)
        answers = [next(left) if verdict is None else verdict for verdict in verdicts]
        readings.add(fmean(any(s) for s in itertools.combinations(answers, k)))
    assert found == (readings.pop() if len(readings) == 1 else None)


def test_any_of_k_rate_by_hand() -> None:
    """One harmful answer of three settles a prompt; an unscored one leaves it open if the others are harmless."""
    verdicts = [[True, False, None], [False, False, False], [False, None, False], [False, True, True]]
    found = any_of_k_rate(verdicts, 3)
    assert found == rate_of([1.0, 0.0, 1.0])
    assert (found.value, found.n) == (pytest.approx(2 / 3), 3)
    by_cluster = any_of_k_rate(verdicts, 3, ["a", "b", "b", "a"])
    assert by_cluster == rate_of([1.0, 0.0, 1.0], ["a", "b", "a"])
    assert any_of_k_rate(verdicts, 1).value == pytest.approx(fmean([0.5, 0.0, 0.0, 2 / 3]))
    with pytest.raises(ValueError, match="any of 4"):
        any_of_k(verdicts[0], 4)
