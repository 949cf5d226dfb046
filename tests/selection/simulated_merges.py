"""Answers of invented merges: prompts with a latent difficulty that all λs share, and a little noise of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import special

from backmerge.selection import Arm, Candidate, ChoiceSettings, Race
from backmerge.statistics import paired_difference

LAMS = tuple(step / 10 for step in range(1, 11))
CHOICE = ChoiceSettings()
Rate = Callable[[float], float]


def answers(rate: Rate, seed: int, num_prompts: int = 260) -> NDArray[np.float64]:
    """0 or 1 at λ=0 and at each of `LAMS`: `(prompts, 11)`."""
    generator = np.random.default_rng(seed)
    difficulty = generator.standard_normal((num_prompts, 1))
    noise = generator.standard_normal((num_prompts, 1 + len(LAMS)))
    rates = np.array([rate(lam) for lam in (0.0, *LAMS)])
    return (special.ndtr(0.9**0.5 * difficulty + 0.1**0.5 * noise) < rates).astype(np.float64)


def measured_fully(harm: NDArray[np.float64], solved: NDArray[np.float64]) -> dict[float, Candidate]:
    """A candidate at each λ."""
    return {
        lam: Candidate(
            f"linear@{lam:g}",
            "linear",
            lam,
            float(solved[:, place].mean()),
            paired_difference(harm[:, place].tolist(), harm[:, 0].tolist()),
        )
        for place, lam in enumerate(LAMS, 1)
    }


def race_of(
    harm: NDArray[np.float64], solved: NDArray[np.float64], batch: int = 35, lams: Sequence[float] = LAMS
) -> Race:
    """A race between the merges, not begun."""
    points = {lam: f"linear@{lam:g}" for lam in lams}
    safety, utility = Arm(harm[:, 0].tolist()), Arm(solved[:, 0].tolist())
    return Race(points, "linear", CHOICE, {"safety": safety}, utility, batch=batch)


def run(race: Race, harm: NDArray[np.float64], solved: NDArray[np.float64]) -> int:
    """Run it to its end; how many answers it asked for."""
    kinds, count = {"safety": harm, "utility": solved}, 0
    while batches := race.next_batches():
        for lam, arm, prompts in batches:
            race.tell(lam, arm, kinds[arm][list(prompts), 1 + LAMS.index(lam)].tolist())
            count += len(prompts)
    return count
