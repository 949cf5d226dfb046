"""Run the search over λ: measure what it asks for, until it asks for nothing more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from backmerge.benchmarks.protocol import KINDS, Kind
from backmerge.checkpoints.reader import Weights
from backmerge.measuring.answer import Job
from backmerge.measuring.evaluate import Evaluator
from backmerge.measuring.score import Outcome
from backmerge.pipeline.decision import SPLIT, candidate_of, check_base, check_first_answers
from backmerge.pipeline.racing import RACED, race, search_layers
from backmerge.pipeline.results import Outcomes
from backmerge.planning.points import BASE, TUNED, Point, at_lam
from backmerge.planning.prepare import Plan
from backmerge.progress import bar
from backmerge.selection import Candidate, lam_between
from backmerge.selection.limits import is_within

NUM_CONFIRMED = 3  # base, tuned model and merge

DECISIVE: set[Kind] = {"safety", "keep"}

Wanted = dict[str, set[Kind]]  # point to what is to be measured there


class Found(NamedTuple):
    """The result of a search.

    Attributes:
        candidates: The measurements of each λ.
        notes: What a reader of the choice must know about the search.
        points: Points that the search added.
    """

    candidates: list[Candidate]
    notes: list[str]
    points: list[Point]


def sweep(
    evaluator: Evaluator,
    prepared: Plan,
    tuned: Mapping[str, Weights],
    points: Sequence[Point],
    outcomes: Outcomes,
    key: str,
) -> Found:
    """Measure the base, the tuned model, and the merges that the search asks for, on the selection split.

    Args:
        evaluator: Measures.
        prepared: The experiment.
        tuned: The tuned models, by name.
        points: The grid.
        outcomes: New measurements are added to these.
        key: A hash of all models and data of the measurements.
    """

    def carry_out(jobs: Sequence[Job], description: str, *, is_partial: bool = False) -> list[Outcome]:
        with bar(description, sum(len(job.examples) for job in jobs), "answers") as advance:
            return evaluator.evaluate(jobs, advance, is_partial=is_partial)

    def measure(wanted: Wanted, description: str) -> None:
        jobs = [
            Job(member, benchmark, SPLIT, prepared.splits[benchmark.name]["selection"])
            for name, kinds in wanted.items()
            for member in prepared.members_at(by_name[name], tuned)
            for benchmark in prepared.benchmarks
            if benchmark.kind in kinds and not outcomes.at(name, benchmark.name, SPLIT)
        ]
        for outcome in carry_out(jobs, description):
            outcomes.add(outcome)

    def measure_whole(more: Sequence[Point], description: str) -> None:
        by_name.update({point.name: point for point in more})
        measure({point.name: set(KINDS) for point in more}, description)

    by_name = {point.name: point for point in points}
    num_planned = len(tuned) * sum(
        len(points) * len(halves["selection"]) + NUM_CONFIRMED * len(halves["confirmation"])
        for halves in prepared.splits.values()
    )
    searched_by = prepared.experiment.searched_by
    grids = _grids(points)
    # methods without λ cannot be searched, and are fully measured
    single = [point for point in points if point.role == "merged" and (point.lam is None or point.step is not None)]

    def found_singly() -> list[Candidate]:
        if searched_by != "grid" and single:
            measure_whole(single, "Recipes without a λ")
        return [
            candidate_of(prepared.benchmarks, outcomes, point, point.series, prepared.experiment.choice.keep_against)
            for point in single
        ]

    def check_with_few_of_tuned() -> None:
        """Check base and tuned model on one batch of a race, which does not ask the tuned model first."""
        seen = Outcomes()
        first = prepared.experiment.search.batch
        jobs = [
            Job(member, benchmark, SPLIT, prepared.splits[benchmark.name]["selection"][:first])
            for member in prepared.members_at(TUNED, tuned)
            for benchmark in prepared.benchmarks
            if benchmark.kind == "safety"
        ]
        for outcome in (*outcomes.all(), *carry_out(jobs, "The tuned model's first answers", is_partial=True)):
            seen.add(outcome)
        check_first_answers(prepared, seen, num_planned)

    def check_first_of_base() -> None:
        """Check the base on its first harmful requests: if it is not aligned, the run should stop at once."""
        first = prepared.experiment.search.batch
        if all(len(prepared.splits[name]["selection"]) <= first for name in prepared.of_kind("safety")):
            return  # the check on base and tuned model follows immediately
        seen = Outcomes()
        jobs = [
            Job(member, benchmark, SPLIT, prepared.splits[benchmark.name]["selection"][:first])
            for member in prepared.members_at(BASE, tuned)
            for benchmark in prepared.benchmarks
            if benchmark.kind == "safety"
        ]
        for outcome in carry_out(jobs, "The base's first answers", is_partial=True):
            seen.add(outcome)
        check_base(prepared, seen, num_planned)

    check_first_of_base()
    if searched_by == "race":
        measure({BASE.name: {"safety"}}, "The base on harmful requests")
        check_with_few_of_tuned()
        measure({BASE.name: set(KINDS)}, "The base")
        batch = partial(carry_out, is_partial=True)
        candidates, added = race(grids, prepared, tuned, outcomes, batch)
        return Found([*candidates, *found_singly()], [RACED, *_refined_note(prepared, added)], added)
    measure({BASE.name: DECISIVE, TUNED.name: DECISIVE}, "Base and tuned model on the benchmarks of the verdict")
    check_first_answers(prepared, outcomes, num_planned)
    measure({point.name: set(KINDS) for point in points}, f"Sweep over {len(points)} points")
    added = [
        point for series, grid in grids.items() for point in _refined(series, grid, prepared, outcomes, measure_whole)
    ]
    grids = _grids([*points, *added])
    measured = {series: _measured(series, grid, prepared, outcomes) for series, grid in grids.items()}
    candidates = [c for found in measured.values() for c in found.values()]
    notes = _refined_note(prepared, added)
    candidates += found_singly()
    if prepared.experiment.layers is None:
        return Found(candidates, notes, added)
    by_layer = search_layers(evaluator.run, prepared, outcomes, candidates, key, measure_whole)
    return Found([*candidates, by_layer.candidate], [*notes, by_layer.note], [*added, *by_layer.points])


def _refined(
    series: str,
    grid: Mapping[float, Point],
    prepared: Plan,
    outcomes: Outcomes,
    measure: Callable[[Sequence[Point], str], None],
) -> list[Point]:
    """Measure λs of a series below the smallest one that fails, one at a time, within the budget."""
    experiment, lams = prepared.experiment, dict(grid)
    template = next((point for point in grid.values() if point.sweep is not None), None)
    added: list[Point] = []
    while experiment.num_refined > len(added) and template is not None:
        known = _measured(series, lams, prepared, outcomes)
        lam = lam_between({lam: is_within(c, experiment.choice) for lam, c in known.items()})
        if lam is None or lam in lams:
            break
        lams[lam] = at_lam(template, lam)
        added.append(lams[lam])
        measure([lams[lam]], f"{lams[lam].name}, below the smallest λ that fails")
    return added


def _refined_note(prepared: Plan, added: Sequence[Point]) -> list[str]:
    """Return a note on how much of the budget for further λs was used."""
    if not added:
        return []
    names = ", ".join(point.name for point in added)
    return [
        f"Below the smallest λ that fails, {len(added)} more {'was' if len(added) == 1 else 'were'} measured "
        f"({names}); "
        f"the budget (search.refine) is {prepared.experiment.num_refined} for each series."
    ]


def _grids(points: Iterable[Point]) -> dict[str, dict[float, Point]]:
    """Return each series' points by λ; the tuned model, λ=1, ends each series that has no end point."""
    grids: dict[str, dict[float, Point]] = {}
    for point in points:
        if point.role == "merged" and point.lam is not None and point.step is None:
            grids.setdefault(point.series, {})[point.lam] = point
    return {series: {**grid, 1.0: grid.get(1.0, TUNED)} for series, grid in grids.items()}


def _measured(series: str, grid: Mapping[float, Point], prepared: Plan, outcomes: Outcomes) -> dict[float, Candidate]:
    """Return the measurements of a series, by λ, without points that were not measured."""
    found = {
        lam: candidate_of(prepared.benchmarks, outcomes, point, series, prepared.experiment.choice.keep_against)
        for lam, point in grid.items()
    }
    return {lam: c for lam, c in found.items() if c.utility is not None or c.asr_difference is not None}
