"""Run a race over λ: batches of prompts, until one λ is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from backmerge.benchmarks.scoring import primary_metric
from backmerge.benchmarks.split import clusters_over, pooled_id
from backmerge.checkpoints.reader import Weights
from backmerge.measuring.answer import Job
from backmerge.measuring.score import Outcome
from backmerge.pipeline.decision import SPLIT, candidate_of
from backmerge.pipeline.results import Outcomes
from backmerge.planning.points import BASE, Point, at_lam, series_of
from backmerge.planning.prepare import Plan
from backmerge.planning.settings import Experiment
from backmerge.records import Example
from backmerge.runs import RunDirectory, key_of
from backmerge.selection import Arm, Candidate, Race, choose, lam_between
from backmerge.selection.layers import LayerSearch
from backmerge.selection.race import OVER_REFUSAL, UTILITY

RACED = (
    "Searched by a race: each λ got batches of prompts as long as it could still be chosen, so only some were "
    "fully measured."
)
Measure = Callable[[Sequence[Job], str], list[Outcome]]


@dataclass
class _ArmPrompts:
    """An arm of the race, with the source of its prompts.

    Attributes:
        prompts: Benchmark and example of each place in the arm.
        arm: The race's knowledge about it.
    """

    prompts: list[tuple[str, Example]]
    arm: Arm


@dataclass
class _Found:
    """The measurements of each point so far.

    Attributes:
        parts: By point, benchmark and model: the part that answered each example first, by the example's id. The tuned
            model is λ=1 of every series, so several series may ask it the same prompts.
    """

    parts: dict[tuple[str, str, str], dict[str, Outcome]] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        key = (outcome.member.point.name, outcome.benchmark.name, outcome.member.name)
        known = self.parts.setdefault(key, {})
        for example in outcome.examples:
            known.setdefault(example.id, outcome)

    def whole(self, prepared: Plan) -> list[Outcome]:
        """Return one outcome for each model and benchmark with all prompts answered, in the order of the split.

        The answers of a λ that dropped out are not a fair sample: the prompts that most often get harmful answers come
        first.
        """
        return [
            _joined(parts, split)
            for (_, name, _), parts in self.parts.items()
            if len(parts) == len(split := prepared.splits[name]["selection"])
        ]


def race(
    grids: Mapping[str, Mapping[float, Point]],
    prepared: Plan,
    tuned: Mapping[str, Weights],
    outcomes: Outcomes,
    measure: Measure,
) -> tuple[list[Candidate], list[Point]]:
    """Race each series after the base has been measured; add the measurements to the outcomes.

    Returns:
        Every λ of every series, and the points that were added below the smallest λ that fails, within the budget.
    """
    lanes = _lanes(prepared, outcomes)
    safety = {name: lane.arm for name, lane in lanes.items() if name not in (UTILITY, OVER_REFUSAL)}
    refusals = lanes[OVER_REFUSAL].arm if OVER_REFUSAL in lanes else None
    found, candidates, added = _Found(), list[Candidate](), list[Point]()
    for series, of_grid in grids.items():
        grid = dict(of_grid)
        names = {lam: point.name for lam, point in grid.items()}
        search, choice = prepared.experiment.search, prepared.experiment.choice
        runners = Race(names, series, choice, safety, lanes[UTILITY].arm, refusals, batch=search.batch)
        budget, batches = search.refine, 0
        while True:
            asked = runners.next_batches()
            if not asked and budget and (lam := lam_between(runners.is_within)) is not None and lam not in grid:
                grid[lam] = at_lam(next(point for point in grid.values() if point.sweep is not None), lam)
                names[lam] = grid[lam].name
                runners.add(lam, names[lam])
                added.append(grid[lam])
                budget -= 1
                continue
            if not asked:
                break
            batches += 1
            jobs = [
                job
                for batch in asked
                for job in _jobs(prepared, tuned, grid[batch.lam], [lanes[batch.arm].prompts[p] for p in batch.prompts])
            ]
            values: dict[tuple[str, str], list[float | None]] = {}
            for outcome in measure(jobs, f"Race of {series}, batch {batches}"):
                found.add(outcome)
                metric = primary_metric(outcome.benchmark)
                for example, value in outcome.values[metric].items():
                    key = (outcome.member.point.name, f"{outcome.benchmark.name}/{example}")
                    values.setdefault(key, []).append(value)
            for batch in asked:
                prompts = [lanes[batch.arm].prompts[place] for place in batch.prompts]
                runners.tell(
                    batch.lam,
                    batch.arm,
                    [_mean(values[names[batch.lam], pooled_id(name, example)]) for name, example in prompts],
                )
        candidates += runners.candidates()
    known = {(o.member.name, o.benchmark.name) for o in outcomes.all()}
    for outcome in found.whole(prepared):
        if (outcome.member.name, outcome.benchmark.name) not in known:
            outcomes.add(outcome)
    return candidates, added


def _lanes(prepared: Plan, outcomes: Outcomes) -> dict[str, _ArmPrompts]:
    """Return utility, over-refusal, and safety: pooled over benchmarks, or each separately."""
    of_lane: dict[str, list[str]] = {UTILITY: prepared.of_kind("utility")}
    if prepared.of_kind("over_refusal"):
        of_lane[OVER_REFUSAL] = prepared.of_kind("over_refusal")
    safety = prepared.of_kind("safety")
    of_lane |= {"safety": safety} if prepared.experiment.choice.pooled else {name: [name] for name in safety}
    metric = {benchmark.name: primary_metric(benchmark) for benchmark in prepared.benchmarks}
    lanes = {}
    for lane, names in of_lane.items():
        prompts = [(name, example) for name in names for example in prepared.splits[name]["selection"]]
        clusters = clusters_over({name: prepared.splits[name]["selection"] for name in names})
        base = {
            pooled_id(name, example): outcomes.at(BASE.name, name, SPLIT)[0].values[metric[name]][example.id]
            for name, example in prompts
        }
        lanes[lane] = _ArmPrompts(prompts, Arm(list(base.values()), list(clusters.values())))
    return lanes


def _jobs(
    prepared: Plan, tuned: Mapping[str, Weights], point: Point, prompts: Sequence[tuple[str, Example]]
) -> list[Job]:
    """Return the prompts of a batch, by benchmark, for each model at the point."""
    return [
        Job(member, benchmark, SPLIT, [example for name, example in prompts if name == benchmark.name])
        for member in prepared.members_at(point, tuned)
        for benchmark in prepared.benchmarks
        if any(name == benchmark.name for name, _ in prompts)
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean over the models at a point; `None` if one of them is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _joined(parts: Mapping[str, Outcome], split: Sequence[Example]) -> Outcome:
    """Return one outcome on the whole split, each example as its part has it."""
    of = [(example.id, parts[example.id]) for example in split]
    first = of[0][1]
    return replace(
        first,
        examples=tuple(split),
        completions=tuple(one for name, part in of for one in part.completions if one.example == name),
        verdicts=tuple(one for name, part in of for one in part.verdicts if one.example == name),
        second_verdicts=tuple(one for name, part in of for one in part.second_verdicts if one.example == name),
        values={metric: {name: part.values[metric][name] for name, part in of} for metric in first.values},
    )


JOURNAL = "layers.journal"


class Layered(NamedTuple):
    """The result of the search by layer.

    Attributes:
        points: Every recipe that was measured.
        candidate: The one that enters the choice.
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
    """Measure recipes with a λ for each part, starting from the best single λ.

    The best of many recipes is picked, and tests of each would not account for that: it is one candidate, and only the
    confirmation shows whether it is safe.

    Args:
        run: Its journal stores the study.
        prepared: The experiment.
        outcomes: New measurements are added to these.
        singles: The candidates with a single λ, of all series.
        key: A hash of all models and data of the measurements.
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
    # recipes of an earlier session are measured again, from the units, since their outcomes belong to the results
    for known, _ in search.told():
        points.append(_point(series, known.number, known.setting, first))
    if points:
        measure(points, f"Search of {series}, recipes of earlier sessions")
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
        f"{len(points)} recipes with a λ for each {'part' if settings.by == 'both' else settings.by} were measured, "
        f"starting from λ = {start:g} everywhere; {best} was picked on the selection prompts. That is no test "
        "of it: the confirmation is."
    )
    return Layered(points, picked._replace(series=series), note)


def _start(singles: Sequence[Candidate], experiment: Experiment) -> float:
    """Return the best single λ by the rule; if none passes, the one with the lowest shown ASR."""
    chosen = choose(singles, experiment.choice).point if singles else None
    if chosen is not None:
        return next(c.reach for c in singles if c.point == chosen)
    measured = [c for c in singles if c.asr_difference is not None]
    if not measured:
        return 0.5
    return min(measured, key=lambda c: (c.asr_difference.upper_bound if c.asr_difference else 1.0, c.reach)).reach


def _point(series: str, number: int, setting: Any, first: Point) -> Point:
    return first._replace(name=f"{series} #{number}", series=series, lam=None, setting=setting)
