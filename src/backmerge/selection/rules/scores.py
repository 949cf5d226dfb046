"""The rules that compare scores and show nothing of safety."""

from __future__ import annotations

from collections.abc import Sequence

from backmerge.selection.candidates import Candidate, Choice, Step, by_series
from backmerge.selection.settings import ChoiceSettings

NOT_SHOWN = "That shows nothing of its safety; the confirmation does."


def paper(candidates: Sequence[Candidate], choice: ChoiceSettings) -> Choice:
    """The best validation score on the grid, whatever the ASR; neither λ=0 nor λ=1 is on it.

    Where no validation score was measured, the utility on the selection prompts takes its place, and the reason says
    so. Of two with the same score, the one nearer to the base is taken.

    Args:
        candidates: Of all series.
        choice: Not read.

    Source: Farn et al. (2025), Findings of EMNLP, arXiv 2412.19512; which metric validates is left open there.
    """
    del choice
    merged = [candidate for candidate in candidates if candidate.lam not in {0.0, 1.0}]
    is_validated = bool(merged) and all(candidate.validation is not None for candidate in merged)
    scores = [(c.validation if is_validated else c.utility, -c.reach, c.point) for c in merged]
    known = [(score, lam, point) for score, lam, point in scores if score is not None]
    if not known:
        return Choice(None, "No merge other than λ=0 and λ=1 has a score to choose by.", _steps(candidates))
    score, _, point = max(known, key=lambda row: row[:2])
    if is_validated:
        what = f"the best validation score ({score:.4g})"
    else:
        what = f"the most utility on the selection prompts ({score * 100:.1f} %), for want of a validation score,"
    return Choice(point, f"{point} has {what} of {len(known)} merges. {NOT_SHOWN}", _steps(candidates))


def weighted(candidates: Sequence[Candidate], choice: ChoiceSettings) -> Choice:
    """The largest utility − w·(ASR − the base's ASR); of two alike, the one nearer to the base.

    Args:
        candidates: Of all series; those without utility or ASR are passed over.
        choice: With the weight w.
    """
    places = _places(candidates)
    if not places:
        return Choice(None, "No candidate has both a utility and an attack success rate.", _steps(candidates))
    utility, rise, best = max(places, key=lambda place: (place[0] - choice.weight * place[1], -place[2].reach))
    reason = (
        f"{best.point} has the largest utility less {choice.weight:g} times the rise of the attack success rate: "
        f"{utility * 100:.1f} − {choice.weight:g} × {rise * 100:.1f} = {(utility - choice.weight * rise) * 100:.1f} "
        f"points. {NOT_SHOWN}"
    )
    return Choice(best.point, reason, _steps(candidates))


def pareto(candidates: Sequence[Candidate], choice: ChoiceSettings) -> Choice:
    """The knee of the front of utility and ASR.

    On the front stands what no other candidate excels in one without falling short in the other. With both scaled to
    [0, 1] between the front's ends, the knee is where utility less ASR is largest: the point furthest above the chord.
    A front of two points, or one that lies below its chord, has none, and its end with the lowest ASR is taken.

    Args:
        candidates: Of all series; those without utility or ASR are passed over.
        choice: Not read.
    """
    del choice
    front = front_of(candidates)
    if not front:
        return Choice(None, "No candidate has both a utility and an attack success rate.", _steps(candidates))
    (low_utility, low_rise, _), (high_utility, high_rise, _) = front[0], front[-1]
    across, up = high_rise - low_rise or 1.0, high_utility - low_utility or 1.0

    def height(place: tuple[float, float, Candidate]) -> tuple[float, float]:
        # rounding apart, both ends are at 0, and the first is taken of equals
        return round((place[0] - low_utility) / up - (place[1] - low_rise) / across, 9), -place[1]

    utility, rise, knee = max(front, key=height)
    reason = (
        f"{knee.point} is the knee of the front ({', '.join(place[2].point for place in front)}): beyond it, utility "
        f"({utility * 100:.1f} %) costs more attack success rate ({rise * 100:+.1f} points) than before. {NOT_SHOWN}"
    )
    return Choice(knee.point, reason, _steps(candidates))


def front_of(candidates: Sequence[Candidate]) -> list[tuple[float, float, Candidate]]:
    """Utility, rise of ASR, candidate: of those that none excels in one and equals in the other, by rising ASR."""
    front: list[tuple[float, float, Candidate]] = []
    for place in sorted(_places(candidates), key=lambda place: (place[1], -place[0], place[2].reach)):
        if not front or place[0] > front[-1][0]:
            front.append(place)
    return front


def _places(candidates: Sequence[Candidate]) -> list[tuple[float, float, Candidate]]:
    return [
        (c.utility, c.asr_difference.difference, c) for c in candidates if c.utility is not None and c.asr_difference
    ]


def _steps(candidates: Sequence[Candidate]) -> tuple[Step, ...]:
    """Every candidate, untested."""
    return tuple(
        Step(
            c.point,
            c.lam,
            c.utility,
            c.asr_difference.difference if c.asr_difference else None,
            c.asr_difference.upper_bound if c.asr_difference else None,
            None,
            c.over_refusal_difference.upper_bound if c.over_refusal_difference else None,
        )
        for series in by_series(candidates)
        for c in series
    )
