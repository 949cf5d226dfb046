"""Compare the best of each series on prompts that nothing was chosen on: one table of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from backmerge.benchmarks.scoring import primary_metric
from backmerge.pipeline.decision import concluded, findings_at, limited, loss_rows
from backmerge.pipeline.results import Outcomes
from backmerge.planning.points import TUNED, Point
from backmerge.planning.prepare import Plan
from backmerge.records import Estimate
from backmerge.results import Comparison, ComparisonRow
from backmerge.selection import Candidate, Choice, choose
from backmerge.statistics import holm, mean_difference, mean_interval, two_sided_flip_p

SPLIT = "confirmation"


class Contender(NamedTuple):
    """A series in the comparison.

    Attributes:
        series: Its name.
        point: Its best point by the rule; `None` if none passed.
        reason: The rule's explanation.
    """

    series: str
    point: Point | None
    reason: str


def contenders_of(prepared: Plan, candidates: Sequence[Candidate], points: Sequence[Point]) -> list[Contender]:
    """Return each series with its best point by the rule, in the order of the experiment."""
    by_name = {point.name: point for point in points}
    found = []
    for series in dict.fromkeys(candidate.series for candidate in candidates):
        choice: Choice = choose([c for c in candidates if c.series == series], prepared.experiment.choice)
        found.append(Contender(series, by_name[choice.point] if choice.point else None, choice.reason))
    return found


def comparison_of(prepared: Plan, outcomes: Outcomes, contenders: Sequence[Contender]) -> Comparison:
    """Return the table: each contender's utility and its ASR above the base's, compared with the first contender.

    p-values are two-sided, from flipping signs over clusters of prompts, and adjusted for the number of series by
    Holm's method, so that chance differences among many series are accounted for.
    """
    reference = contenders[0]
    rows = [_row(prepared, outcomes, contender, reference) for contender in contenders]
    # holm keeps the order
    adjusted = iter(holm([p for _, p in rows if p is not None]))
    return Comparison(
        reference=reference.series,
        rows=tuple(row if p is None else row.model_copy(update={"p_adjusted": next(adjusted)}) for row, p in rows),
    )


def _row(
    prepared: Plan, outcomes: Outcomes, contender: Contender, reference: Contender
) -> tuple[ComparisonRow, float | None]:
    """Return a row, and the p of its difference in utility before adjustment."""
    point = contender.point
    row = ComparisonRow(
        series=contender.series,
        point=point.name if point else None,
        lam=point.lam if point else None,
        setting=point.setting if point else None,
        reason=contender.reason,
    )
    if point is None:
        return row, None
    safety, refusals = prepared.of_kind("safety"), prepared.of_kind("over_refusal")
    metric = {benchmark.name: primary_metric(benchmark) for benchmark in prepared.benchmarks}
    found = concluded(prepared, outcomes, point.name).with_losses
    figures: dict[str, Any] = {
        "num_models": len(outcomes.at(point.name, prepared.benchmarks[0].name, SPLIT)),
        "utility": _level(outcomes, point, {name: metric[name] for name in prepared.of_kind("utility")}),
        "asr": _level(outcomes, point, dict.fromkeys(safety, "asr")) if safety else None,
        "over_refusal": _level(outcomes, point, dict.fromkeys(refusals, "over_refusal")) if refusals else None,
        "asr_difference": found.asr_difference,
        "losses": loss_rows(found.losses),
        # its point passed the rule, so that it does not miss a target
        "verdict": limited(found.verdict, findings_at(prepared, outcomes, point.name), misses_target=False),
    }
    p = None
    if contender is not reference and reference.point is not None and point != reference.point:
        names = prepared.of_kind("utility")
        against = reference.point.name
        each = [outcomes.difference(point.name, against, [name], SPLIT, metric[name]) for name in names]
        figures["utility_difference"] = mean_difference(
            each, are_independent=outcomes.are_apart(point.name, names, SPLIT)
        )
        p = _p(outcomes, point.name, against, {name: metric[name] for name in names})
    return row.model_copy(update=figures), p


def _level(outcomes: Outcomes, point: Point, metrics: Mapping[str, str]) -> Estimate:
    """Return the mean over benchmarks of the means over models, with its interval over prompts and models."""
    levels = [outcomes.interval(point.name, name, SPLIT, metric) for name, metric in metrics.items()]
    values = [fmean(outcomes.mean_values(point.name, name, SPLIT, metric).values()) for name, metric in metrics.items()]
    held = mean_interval(values, levels, are_independent=outcomes.are_apart(point.name, list(metrics), SPLIT))
    return Estimate(fmean(values), held.low, held.high)


def _p(outcomes: Outcomes, point: str, against: str, metrics: Mapping[str, str]) -> float:
    """Return the two-sided p of no difference in utility, with equal weights of the benchmarks."""
    differences: list[float] = []
    clusters: list[str] = []
    of = outcomes.clusters_over(point, metrics, SPLIT)
    for name, metric in metrics.items():
        ours = outcomes.mean_values(point, name, SPLIT, metric)
        theirs = outcomes.mean_values(against, name, SPLIT, metric)
        both = [example for example in ours if example in theirs]
        differences += [(ours[example] - theirs[example]) / len(both) for example in both]
        clusters += [of[f"{name}/{example}"] for example in both]
    return two_sided_flip_p(differences, clusters)


def confirmed_points(contenders: Sequence[Contender], chosen: Point | None) -> list[Point]:
    """Return the points measured for the comparison in addition to base, tuned and the chosen point."""
    known = {TUNED.name, chosen.name if chosen else ""}
    return list(
        {c.point.name: c.point for c in contenders if c.point is not None and c.point.name not in known}.values()
    )
