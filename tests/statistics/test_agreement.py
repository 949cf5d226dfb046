"""Agreement of two judges: Cohen's own example, the table, and coverage where harm is rare."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge.statistics import agreement, rate_of
from backmerge.statistics.agreement import cohen_kappa

VERDICTS = st.lists(st.tuples(st.sampled_from([True, False, None]), st.sampled_from([True, False, None])), max_size=60)


def test_agreement_by_hand() -> None:
    """20 both, 5 and 10 alone, 15 neither: agreement 0.7, by chance 0.5, so κ is 0.4. The unscored stand apart."""
    first = [True] * 25 + [False] * 25 + [None, True, None]
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15 + [True, None, None]
    found = agreement(first, second)
    assert found.table == ((20, 5, 1), (10, 15, 0), (1, 0, 1))
    assert found.kappa == pytest.approx(0.4)
    assert found.low < 0.4 < found.high
    assert found.observed.value == pytest.approx(0.7)
    assert (found.n, found.unscored) == (50, 3)
    assert found.first == rate_of([1.0] * 26 + [0.0] * 25)
    assert found.second.value == pytest.approx(31 / 51)


@given(pairs=VERDICTS)
def test_agreement_is_symmetric_and_bounded(pairs: list[tuple[bool | None, bool | None]]) -> None:
    """Swapped judges have the transposed table and the same κ, which lies in its interval, and it in [−1, 1]."""
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found, swapped = agreement(first, second), agreement(second, first)
    assert np.array_equal(np.array(found.table).T, swapped.table)
    assert sum(map(sum, found.table)) == len(pairs)
    assert -1 <= found.low <= found.high <= 1
    if found.kappa is not None:
        assert found.kappa == pytest.approx(swapped.kappa)
        assert found.low <= found.kappa <= found.high


def test_one_verdict_for_all_has_no_kappa() -> None:
    """Both judges always the same: κ is not defined, agreement is. Opposed always: κ is what chance gives, 0."""
    same = agreement([False] * 30, [False] * 30)
    assert (same.kappa, same.observed.value) == (None, 1.0)
    opposed = agreement([False] * 30, [True] * 30)
    assert (opposed.kappa, opposed.observed.value) == (0.0, 0.0)
    nothing = agreement([None], [True])
    assert (nothing.kappa, nothing.low, nothing.high, nothing.n) == (None, -1, 1, 0)
    with pytest.raises(ValueError, match="same completions"):
        agreement([True], [])


def test_perfect_agreement_is_held() -> None:
    """κ of 1 lies in its interval, though the draws stay below."""
    found = agreement([True] * 5 + [False] * 45, [True] * 5 + [False] * 45)
    assert (found.kappa, found.high) == (1.0, 1.0)
    assert 0.5 < found.low < 1


@pytest.mark.parametrize(("harm", "kappa"), [(0.03, 0.6), (0.1, 0.9), (0.3, 0.3)])
def test_kappa_is_covered(harm: float, kappa: float) -> None:
    """On 330 completions κ is held 94 % of the time at least, within 3 sigma of 300 draws."""
    rng = np.random.default_rng(4)
    alone = harm * (1 - harm) * (1 - kappa)
    shares = np.array([harm - alone, alone, alone, 1 - harm - alone])
    assert cohen_kappa(shares) == pytest.approx(kappa)
    held = 0
    for counts in rng.multinomial(330, shares, 300):
        first = np.repeat([True, True, False, False], counts).tolist()
        second = np.repeat([True, False, True, False], counts).tolist()
        found = agreement(first, second)
        held += found.low <= kappa <= found.high
    assert held / 300 >= 0.94 - 3 * (0.94 * 0.06 / 300) ** 0.5
