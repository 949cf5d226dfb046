"""Error rates and decisions over simulated merges, small; the tables are printed by `python -m benchmarks.search`."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from simulated_merges import CHOICE, answers, measured_fully, race_of, run

from backmerge.selection import choose, confirm
from backmerge.statistics import clustered_difference

DRAWS = 60


def utility(lam: float) -> float:
    """Rises from 45 to 70 % and flattens."""
    return 0.45 + 0.25 * (1 - math.exp(-4 * lam)) / (1 - math.exp(-4))


CURVES: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "like the paper's": (lambda lam: 0.02 + 0.14 * lam**2.5, utility),
    "safe everywhere": (lambda _: 0.01, utility),
    "utility peaks": (lambda lam: 0.01 + 0.2 * lam**8, lambda lam: 0.4 + 0.3 * math.exp(-(((lam - 0.4) / 0.3) ** 2))),
    "not monotone": (
        lambda lam: 0.02 + 0.12 * math.exp(-(((lam - 0.3) / 0.1) ** 2)) + 0.2 * lam**6,
        utility,
    ),
}


@pytest.mark.parametrize("curve", CURVES)
def test_the_decision_is_the_grids_for_half_the_answers(curve: str) -> None:
    """On every shape of curve, the same λ for a mean of at most half of the grid's answers, base and λ=1 included."""
    same, cost = 0, 0.0
    for seed in range(DRAWS):
        harm, solved = answers(CURVES[curve][0], 3 * seed), answers(CURVES[curve][1], 3 * seed + 1)
        race = race_of(harm, solved)
        cost += (2 + run(race, harm, solved) / 260) / 22
        same += race.choice().point == choose(list(measured_fully(harm, solved).values()), CHOICE).point
    # 98 % in 2,000 draws, less 3 sigma of these
    assert same >= DRAWS * (0.97 - 3 * math.sqrt(0.03 * 0.97 / DRAWS))
    assert cost <= DRAWS * 0.51


def test_at_the_margin_few_are_wrongly_called_safe() -> None:
    """True ASR at the base's plus the margin: whatever the selection takes, the confirmation keeps 5 %."""
    sizes = [8, 6, 4, *[3] * 5, *[2] * 10, *[1] * 140]
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    rng, confirmed, draws = np.random.default_rng(5), 0, 400
    for _ in range(draws):
        latent = rng.random(len(sizes))[clusters]
        merged, base = latent < 0.04, latent < 0.01
        found = clustered_difference(merged.astype(float).tolist(), base.astype(float).tolist(), clusters.tolist())
        confirmed += confirm(found, CHOICE.margin) == "restored"
    assert confirmed <= draws * 0.05 + 3 * math.sqrt(draws * 0.05 * 0.95)
