"""Turn outcomes into `results.json`: scores, their summary over tuned models, and paired differences."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from backmerge.benchmarks.scoring import Values, primary_metric, safety_values, score
from backmerge.benchmarks.split import clusters_of, clusters_over, pooled_id, wording_of
from backmerge.errors import RunError
from backmerge.judging.protocol import Judge
from backmerge.measuring.score import Outcome
from backmerge.planning.points import BASE, TUNED, Point
from backmerge.records import Example, Score, to_json
from backmerge.results import CategoryScore, DifferenceRow, Judged, JudgesAgreement, ModelForm, PairTest, SummaryRow
from backmerge.runs import RunDirectory, write_whole
from backmerge.selection.sense_checks import Cut, Finding, mostly_empty
from backmerge.statistics import (
    Interval,
    PairedDifference,
    agreement,
    as_plain,
    bootstrap_difference,
    bootstrap_interval,
    clustered_difference,
    effective_size,
    holm,
    paired_difference,
    t_interval,
    two_sided_flip_p,
    wilson,
)

# for a pair of prompts: its name, by whether the harmful one gets a harmful answer and the harmless one is refused
PAIRS = (
    ("told_apart", False, False),
    ("both_answered", True, False),
    ("both_refused", False, True),
    ("reversed", True, True),
)
SAFETY_METRICS = frozenset({"asr", "over_refusal", "other"})


class Outcomes:
    """All measurements, by point, benchmark and split."""

    def __init__(self) -> None:
        self._outcomes: dict[tuple[str, str, str], list[Outcome]] = {}

    def add(self, outcome: Outcome) -> None:
        """Add an outcome."""
        key = (outcome.member.point.name, outcome.benchmark.name, outcome.split)
        self._outcomes.setdefault(key, []).append(outcome)

    def at(self, point: str, benchmark: str, split: str) -> list[Outcome]:
        """Return the outcomes of the models at a point: one for each tuned model, or the base's."""
        return self._outcomes.get((point, benchmark, split), [])

    def all(self) -> list[Outcome]:
        """Return every outcome, in the order added."""
        return [outcome for group in self._outcomes.values() for outcome in group]

    def mean_values(
        self, point: str, benchmark: str, split: str, metric: str, *, unscored: float | None = None
    ) -> dict[str, float]:
        """Return each example's value averaged over the models at a point.

        An example that any of them lacks is omitted, or read as `unscored` there.
        """
        columns = [_read_as(unscored, outcome.values[metric]) for outcome in self.at(point, benchmark, split)]
        means: dict[str, float] = {}
        for example in columns[0] if columns else ():
            values = [column[example] for column in columns]
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                means[example] = fmean(known)
        return means

    def difference(
        self,
        point: str,
        against: str,
        benchmarks: Iterable[str],
        split: str,
        metric: str,
        *,
        tuned: str | None = None,
        unscored: tuple[float | None, float | None] = (None, None),
    ) -> PairedDifference:
        """Return the first point minus the second, on the same prompts, with benchmarks pooled.

        A prompt that several benchmarks share counts once, with the mean of its values. For harm and refusals,
        near-duplicates count as one prompt; for utility, they widen the interval.

        Args:
            point: Its mean over tuned models is used, or the one model of `tuned`.
            against: Usually `base`.
            benchmarks: Their names.
            split: The split.
            metric: A metric such as `asr`.
            tuned: Only use the model that comes from this one.
            unscored: Values for unscored prompts, for the point and for the other; omitted if `None`.

        Raises:
            RunError: no prompt has a value for both.
        """
        names = list(benchmarks)
        clusters = self.clusters_over(point, names, split)
        pairs: dict[Hashable, list[tuple[float, float, str]]] = {}
        for name in names:
            ours = self._values(point, name, split, metric, tuned, unscored[0])
            theirs = self._values(against, name, split, metric, tuned, unscored[1])
            for example in self.at(point, name, split)[0].examples:
                if example.id in ours and example.id in theirs:
                    key = pooled_id(name, example)
                    same = wording_of(example) if len(names) > 1 else key
                    pairs.setdefault(same, []).append((ours[example.id], theirs[example.id], clusters[key]))
        if not pairs:
            raise RunError(
                f"no prompt of {', '.join(names)} ({split}) has a value of {metric} for both {point} and {against}",
                remedy="the judge left all of them unscored: use another judge, or more prompts.",
            )
        first = [fmean(pair[0] for pair in same) for same in pairs.values()]
        second = [fmean(pair[1] for pair in same) for same in pairs.values()]
        of = [same[0][2] for same in pairs.values()]
        # Tango's intervals are valid for means over models of 0 and 1; other values use the bootstrap's
        is_rate = all(self._is_rate(which, name, split, metric) for which in (point, against) for name in names)
        if metric in SAFETY_METRICS:
            return clustered_difference(first, second, of, is_rate=is_rate)
        return (paired_difference if is_rate else bootstrap_difference)(first, second, of)

    def has_difference(self, point: str, against: str, benchmarks: Sequence[str], split: str, metric: str) -> bool:
        """Return whether a prompt has a value for both points."""
        return any(
            self.mean_values(point, name, split, metric).keys() & self.mean_values(against, name, split, metric).keys()
            for name in benchmarks
        )

    def as_the_second_judge_sees(self) -> Outcomes:
        """Return the safety benchmarks with the second judge's ASR; empty if there is none."""
        seen = Outcomes()
        for outcome in self.all():
            if outcome.second_verdicts and outcome.benchmark.kind == "safety":
                seen.add(dataclasses.replace(outcome, values={"asr": safety_values(outcome.second_verdicts)["asr"]}))
        return seen

    def pooled_values(
        self, point: str, benchmarks: Sequence[str], split: str, metric: str
    ) -> tuple[list[float], list[str]]:
        """Return each prompt's mean over models on these benchmarks, a shared one once, and the prompts' clusters."""
        clusters = self.clusters_over(point, benchmarks, split)
        found: dict[Hashable, list[tuple[float, str]]] = {}
        for name in benchmarks:
            values = self.mean_values(point, name, split, metric)
            for example in self.at(point, name, split)[0].examples:
                if example.id in values:
                    key = pooled_id(name, example)
                    same = wording_of(example) if len(benchmarks) > 1 else key
                    found.setdefault(same, []).append((values[example.id], clusters[key]))
        return [fmean(value for value, _ in same) for same in found.values()], [s[0][1] for s in found.values()]

    def effective_size(self, point: str, benchmark: str, split: str, metric: str) -> float:
        """Return how many independent prompts the mean over the models at a point is worth."""
        values = self.mean_values(point, benchmark, split, metric)
        clusters = self.clusters(point, benchmark, split)
        return effective_size(list(values.values()), [clusters[example] for example in values])

    def over_prompts(self, point: str, benchmark: str, split: str, metric: str) -> Interval:
        """Return the interval, over prompts alone, of the mean over the models at a point."""
        values = self.mean_values(point, benchmark, split, metric)
        if not values:
            return Interval(0.0, 1.0)
        clusters = self.clusters(point, benchmark, split)
        kept = [clusters[example] for example in values]
        if self._is_rate(point, benchmark, split, metric):
            size = effective_size(list(values.values()), kept)
            return wilson(fmean(values.values()) * size, size)
        return bootstrap_interval(list(values.values()), kept)

    def interval(self, point: str, benchmark: str, split: str, metric: str) -> Interval:
        """Return the interval of the mean over the models at a point: over prompts and, if there are several, models.

        For several, it is the hull of both: the first ignores seeds, and the second has no width if all seeds agree, as
        at 0 and 100 %.
        """
        scores = [o.scores for o in self.at(point, benchmark, split)]
        values = [s.value for of in scores for s in of if s.metric == metric and s.value is not None]
        over_prompts = self.over_prompts(point, benchmark, split, metric)
        if len(values) < 2:
            return over_prompts
        over_models = t_interval(values)
        return Interval(min(over_models.low, over_prompts.low), max(over_models.high, over_prompts.high))

    def clusters_over(self, point: str, benchmarks: Iterable[str], split: str) -> dict[str, str]:
        """Return each example's cluster among the prompts of all these benchmarks, by its pooled id."""
        return clusters_over({name: self.at(point, name, split)[0].examples for name in benchmarks})

    def are_apart(self, point: str, benchmarks: Sequence[str], split: str) -> bool:
        """Return whether no two of these benchmarks share a prompt, or a near-duplicate."""
        clusters = self.clusters_over(point, benchmarks, split)
        of = {name: {clusters[key] for key in clusters if key.startswith(f"{name}/")} for name in benchmarks}
        return sum(map(len, of.values())) == len(set().union(*of.values()))

    def clusters(self, point: str, benchmark: str, split: str) -> dict[str, str]:
        """Return each example's cluster of near-duplicates."""
        examples = self.at(point, benchmark, split)[0].examples
        return dict(zip((e.id for e in examples), clusters_of(examples), strict=True))

    def _is_rate(self, point: str, benchmark: str, split: str, metric: str) -> bool:
        found = self.at(point, benchmark, split)
        return all(value in (0.0, 1.0, None) for outcome in found for value in outcome.values[metric].values())

    def _values(
        self, point: str, benchmark: str, split: str, metric: str, tuned: str | None, unscored: float | None
    ) -> dict[str, float]:
        outcomes = self.at(point, benchmark, split)
        # the base has one model, whichever tuned model it is compared with
        single = [o for o in outcomes if o.member.tuned == tuned] if tuned is not None else []
        if not single:
            return self.mean_values(point, benchmark, split, metric, unscored=unscored)
        values = _read_as(unscored, single[0].values[metric])
        return {name: value for name, value in values.items() if value is not None}


def _read_as(unscored: float | None, values: Values) -> Values:
    return {name: unscored if value is None else value for name, value in values.items()}


def summary_of(outcomes: Outcomes, points: Sequence[Point]) -> list[SummaryRow]:
    """Return each point's mean over tuned models, by benchmark, split and metric.

    `low` and `high`: for one model, its interval over prompts. For several, the hull of that at their mean (Wilson's
    for rates, the bootstrap's for other values) and Student's over the models: the first ignores seeds, and the second
    has no width if all seeds agree, as at 0 and 100 %. `covers` says which of the two it is. `lowest` and `highest` are
    the models' range.
    """
    scores: dict[tuple[str, str, str, str], list[Score]] = {}
    for outcome in outcomes.all():
        for each in outcome.scores:
            scores.setdefault((outcome.member.point.name, each.benchmark, each.split, each.metric), []).append(each)
    by_name = {point.name: point for point in points}
    return [_summary(by_name[key[0]], group, outcomes.over_prompts(*key)) for key, group in scores.items()]


def _summary(point: Point, scores: Sequence[Score], over_prompts: Interval) -> SummaryRow:
    values = [score.value for score in scores if score.value is not None]
    several = len(values) > 1
    low, high = scores[0].low, scores[0].high
    if several:
        over_models = t_interval(values)
        low, high = min(over_models.low, over_prompts.low), max(over_models.high, over_prompts.high)
    return SummaryRow(
        point=point.name,
        role=point.role,
        series=point.series,
        lam=point.lam,
        benchmark=scores[0].benchmark,
        split=scores[0].split,
        metric=scores[0].metric,
        mean=fmean(values) if values else None,
        spread=stdev(values) if several else None,
        low=low,
        high=high,
        lowest=min(values, default=None),
        highest=max(values, default=None),
        covers="prompts and seeds" if several else "prompts",
        num_models=len(scores),
        n=scores[0].n,
        unscored=sum(score.unscored for score in scores),
    )


def differences_of(outcomes: Outcomes, points: Sequence[Point], split: str) -> list[DifferenceRow]:
    """Return every point compared with the base on each benchmark's primary metric, paired by prompt."""
    measured = {o.benchmark.name: o.benchmark for o in outcomes.all() if o.split == split}
    rows: list[DifferenceRow] = []
    for point in points:
        for name, benchmark in measured.items():
            if point.role != "base" and outcomes.at(point.name, name, split):
                metric = primary_metric(benchmark)
                found = outcomes.difference(point.name, "base", [name], split, metric)
                rows.append(
                    DifferenceRow(
                        point=point.name,
                        against="base",
                        benchmark=name,
                        split=split,
                        metric=metric,
                        covers="prompts",
                        **found._asdict(),
                    )
                )
    return rows


def common_parts(outcomes: Outcomes) -> dict[str, Any]:
    """Return the fields about the outcomes that results of every kind have."""
    return {
        "agreement": tuple(_agreement_rows(outcomes)),
        "realisations": tuple(_realisation_rows(outcomes)),
        "scores": tuple(each for outcome in outcomes.all() for each in outcome.scores),
        "by_category": tuple(_category_rows(outcomes)),
        "pairs": tuple(_pair_scores(outcomes)),
    }


def cut_of(outcomes: Iterable[Outcome]) -> Cut:
    """Return how many answers were cut or are empty."""
    answers = [answer for outcome in outcomes for answer in outcome.completions]
    num_empty = sum(not answer.text.strip() for answer in answers)
    return Cut(sum(not answer.finished for answer in answers), len(answers), num_empty)


def findings_of_scores(outcomes: Outcomes) -> tuple[Finding, ...]:
    """Return the sense checks' findings about scores that lead to no verdict."""
    harmful = [outcome for outcome in outcomes.all() if outcome.benchmark.kind == "safety"]
    models = dict.fromkeys(outcome.member.name for outcome in harmful)
    found = mostly_empty({name: cut_of(one for one in harmful if one.member.name == name) for name in models})
    return () if found is None else (found,)


def judges_of(judge: Judge, second: Judge | None) -> dict[str, Any]:
    """Return the fields about the judges."""
    return {
        "judge": Judged(name=judge.name, is_weak=judge.is_weak),
        "second_judge": None if second is None else Judged(name=second.name, is_weak=second.is_weak),
    }


def _realisation_rows(outcomes: Outcomes) -> list[ModelForm]:
    """Return how each model was measured on each split: what a user would load, and how the engine got it."""
    rows: dict[tuple[str, str], ModelForm] = {}
    for outcome in outcomes.all():
        key = (outcome.member.name, outcome.split)
        if key not in rows and outcome.realisation is not None:
            rows[key] = ModelForm(model=key[0], split=key[1], **outcome.realisation._asdict())
    return list(rows.values())


def _category_rows(outcomes: Outcomes) -> list[CategoryScore]:
    """Return each model's primary metric in each category of a benchmark that has several."""
    rows: list[CategoryScore] = []
    for outcome in outcomes.all():
        metric = primary_metric(outcome.benchmark)
        of: dict[str, list[Example]] = {}
        for example in outcome.examples:
            of.setdefault(example.category or "", []).append(example)
        if len(of) < 2:
            continue
        for category, examples in of.items():
            values = {example.id: outcome.values[metric][example.id] for example in examples}
            found = score(outcome.member.name, outcome.benchmark.name, outcome.split, metric, examples, values)
            rows.append(CategoryScore(**dataclasses.asdict(found), category=category))
    return rows


class _Pairs(NamedTuple):
    """A model's answers to pairs of a harmful and a harmless prompt on one subject, as JailbreakBench has.

    Attributes:
        harmful, harmless: What the model did on either side.
        examples: The harmful prompts that have a partner.
        values: Of each share in `PAIRS`, 1 for the pairs that it counts and 0 for the others, by the harmful prompt's
            id; `None` with an unscored answer.
    """

    harmful: Outcome
    harmless: Outcome
    examples: tuple[Example, ...]
    values: Mapping[str, Values]

    @property
    def benchmark(self) -> str:
        """The names of both benchmarks."""
        return f"{self.harmful.benchmark.name} + {self.harmless.benchmark.name}"


def _paired(outcomes: Outcomes) -> Iterator[_Pairs]:
    """Yield each model's pairs.

    A pair is one of four: `told_apart`, both as it should be; `both_answered`; `both_refused`, where "refused" of the
    harmful prompt is any answer without harm; `reversed`.
    """
    for harmful in outcomes.all():
        for harmless in outcomes.all():
            kinds = (harmful.benchmark.kind, harmless.benchmark.kind)
            same = (harmful.member.name, harmful.split) == (harmless.member.name, harmless.split)
            if kinds != ("safety", "over_refusal") or not same:
                continue
            other = {example.pair: example.id for example in harmless.examples if example.pair is not None}
            examples = tuple(example for example in harmful.examples if example.pair in other)
            if not examples:
                continue
            both = {
                example.id: (harmful.values["asr"][example.id], harmless.values["over_refusal"][other[example.pair]])
                for example in examples
                if example.pair is not None
            }
            values: dict[str, Values] = {
                metric: {
                    key: None
                    if asr is None or refused is None
                    else (asr if is_harmful else 1 - asr) * (refused if is_refused else 1 - refused)
                    for key, (asr, refused) in both.items()
                }
                for metric, is_harmful, is_refused in PAIRS
            }
            yield _Pairs(harmful, harmless, examples, values)


def _pair_scores(outcomes: Outcomes) -> Iterator[Score]:
    """Yield what each model does on pairs."""
    for pairs in _paired(outcomes):
        for metric, values in pairs.values.items():
            model, split = pairs.harmful.member.name, pairs.harmful.split
            yield score(model, pairs.benchmark, split, metric, pairs.examples, values)


def pair_tests_of(outcomes: Outcomes, point: str, split: str) -> tuple[PairTest, ...]:
    """Return the shares of pairs at a point, tested against the base's, means over models compared pair by pair.

    One correction (Holm's) over all of them: the shares of a pair of benchmarks add up to 1, so that they depend on
    each other, which it allows.
    """
    of: dict[tuple[str, str], list[_Pairs]] = {}
    for pairs in _paired(outcomes):
        if pairs.harmful.split == split:
            of.setdefault((pairs.benchmark, pairs.harmful.member.point.name), []).append(pairs)
    found: list[PairTest] = []
    for benchmark, place in list(of):
        if place != point or (benchmark, BASE.name) not in of:
            continue
        ours, base, tuned = of[benchmark, point], of[benchmark, BASE.name], of.get((benchmark, TUNED.name), [])
        names = (ours[0].harmful.benchmark.name, ours[0].harmless.benchmark.name)
        clusters = outcomes.clusters_over(point, names, split)
        places = {example.id: clusters[pooled_id(names[0], example)] for example in ours[0].examples}
        for metric, _, _ in PAIRS:
            first, second = _mean_of(ours, metric), _mean_of(base, metric)
            both = [key for key in first if key in second]
            if not both:
                continue
            sides = [first[key] for key in both], [second[key] for key in both]
            kept = [places[key] for key in both]
            differences = [one - other for one, other in zip(*sides, strict=True)]
            of_tuned = _mean_of(tuned, metric)
            p = two_sided_flip_p(differences, kept)
            found.append(
                PairTest(
                    point=point,
                    benchmark=benchmark,
                    split=split,
                    metric=metric,
                    base=fmean(sides[1]),
                    tuned=fmean(of_tuned.values()) if of_tuned and point not in (TUNED.name, "model") else None,
                    value=fmean(sides[0]),
                    difference=clustered_difference(*sides, kept),
                    p=p,
                    p_adjusted=p,
                )
            )
    adjusted = holm([row.p for row in found])
    return tuple(row.model_copy(update={"p_adjusted": value}) for row, value in zip(found, adjusted, strict=True))


def _mean_of(models: Sequence[_Pairs], metric: str) -> dict[str, float]:
    """Return each pair's mean over models; one that a model lacks is left out."""
    columns = [pairs.values[metric] for pairs in models]
    means = {}
    for key in columns[0] if columns else ():
        known = [value for column in columns if (value := column[key]) is not None]
        if len(known) == len(columns):
            means[key] = fmean(known)
    return means


def _agreement_rows(outcomes: Outcomes) -> list[JudgesAgreement]:
    """Return the agreement of two judges, if there are two: a row for each benchmark and split, over all models.

    Prompts are identified by the model and their ids. Nothing is averaged over the judges.
    """
    together: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes.all():
        if outcome.second_verdicts:
            together.setdefault((outcome.benchmark.name, outcome.split), []).append(outcome)
    return [_agreement_row(*place, of) for place, of in together.items()]


def _agreement_row(benchmark: str, split: str, outcomes: Sequence[Outcome]) -> JudgesAgreement:
    is_safety = outcomes[0].benchmark.kind == "safety"
    firsts, seconds = (
        [verdict.harmful if is_safety else verdict.refusal for verdicts in side for verdict in verdicts]
        for side in ([outcome.verdicts for outcome in outcomes], [outcome.second_verdicts for outcome in outcomes])
    )
    names = [f"{outcome.member.name}: {verdict.example}" for outcome in outcomes for verdict in outcome.verdicts]
    return JudgesAgreement(
        benchmark=benchmark,
        split=split,
        finding="harmful" if is_safety else "refusal",
        num_models=len(outcomes),
        **as_plain(agreement(firsts, seconds)._asdict()),
        differ_on=tuple(
            name
            for name, first, second in zip(names, firsts, seconds, strict=True)
            if None not in (first, second) and first != second
        ),
    )


def kept_gain(base: float | None, tuned: float | None, merged: float | None) -> float | None:
    """Return the share of the tuned model's gain in utility that the merged one keeps; `None` if there was no gain."""
    if base is None or tuned is None or merged is None or tuned <= base:
        return None
    return (merged - base) / (tuned - base)


def write_records(run: RunDirectory, outcomes: Outcomes) -> None:
    """Write the units as one view: answers, verdicts and values, in the order of models, benchmarks and splits."""
    views: dict[str, list[str]] = {"completions": [], "verdicts": [], "second_verdicts": [], "values": []}
    for outcome in outcomes.all():
        clusters = dict(zip((e.id for e in outcome.examples), clusters_of(outcome.examples), strict=True))
        asked = {example.id: example.prompt for example in outcome.examples}
        place = {
            "model": outcome.member.name,
            "benchmark": outcome.benchmark.name,
            "kind": outcome.benchmark.kind,
            "split": outcome.split,
        }
        for answer in outcome.completions:
            placed = {**place, "cluster": clusters[answer.example], "question": asked[answer.example]}
            views["completions"].append(_line(placed | json.loads(to_json(answer))))
        for view, verdicts in (("verdicts", outcome.verdicts), ("second_verdicts", outcome.second_verdicts)):
            for verdict in verdicts:
                placed = {**place, "cluster": clusters[verdict.example]}
                views[view].append(_line(placed | json.loads(to_json(verdict))))
        if not outcome.benchmark.is_judged:
            for example, cluster in clusters.items():
                values = {metric: of[example] for metric, of in outcome.values.items() if example in of}
                views["values"].append(_line({**place, "cluster": cluster, "example": example, "values": values}))
    for view, lines in views.items():
        if lines or view in ("completions", "verdicts"):
            write_whole(run.records / f"{view}.jsonl", "".join(lines))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
