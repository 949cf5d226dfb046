"""How many prompts would decide."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge.selection import Bounded
from backmerge.selection.limits import Limit, discordant_rate, prompts_that_decide
from backmerge.statistics import paired_difference, prompts_needed


def pairs(gains: int, losses: int, n: int) -> tuple[list[float], list[float]]:
    """Values of two models with so many discordant prompts."""
    ties = n - gains - losses
    return [1.0] * gains + [0.0] * (losses + ties), [0.0] * gains + [1.0] * losses + [0.0] * ties


@given(gains=st.integers(0, 60), losses=st.integers(0, 60), ties=st.integers(1, 400))
def test_interval_determines_the_discordance(gains: int, losses: int, ties: int) -> None:
    """The share of discordant prompts is recovered from the difference and its interval alone."""
    n = gains + losses + ties
    found = discordant_rate(paired_difference(*pairs(gains, losses, n)))
    assert found == pytest.approx((gains + losses) / n, abs=1e-4)


def test_it_agrees_with_the_exact_number() -> None:
    """Six gains and three losses of 300: what the exact power asks for; none where the estimate is at the margin."""
    limit = Limit("ASR", paired_difference(*pairs(6, 3, 300)), 0.03)
    assert prompts_that_decide(limit) == prompts_needed(0.03, 0.01, 0.03)
    assert prompts_that_decide(limit._replace(margin=0.01)) is None


@pytest.mark.parametrize("losses", [3, 9])
def test_approximation_joins_the_exact_sum_smoothly(losses: int) -> None:
    """Where many are needed it is within 6 % of the exact number; beyond what any set holds, there is none."""
    limit = Limit("ASR", paired_difference(*pairs(losses + 7, losses, 300)), 0.03)
    exact = prompts_needed((2 * losses + 7) / 300, 7 / 300, 0.03)
    assert exact > 2000
    assert prompts_that_decide(limit) == pytest.approx(exact, rel=0.06)
    assert prompts_that_decide(limit._replace(margin=7 / 300 + 1e-4)) is None


def test_near_duplicates_need_more() -> None:
    """In clusters of two that agree, twice the prompts."""
    first, second = pairs(6, 4, 300)
    alone = prompts_that_decide(Limit("ASR", paired_difference(first, second), 0.03))
    clustered = paired_difference(first, second, [place // 2 for place in range(300)])
    assert alone is not None
    assert prompts_that_decide(Limit("ASR", clustered, 0.03)) == pytest.approx(2 * alone, rel=0.05)


def test_of_a_rate() -> None:
    """5 % of 100 against a target of 10 %: by the normal approximation at the target's variance."""
    limit = Limit("ASR", Bounded(0.05, 0.02, 0.11, 100, 100.0), 0.1)
    assert prompts_that_decide(limit) == pytest.approx(2.4865**2 * 0.09 / 0.0025, abs=1)
    assert prompts_that_decide(Limit("ASR", Bounded(0.0, 0.0, 1.0, 0, 0.0), 0.1)) is None
