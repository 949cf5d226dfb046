"""What the rules of choice and the searches see of a point: taken from what was measured on the selection split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from backmerge.benchmarks.protocol import Benchmark, Kind
from backmerge.benchmarks.scoring import primary_metric
from backmerge.pipeline.results import Outcomes
from backmerge.planning.points import BASE, TUNED, Point
from backmerge.selection import Bounded, Candidate
from backmerge.statistics import PairedDifference, effective_size, wilson

SPLIT = "selection"


def candidate_of(
    benchmarks: Sequence[Benchmark], outcomes: Outcomes, point: Point, series: str, keep_against: str = "base"
) -> Candidate:
    """A point as a candidate of a series; what was not measured of it is `None`.

    Args:
        benchmarks: Of the run.
        outcomes: What was measured.
        point: The candidate's.
        series: Its series.
        keep_against: What losses on benchmarks to keep are counted from: `base` or `tuned`.
    """
    safety, refusals = of_kind(benchmarks, "safety"), of_kind(benchmarks, "over_refusal")
    utility = None
    if all(outcomes.at(point.name, name, SPLIT) for name in of_kind(benchmarks, "utility")):
        utility = utility_of(benchmarks, outcomes, point.name, SPLIT)
    if not all(outcomes.at(point.name, name, SPLIT) for name in (*safety, *refusals, *of_kind(benchmarks, "keep"))):
        return Candidate(point.name, series, point.lam, utility, None)

    def difference(names: list[str], metric: str) -> PairedDifference:
        return outcomes.difference(point.name, BASE.name, names, SPLIT, metric)

    by_benchmark: Mapping[str, PairedDifference] = {name: difference([name], "asr") for name in safety}
    has_other = all("other" in o.values for name in safety for o in outcomes.at(point.name, name, SPLIT))
    return Candidate(
        point.name,
        series,
        point.lam,
        utility,
        difference(safety, "asr"),
        asr_by_benchmark=by_benchmark,
        over_refusal_difference=difference(refusals, "over_refusal") if refusals else None,
        other_rise=difference(safety, "other").difference if has_other else None,
        asr=_asr(outcomes, point, safety),
        losses=losses_of(benchmarks, outcomes, point.name, SPLIT, keep_against),
    )


def losses_of(
    benchmarks: Sequence[Benchmark], outcomes: Outcomes, point: str, split: str, keep_against: str
) -> dict[str, PairedDifference]:
    """What a point loses on each benchmark to keep: the reference's value less the point's, paired by prompt."""
    against = {"base": BASE, "tuned": TUNED}[keep_against].name
    return {
        benchmark.name: outcomes.difference(against, point, [benchmark.name], split, primary_metric(benchmark))
        for benchmark in benchmarks
        if benchmark.kind == "keep"
    }


def of_kind(benchmarks: Sequence[Benchmark], kind: Kind) -> list[str]:
    """Return the names of the benchmarks of a kind."""
    return [benchmark.name for benchmark in benchmarks if benchmark.kind == kind]


def utility_of(benchmarks: Sequence[Benchmark], outcomes: Outcomes, point: str, split: str) -> float | None:
    """Return the mean primary metric over tuned models and utility benchmarks; `None` without such benchmarks."""
    means = [
        fmean(outcomes.mean_values(point, benchmark.name, split, primary_metric(benchmark)).values())
        for benchmark in benchmarks
        if benchmark.kind == "utility"
    ]
    return fmean(means) if means else None


def _asr(outcomes: Outcomes, point: Point, safety: list[str]) -> Bounded:
    """The point's own ASR over all safety benchmarks: a two-sided interval at 90 % is one-sided 95 % on either side."""
    values, clusters = outcomes.pooled_values(point.name, safety, SPLIT, "asr")
    if not values:
        return Bounded(0.0, 0.0, 1.0, 0, 0.0)
    size = effective_size(values, clusters)
    low, high = wilson(fmean(values) * size, size, confidence=0.9)
    return Bounded(fmean(values), low, high, len(values), size)
