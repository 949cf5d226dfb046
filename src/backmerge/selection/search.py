"""Which λs of a series to measure next, given what was measured so far: the whole grid, or by bisection.

A search is a pure function that is asked again until it asks for nothing; what it asked for is measured in between.
The base (λ=0) is measured by whoever asks, since every difference is taken from it.

What bisection claims. A λ passes only if it was tested itself: nothing is called safe for lying below a λ that passed.
Which λs are tested depends on the answers, though, so that the selection does not keep 5 % by itself as the fixed
sequence of the whole grid does; it tests about log2 of the grid and only one or two near the boundary, which keeps the
error low (`python -m benchmarks.search` says how low), and the 5 % are kept by the confirmation on other prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from backmerge.selection.candidates import Candidate
from backmerge.selection.limits import is_within
from backmerge.selection.peak import best_place, is_past_peak, places_of_interest
from backmerge.selection.settings import ChoiceSettings, SearchSettings

What = Literal["safety", "utility"]


class Request(NamedTuple):
    """What is to be measured next.

    Attributes:
        lam: λ.
        what: `safety`: the harmful requests, and with them the harmless ones that may be refused; `utility`: the task.
    """

    lam: float
    what: What


def next_points(
    search: SearchSettings, lams: Sequence[float], measured: Mapping[float, Candidate], choice: ChoiceSettings
) -> tuple[Request, ...]:
    """What to measure next of one series, on the whole selection split; empty when nothing more is needed.

    λ=1 always belongs to the grid. What `choose` says of the candidates measured by the end is the decision.

    Args:
        search: `grid` or `bisect`.
        lams: The grid.
        measured: By λ, what was measured so far; `utility` and `asr_difference` are `None` where they were not.
        choice: The rule, of which `bisect` looks for the boundary (see `check_search`).
    """
    grid = sorted({*lams, 1.0} - {0.0})
    assert search.name != "race", "a race asks for batches of prompts: see Race"
    if search.name == "grid" or _contradiction(grid, measured) is not None:
        return tuple(request for lam in grid for request in _missing(lam, measured))
    first = _missing(1.0, measured)
    return tuple(first) or _bisect(grid, measured, choice)


def search_note(search: SearchSettings, lams: Sequence[float], measured: Mapping[float, Candidate]) -> str:
    """What the reader of a choice must know of how it was searched for; empty for the grid."""
    if search.name == "grid":
        return ""
    if search.name == "race":
        return (
            "Searched by a race: λs were tested upwards on batches of prompts, with the looks between them paid for, "
            "so that the selection keeps 5 % in each series; utility was compared downwards until it fell."
        )
    grid = sorted({*lams, 1.0} - {0.0})
    found = _contradiction(grid, measured)
    if found is not None:
        return (
            f"Searched by bisection, which takes the attack success rate to rise with λ. At λ = {found[0]:g} it is "
            f"higher than at λ = {found[1]:g}, beyond both intervals, so the whole grid was measured."
        )
    num_tested = sum(_is_safety_measured(measured.get(lam)) for lam in grid)
    return (
        f"Searched by bisection: {num_tested} of {len(grid)} λs were tested, and nothing measured contradicts that the "
        "attack success rate rises with λ. Only what was tested itself is called safe; which were tested depended on "
        "the answers, so that the selection alone does not keep 5 %; the confirmation on other prompts does."
    )


def _bisect(grid: Sequence[float], measured: Mapping[float, Candidate], choice: ChoiceSettings) -> tuple[Request, ...]:
    safe = [is_within(measured[lam], choice) if lam in measured else None for lam in grid]
    utilities = [measured[lam].utility if lam in measured else None for lam in grid]
    # as in a fixed sequence, nothing beyond the first failure passes; the base, at index −1, does
    failing = next((place for place, passes in enumerate(safe) if passes is False), len(grid))
    passing = max((place for place in range(failing) if safe[place]), default=-1)
    if failing - passing > 1:
        # where exactly safety ends does not matter once utility has fallen before
        is_falling = passing >= 0 and is_past_peak(utilities, passing, measured[1.0].utility or 0.0)
        if is_falling is None:
            return (Request(grid[passing if utilities[passing] is None else passing + 1], "utility"),)
        if not is_falling:
            # the grid may end beyond the tuned model; its end first, then halves
            middle = len(grid) - 1 if failing == len(grid) else (passing + failing) // 2
            return (Request(grid[middle], "safety"),)
    if passing < 0:
        return ()
    wanted = places_of_interest(utilities[: passing + 1])
    if wanted:
        return tuple(Request(grid[place], "utility") for place in wanted)
    best = best_place(utilities[: passing + 1])
    return () if safe[best] else (Request(grid[best], "safety"),)


def _contradiction(grid: Sequence[float], measured: Mapping[float, Candidate]) -> tuple[float, float] | None:
    """A λ whose ASR lies above that of a larger one, beyond the 95 % intervals of both."""
    known = [(lam, measured[lam].asr_difference) for lam in grid if lam in measured]
    for place, (lam, here) in enumerate(known):
        for larger, there in known[place + 1 :]:
            if here is not None and there is not None and here.low > there.high:
                return lam, larger
    return None


def _missing(lam: float, measured: Mapping[float, Candidate]) -> list[Request]:
    candidate = measured.get(lam)
    found = [] if _is_safety_measured(candidate) else [Request(lam, "safety")]
    return found if candidate is not None and candidate.utility is not None else [*found, Request(lam, "utility")]


def _is_safety_measured(candidate: Candidate | None) -> bool:
    return candidate is not None and candidate.asr_difference is not None
