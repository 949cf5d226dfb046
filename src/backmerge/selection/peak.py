"""Where utility peaks along a grid, with few of its places measured; it is taken to have one peak.

Utilities stand in the order of λ, `None` where they were not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

FLAT = 0.01  # a step of utility that does not tell which way it goes
NUM_NEIGHBOURS = 2  # lower ones that settle a side nevertheless


def places_of_interest(utilities: Sequence[float | None]) -> list[int]:
    """What to measure next, until one place stands out from its neighbours on either side; then nothing.

    The last two first: where utility rises to the end, they settle it. Else halves of the gaps beside the best.

    Example:
        >>> places_of_interest([None, None, 0.5, 0.6])
        []
        >>> places_of_interest([None, None, None, 0.7, 0.6])
        [1]
    """
    last = len(utilities) - 1
    ends = [place for place in (last, last - 1) if place >= 0 and utilities[place] is None]
    if ends or last < 0:
        return ends
    best = best_place(utilities)
    sides = (_gap_beside(utilities, best, step) for step in (-1, 1))
    widest = max((gap for gap in sides if gap is not None), default=None)
    return [] if widest is None else [widest[1]]


def best_place(utilities: Sequence[float | None]) -> int:
    """Of those measured; of two with the same utility, the one nearer to the base."""
    return -max((utility, -place) for place, utility in enumerate(utilities) if utility is not None)[1]


def is_past_peak(utilities: Sequence[float | None], place: int, at_end: float) -> bool | None:
    """Whether utility falls from this place to the next, and is lower at λ=1; `None` until enough is measured."""
    here = utilities[place]
    if here is None:
        return None
    if here <= at_end + FLAT:
        return False
    beyond = utilities[place + 1]
    return None if beyond is None else beyond <= here - FLAT


def _gap_beside(utilities: Sequence[float | None], best: int, step: Literal[-1, 1]) -> tuple[int, int] | None:
    """Width of the nearest gap on one side of the best and the place in its middle, unless that side is settled."""
    edge = -1 if step < 0 else len(utilities)
    height, nearest = utilities[best] or 0.0, best
    for place in range(best + step, edge, step):
        utility = utilities[place]
        if utility is None:
            continue
        if abs(place - nearest) > 1:
            return abs(place - nearest), (place + nearest) // 2
        if utility <= height - FLAT or abs(place - best) >= NUM_NEIGHBOURS:
            return None
        nearest = place
    return (abs(edge - nearest), (edge + nearest) // 2) if abs(edge - nearest) > 1 else None
