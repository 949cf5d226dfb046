"""The search for a λ of each part, carried out: recipes are measured on the selection prompts, and one goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from backmerge.pipeline.candidates import candidate_of
from backmerge.pipeline.results import Outcomes
from backmerge.planning.points import Point, series_of
from backmerge.planning.prepare import Plan
from backmerge.planning.settings import Experiment
from backmerge.runs import RunDirectory, key_of
from backmerge.selection import Candidate, choose
from backmerge.selection.layers import LayerSearch

JOURNAL = "layers.journal"


class Layered(NamedTuple):
    """What the search by layer found.

    Attributes:
        points: Every recipe that was measured.
        candidate: The one that goes on to the choice.
        note: What a reader of the choice must know.
    """

    points: list[Point]
    candidate: Candidate
    note: str


def search_layers(
    run: RunDirectory,
    prepared: Plan,
    outcomes: Outcomes,
    singles: Sequence[Candidate],
    key: str,
    measure: Callable[[Sequence[Point], str], None],
) -> Layered:
    """Measure recipes with a λ of each part, from the best single λ on.

    Of many recipes one is picked, which tests of each would not pay for: it is one candidate, and whatever the choice
    says of it, only the confirmation shows anything.

    Args:
        run: Whose journal keeps the study.
        prepared: The experiment.
        outcomes: To which what is measured is added.
        singles: The candidates with a single λ, of all series.
        key: A hash of all that was measured on, and of what.
        measure: Measures points on the selection split.
    """
    experiment: Experiment = prepared.experiment
    settings, sweep = experiment.layers, experiment.merge[0]
    assert settings is not None
    first = next(point for point in prepared.points if point.sweep == sweep)
    assert first.method is not None
    single = series_of(sweep, first.method)
    of_series = [c for c in singles if c.series == single and c.lam is not None]
    start = _start(of_series, experiment)
    series = f"{single} by {settings.by if settings.by != 'both' else 'layer and module'}"
    search = LayerSearch(settings, start, run.path / JOURNAL, key_of(key, settings.model_dump(), start))
    points: list[Point] = []
    # recipes of an earlier session are measured again, from the units: their outcomes belong to the results
    for known, _ in search.told():
        points.append(_point(series, known.number, known.setting, first))
    if points:
        measure(points, f"Search of {series}, what was measured before")
    while (recipe := search.ask()) is not None:
        point = _point(series, recipe.number, recipe.setting, first)
        measure([point], f"Search of {series}, {recipe.number + 1} of {settings.num_trials}")
        found = candidate_of(prepared.benchmarks, outcomes, point, series, prepared.experiment.choice.keep_against)
        assert found.utility is not None
        assert found.asr_difference is not None
        search.tell(found.utility, found.asr_difference.difference)
        points.append(point)
    candidates = [
        candidate_of(prepared.benchmarks, outcomes, point, point.name, prepared.experiment.choice.keep_against)
        for point in points
    ]
    best = choose(candidates, experiment.choice).point
    if best is None:
        best = min(candidates, key=lambda c: c.asr_difference.upper_bound if c.asr_difference else 1.0).point
    picked = next(c for c in candidates if c.point == best)
    note = (
        f"{len(points)} recipes with a λ of each {'part' if settings.by == 'both' else settings.by} were measured, "
        f"from λ = {start:g} everywhere on; {best} was picked of them on the selection prompts, which is no test of "
        "it: the confirmation is."
    )
    return Layered(points, picked._replace(series=series), note)


def _start(singles: Sequence[Candidate], experiment: Experiment) -> float:
    """The best single λ by the rule; where none passes, the one whose ASR is shown to be lowest."""
    chosen = choose(singles, experiment.choice).point if singles else None
    if chosen is not None:
        return next(c.reach for c in singles if c.point == chosen)
    measured = [c for c in singles if c.asr_difference is not None]
    if not measured:
        return 0.5
    return min(measured, key=lambda c: (c.asr_difference.upper_bound if c.asr_difference else 1.0, c.reach)).reach


def _point(series: str, number: int, setting: Any, first: Point) -> Point:
    return first._replace(name=f"{series} #{number}", series=series, lam=None, setting=setting)
