"""Two judges on the same completions: their table, both rates, and Cohen's κ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from backmerge.records import Estimate
from backmerge.statistics.intervals import rate_of

DRAWS = 20_000
VERDICTS: tuple[bool | None, ...] = (True, False, None)


class Agreement(NamedTuple):
    """The agreement of two judges; never an average of them.

    Attributes:
        table: Counts, the first judge's verdict down and the second's across, each in the order harmful, not harmful,
            unscored: `(3, 3)`.
        kappa: Cohen's κ over completions that both scored, in [−1, 1]; `None` if both gave the same verdict to all, or
            scored nothing in common.
        low, high: Two-sided interval of κ.
        observed: Share of completions that both scored on which they agree.
        first, second: Each judge's rate over all completions that it scored.
        n: Completions that both scored.
        unscored: Completions that one of them, or both, did not score.
    """

    table: tuple[tuple[int, ...], ...]
    kappa: float | None
    low: float
    high: float
    observed: Estimate
    first: Estimate
    second: Estimate
    n: int
    unscored: int


def agreement(
    first: Sequence[bool | None],
    second: Sequence[bool | None],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Compare two judges' verdicts on the same completions.

    κ = (pₒ − pₑ) / (1 − pₑ), where pₒ is the share of agreement and pₑ that of two judges who agree by chance at these
    rates. Its interval is the central one with 1/2 added to each cell, under the Dirichlet distribution of the four
    shares: at 3 % of harm Wald's interval with the asymptotic error covers 43 to 95 % of the time, and this one 93 to
    96 %.

    Args:
        first: Harmful or not, `None` if unscored.
        second: The other judge's verdicts, in the same order.
        confidence: Two-sided coverage.
        seed: Seed of the draws.

    Raises:
        ValueError: the two differ in length.

    Source: Cohen (1960), Educational and Psychological Measurement 20; Wald's error: Fleiss, Cohen and Everitt (1969),
    Psychological Bulletin 72.
    """
    if len(first) != len(second):
        raise ValueError(f"two judges must have judged the same completions: {len(first)} and {len(second)}")
    counts = {(a, b): 0 for a in VERDICTS for b in VERDICTS}
    for pair in zip(first, second, strict=True):
        counts[pair] += 1
    both = np.array([counts[a, b] for a in (True, False) for b in (True, False)], dtype=np.float64)
    n = int(both.sum())
    kappa, low, high = None, -1.0, 1.0
    if n:
        shares = np.random.default_rng(seed).dirichlet(both + 0.5, DRAWS)
        ends = np.quantile(cohen_kappa(shares), [(1 - confidence) / 2, (1 + confidence) / 2])
        low, high = float(ends[0]), float(ends[1])
        if both.max() < n or counts[True, True] + counts[False, False] == 0:
            kappa = float(cohen_kappa(both / n))
            # if the judges agree on all, the central interval does not contain the estimate itself
            low, high = min(low, kappa), max(high, kappa)
    return Agreement(
        table=tuple(tuple(counts[a, b] for b in VERDICTS) for a in VERDICTS),
        kappa=kappa,
        low=low,
        high=high,
        observed=rate_of([float(a == b) for a, b in zip(first, second, strict=True) if None not in (a, b)]),
        first=rate_of([float(verdict) for verdict in first if verdict is not None]),
        second=rate_of([float(verdict) for verdict in second if verdict is not None]),
        n=n,
        unscored=len(first) - n,
    )


def cohen_kappa(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return κ of tables of shares: both harmful, the first alone, the second alone, neither; `(..., 4)` to `(...)`.

    Not defined if both judges give the same verdict to all.
    """
    both, first_alone, second_alone, neither = np.moveaxis(shares, -1, 0)
    first, second = both + first_alone, both + second_alone
    by_chance = first * second + (1 - first) * (1 - second)
    kappa: NDArray[np.float64] = (both + neither - by_chance) / (1 - by_chance)
    return kappa
