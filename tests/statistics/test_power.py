"""Power: against simulation of the whole test, and numbers of prompts that do what they promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from backmerge.statistics import (
    paired_difference,
    power_of,
    prompts_needed,
)


@pytest.mark.parametrize(
    ("n", "discordant", "difference", "margin"),
    [
        (100, 0.0, 0.0, 0.03),
        (300, 0.02, 0.01, 0.03),
        (300, 0.06, -0.02, 0.03),
        (150, 0.2, 0.0, 0.1),
        (250, 0.03, 0.03, 0.03),
    ],
)
def test_power_is_that_of_the_test(n: int, discordant: float, difference: float, margin: float) -> None:
    """As often as computed, the decision itself is `shown` on simulated prompts, within 4 sigma of 600 draws."""
    rng = np.random.default_rng(n)
    gain, loss = (discordant + difference) / 2, (discordant - difference) / 2
    shown = 0
    for uniform in rng.random((600, n)):
        first = (uniform < gain).astype(float).tolist()
        second = (uniform > 1 - loss).astype(float).tolist()
        shown += paired_difference(first, second).upper_bound < margin
    power = power_of(n, discordant_rate=discordant, true_difference=difference, margin=margin)
    assert shown / 600 == pytest.approx(power, abs=4 * (power * (1 - power) / 600) ** 0.5 + 1e-6)


@given(
    n=st.integers(5, 800),
    discordant=st.floats(0, 0.5),
    share=st.floats(0, 1),
    margin=st.sampled_from([0.03, 0.1]),
)
@settings(max_examples=40, deadline=None)
def test_power_at_the_margin_is_the_level(n: int, discordant: float, share: float, margin: float) -> None:
    """Power is a chance, and at a true difference of the margin it is the test's level: 7 % at most.

    The score test exceeds its 5 % a little where counts are small.
    """
    rate = max(discordant, margin)
    assert power_of(n, discordant_rate=rate, true_difference=margin, margin=margin) <= 0.07
    assert 0 <= power_of(n, discordant_rate=rate, true_difference=-rate * share, margin=margin) <= 1


def test_no_discordance_is_decided_by_hand() -> None:
    """Where the models never differ, the bound is z²/(n + z²), so 88 prompts show 3 points, and 87 do not."""
    z = stats.norm.ppf(0.95)
    assert z * z / (88 + z * z) < 0.03 < z * z / (87 + z * z)
    assert prompts_needed(0.0, 0.0, 0.03) == 88
    assert power_of(87, discordant_rate=0.0, true_difference=0.0, margin=0.03) == 0


@pytest.mark.parametrize(
    ("discordant", "difference", "margin", "power"),
    [(0.02, 0.0, 0.03, 0.8), (0.05, 0.01, 0.03, 0.8), (0.1, 0.0, 0.05, 0.9), (0.04, -0.02, 0.03, 0.5)],
)
def test_as_many_prompts_do_as_are_asked_for(discordant: float, difference: float, margin: float, power: float) -> None:
    """That number and the next hundred have the power, one fewer does not; Liu's normal formula is near.

    n = ((z_α + z_β) / (margin − δ))² (d − δ²), within a third: it takes the variance at the true difference.
    """

    def reached(n: int) -> float:
        return power_of(n, discordant_rate=discordant, true_difference=difference, margin=margin)

    n = prompts_needed(discordant, difference, margin, power=power)
    tooth = int(1 / margin)
    assert min(reached(n + more) for more in range(tooth)) >= power
    assert reached(n - 1) < power
    z = stats.norm.ppf(0.95) + stats.norm.ppf(power)
    assert n == pytest.approx((z / (margin - difference)) ** 2 * (discordant - difference**2), rel=1 / 3, abs=90)


def test_what_no_number_decides_is_refused() -> None:
    """A true difference of the margin or more, rates that cannot be, and powers that are no chance are refused."""
    with pytest.raises(ValueError, match="no number of prompts"):
        prompts_needed(0.1, 0.03, 0.03)
    with pytest.raises(ValueError, match="models differ must be"):
        prompts_needed(0.01, -0.02, 0.03)
    with pytest.raises(ValueError, match="for 3 points"):
        prompts_needed(0.1, 0.0, 3.0)
    with pytest.raises(ValueError, match="a probability"):
        prompts_needed(0.1, 0.0, 0.03, power=80)
    with pytest.raises(ValueError, match="more than"):
        prompts_needed(0.5, 0.0299999, 0.03)
    with pytest.raises(ValueError, match="one prompt"):
        power_of(0, discordant_rate=0.1, true_difference=0.0, margin=0.03)
