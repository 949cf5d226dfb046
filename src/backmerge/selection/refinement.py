"""Which λ to measure beyond those of the grid: below the smallest one that fails."""

from __future__ import annotations

from collections.abc import Mapping

FAR = 0.1  # a gap below the smallest failing λ that is worth another λ
ROUNDING = 1e-9


def lam_between(is_within: Mapping[float, bool | None]) -> float | None:
    """The middle of the gap between the smallest λ that fails and the largest one below it that passes.

    If none below it passes, the gap begins at the base, and is halved as long as the budget lasts: a merge near enough
    to the base is as safe as the base. Else a gap of 0.1 or less is left as it is.

    Args:
        is_within: λ of each candidate of a series to whether it keeps the limits of rule `safe`; `None` if unknown.

    Returns:
        `None` if there is nothing to gain: none fails, one passes above the smallest that fails, or the gap is small.

    Example:
        >>> lam_between({0.2: False, 0.4: False})
        0.1
        >>> lam_between({0.2: True, 0.4: None, 0.6: False})
        0.4
        >>> lam_between({0.2: True, 0.3: False}) is None
        True
    """
    failing = [lam for lam, is_kept in is_within.items() if is_kept is False]
    passing = [lam for lam, is_kept in is_within.items() if is_kept]
    if not failing:
        return None
    least, best = min(failing), max(passing, default=0.0)
    if best > least or (passing and least - best <= FAR + ROUNDING):
        return None
    # three significant digits: λ is part of the names of points
    lam = float(f"{(best + least) / 2:.3g}")
    return lam if best < lam < least else None
