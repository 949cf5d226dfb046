"""A few prompts with the answers of base, tuned model and every measured recipe side by side, for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from backmerge.benchmarks.protocol import Benchmark
from backmerge.benchmarks.split import Split
from backmerge.measuring.score import Outcome
from backmerge.pipeline.results import Outcomes
from backmerge.planning.points import BASE, TUNED, Point
from backmerge.planning.prepare import Plan
from backmerge.records import Example
from backmerge.runs import key_of

SPLIT: Split = "selection"  # the split on which every recipe was measured, not only the chosen one
# of each ten prompts that are drawn blindly; the report is about the effect of fine-tuning on harmful requests
SHARES = {"safety": 0.5, "utility": 0.3, "over_refusal": 0.2, "keep": 0.2}
LONGEST = 2000  # characters of a text that are kept
MOST_TEXT = 500_000  # characters of all answers together: the report stays a page that a phone opens
MOST_RECIPES = 40  # columns; a search by layer may measure hundreds


class _Column(NamedTuple):
    """The results of one model on one benchmark.

    Attributes:
        outcome: The whole outcome.
        places: The place of each example's first answer; empty if likelihoods are compared.
        known: Examples that it was asked: a race skips some.
    """

    outcome: Outcome
    places: Mapping[str, int]
    known: frozenset[str]

    def is_harmful(self, example: Example) -> bool | None:
        """The judge's finding on the first answer; `None` if it is unscored or was not judged."""
        verdict = self.outcome.verdicts[self.places[example.id]] if self._is_judged(example) else None
        return None if verdict is None else verdict.harmful

    def is_refusal(self, example: Example) -> bool | None:
        """The same for refusals."""
        verdict = self.outcome.verdicts[self.places[example.id]] if self._is_judged(example) else None
        return None if verdict is None else verdict.refusal

    def _is_judged(self, example: Example) -> bool:
        return bool(self.outcome.verdicts) and example.id in self.places


Columns = Mapping[str, _Column]  # by point


def samples_of(outcomes: Outcomes, prepared: Plan, chosen: Point | None) -> dict[str, Any]:
    """Return what the report shows side by side, for the first tuned model, on the selection split.

    Every λ was measured only on that split, so nothing here affects the verdict. Up to `num_samples` prompts are taken
    of each kind that interests a reader, in the order of a hash of their ids: drawn blindly; flipped to unsafe (the
    base's answer is safe, the tuned model's harmful); flipped back (the tuned model's answer is harmful, that of the
    chosen recipe, or of any if none is chosen, safe); harmless but refused.

    Returns:
        `split`; `tuned`: the model of these answers; `points`: the columns; `cut_at`: characters after which a text is
        cut; `totals`: how many prompts of the whole split there are of each kind; `samples`: each with its `answers` by
        point, `harmful` and `refusal` or `scores` and the text. Texts of gated sets are omitted (`withheld` says why)
        unless the report shows them in full; if the report shows no text, there are no samples.
    """
    report = prepared.experiment.report
    points = _points(outcomes, chosen)
    tables = {benchmark.name: _columns(outcomes, benchmark, points) for benchmark in prepared.benchmarks}
    drawn = _drawn(prepared, tables, chosen) if report.text != "none" else []
    num_answers = sum(example.id in c.known for name, example in drawn for c in tables[name].values())
    cut_at = min(LONGEST, MOST_TEXT // max(num_answers, 1))
    by_name = {benchmark.name: benchmark for benchmark in prepared.benchmarks}
    tuned = outcomes.at(TUNED.name, prepared.benchmarks[0].name, SPLIT)
    return {
        "split": SPLIT,
        "tuned": tuned[0].member.tuned if tuned else None,
        "points": [{"point": p.name, "role": p.role, "series": p.series, "lam": p.lam} for p in points],
        "cut_at": cut_at,
        "totals": _totals(prepared, tables, points),
        "samples": [
            _sample(by_name[name], example, tables[name], cut_at, is_full=report.text == "full")
            for name, example in drawn
        ],
    }


def _points(outcomes: Outcomes, chosen: Point | None) -> list[Point]:
    """Return base, tuned model and the measured recipes, in order; if too many, the chosen one and the first."""
    measured = {o.member.point.name: o.member.point for o in outcomes.all() if o.split == SPLIT}
    merged = [point for point in measured.values() if point.role == "merged"]
    if len(merged) > MOST_RECIPES:
        kept = {chosen.name} if chosen in merged and chosen else set()
        kept |= {point.name for point in merged[: MOST_RECIPES - len(kept)]}
        merged = [point for point in merged if point.name in kept]
    return [point for point in (BASE, TUNED) if point.name in measured] + merged


def _columns(outcomes: Outcomes, benchmark: Benchmark, points: Sequence[Point]) -> dict[str, _Column]:
    columns = {}
    for point in points:
        found = outcomes.at(point.name, benchmark.name, SPLIT)
        if found:
            places: dict[str, int] = {}
            for place, completion in enumerate(found[0].completions):
                places.setdefault(completion.example, place)
            columns[point.name] = _Column(found[0], places, frozenset(example.id for example in found[0].examples))
    return columns


def _drawn(prepared: Plan, tables: Mapping[str, Columns], chosen: Point | None) -> list[tuple[str, Example]]:
    """Return benchmark and example, each once: by benchmark, with those that fine-tuning flipped first."""
    number = prepared.experiment.report.num_samples
    everything = [
        (benchmark, example)
        for benchmark in prepared.benchmarks
        for example in prepared.splits[benchmark.name][SPLIT]
        if example.id in tables[benchmark.name][BASE.name].known
    ]
    everything.sort(key=lambda pair: key_of(pair[0].name, pair[1].id))
    taken: dict[tuple[str, str], Example] = {}

    def take(pairs: Sequence[tuple[Benchmark, Example]], most: int) -> None:
        taken.update({(benchmark.name, example.id): example for benchmark, example in pairs[:most]})

    for each in prepared.benchmarks:
        share = SHARES[each.kind] * number / len(prepared.of_kind(each.kind))
        take([pair for pair in everything if pair[0] is each], max(1, round(share)) if number else 0)
    recipes = [chosen.name] if chosen is not None and chosen != TUNED else []
    take([(b, e) for b, e in everything if _is_flipped(b, e, tables[b.name])], number)
    take([(b, e) for b, e in everything if _is_back(b, e, tables[b.name], recipes)], number)
    take([(b, e) for b, e in everything if _is_refused(b, e, tables[b.name])], number)
    order = [benchmark.name for benchmark in prepared.benchmarks]
    by_name = {benchmark.name: benchmark for benchmark in prepared.benchmarks}

    def rank(pair: tuple[str, Example]) -> tuple[int, bool, str]:
        name, example = pair
        return order.index(name), not _is_flipped(by_name[name], example, tables[name]), key_of(name, example.id)

    return sorted(((name, example) for (name, _), example in taken.items()), key=rank)


def _is_flipped(benchmark: Benchmark, example: Example, columns: Columns) -> bool:
    """Return whether fine-tuning made the answer harmful."""
    if benchmark.kind != "safety" or TUNED.name not in columns:
        return False
    return columns[BASE.name].is_harmful(example) is False and columns[TUNED.name].is_harmful(example) is True


def _is_back(benchmark: Benchmark, example: Example, columns: Columns, recipes: Sequence[str] = ()) -> bool:
    """Return whether a recipe's answer is safe while the tuned model's is harmful: one of these recipes, or any."""
    if benchmark.kind != "safety" or TUNED.name not in columns or columns[TUNED.name].is_harmful(example) is not True:
        return False
    names = recipes or [name for name, column in columns.items() if column.outcome.member.point.role == "merged"]
    return any(name in columns and columns[name].is_harmful(example) is False for name in names)


def _is_refused(benchmark: Benchmark, example: Example, columns: Columns) -> bool:
    return benchmark.kind == "over_refusal" and any(column.is_refusal(example) for column in columns.values())


def _totals(prepared: Plan, tables: Mapping[str, Columns], points: Sequence[Point]) -> dict[str, Any]:
    """Return how many prompts of the split there are of each kind, so that a sample is not mistaken for a rate."""
    asked = {
        kind: [
            (benchmark, example)
            for benchmark in prepared.benchmarks
            if benchmark.kind == kind
            for example in prepared.splits[benchmark.name][SPLIT]
        ]
        for kind in ("safety", "over_refusal")
    }
    recipes = [point.name for point in points if point.role == "merged"]
    return {
        "harmful_requests": len(asked["safety"]),
        "harmless_requests": len(asked["over_refusal"]),
        "flipped": sum(_is_flipped(b, e, tables[b.name]) for b, e in asked["safety"]),
        "flipped_back": {
            name: sum(_is_back(b, e, tables[b.name], [name]) for b, e in asked["safety"]) for name in recipes
        },
        "refused": {
            point.name: sum(
                point.name in tables[b.name] and tables[b.name][point.name].is_refusal(e) is True
                for b, e in asked["over_refusal"]
            )
            for point in points
        },
    }


def _sample(benchmark: Benchmark, example: Example, columns: Columns, cut_at: int, *, is_full: bool) -> dict[str, Any]:
    withheld = None
    if benchmark.is_gated and not is_full:
        withheld = f"{benchmark.name} is gated: its authors say who may read it (report.text: full shows it)"
    reference = None if benchmark.is_judged else example.reference
    return {
        "benchmark": benchmark.name,
        "kind": benchmark.kind,
        "example": example.id,
        "category": example.category,
        "withheld": withheld,
        "prompt": None if withheld else example.prompt[:LONGEST],
        "reference": None if withheld or reference is None else reference[:LONGEST],
        "answers": {
            name: _answer(column, example, cut_at, is_shown=not withheld)
            for name, column in columns.items()
            if example.id in column.known
        },
    }


def _answer(column: _Column, example: Example, cut_at: int, *, is_shown: bool) -> dict[str, Any]:
    # the first of several samples; none if likelihoods are compared
    place = column.places.get(example.id)
    text = "" if place is None else column.outcome.completions[place].text
    thought = "" if place is None else column.outcome.completions[place].thought
    answer: dict[str, Any] = {
        "text": text[:cut_at] if is_shown else None,
        "cut_from": len(text) if is_shown and len(text) > cut_at else None,
        **({"thought": thought[:cut_at]} if is_shown and thought else {}),
    }
    if column.outcome.verdicts:
        return {**answer, "harmful": column.is_harmful(example), "refusal": column.is_refusal(example)}
    return {**answer, "scores": {metric: values[example.id] for metric, values in column.outcome.values.items()}}
