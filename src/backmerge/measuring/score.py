"""Score judged answers: a value for each example and metric, and their rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from backmerge.benchmarks.protocol import Benchmark
from backmerge.benchmarks.scoring import Values, over_refusal_values, safety_values, score
from backmerge.errors import RunError
from backmerge.measuring.answer import Answered, values_by_metric
from backmerge.measuring.judge import Judged, Judges
from backmerge.merging.served import Realisation
from backmerge.planning.points import Member
from backmerge.records import Completion, Example, Score, Value, Verdict
from backmerge.runs import key_of

REFUSALS = ("non_refusal", "over_refusal")  # metrics that depend on refusals only


@dataclass(frozen=True)
class Outcome:
    """The result of one model on one benchmark's split.

    Attributes:
        completions: In the order of the examples, each one's samples in a row; empty for benchmarks that compare
            likelihoods.
        verdicts: The judge's verdicts, one for each completion; empty for utility.
        second_verdicts: The second judge's verdicts, if there is one.
        values: Each example's value by metric.
        realisation: How the model was measured; `None` for answers from a file.
    """

    member: Member
    benchmark: Benchmark
    split: str
    examples: tuple[Example, ...]
    completions: tuple[Completion, ...]
    verdicts: tuple[Verdict, ...]
    second_verdicts: tuple[Verdict, ...]
    values: Mapping[str, Values]
    realisation: Realisation | None = None

    @property
    def scores(self) -> list[Score]:
        """The scores, one for each metric."""
        return [
            score(self.member.name, self.benchmark.name, self.split, metric, self.examples, values)
            for metric, values in self.values.items()
        ]


def judge_and_score(
    judges: Judges, answered: Sequence[Answered], max_unscored: float, *, is_partial: bool = False
) -> list[Outcome]:
    """Judge and score whatever is not done yet.

    Args:
        judges: Find refusals and harm; the values are those of the first judge.
        answered: Answers from engines, earlier runs or files.
        max_unscored: Largest share of a benchmark that may stay unscored.
        is_partial: Whether these are parts of benchmarks, too small to check how many stay unscored.

    Raises:
        RunError: the judge left too many answers unscored.
    """
    outcomes = [score_judged(judges, judged) for judged in judges.judge(answered)]
    for outcome in () if is_partial else outcomes:
        _check_unscored(outcome, judges, max_unscored)
    return outcomes


def score_judged(judges: Judges, judged: Judged) -> Outcome:
    """Score one model's judged answers on one benchmark's split."""
    answered = judged.answered
    with judges.usage.timed("scoring"):
        values = _values(judges, answered, judged.verdicts)
    return Outcome(
        answered.member,
        answered.benchmark,
        answered.split,
        tuple(answered.examples),
        tuple(answered.completions),
        judged.verdicts,
        judged.second_verdicts,
        values,
        answered.realisation,
    )


def _values(judges: Judges, answered: Answered, verdicts: Sequence[Verdict]) -> Mapping[str, Values]:
    if answered.likelihoods is not None:
        return answered.likelihoods
    if answered.benchmark.kind == "safety":
        return safety_values(verdicts, judges.first)
    if answered.benchmark.kind == "over_refusal":
        return over_refusal_values(verdicts)
    scorer = answered.benchmark.scorer
    assert scorer is not None

    def make() -> Iterator[Value]:
        samples: dict[str, list[str]] = {example.id: [] for example in answered.examples}
        for completion in answered.completions:
            samples[completion.example].append(completion.text)
        table = scorer(answered.examples, list(samples.values()), lambda _: None)
        for metric, values in table.items():
            for example, value in zip(answered.examples, values, strict=True):
                yield Value(example.id, metric, value)

    key = key_of(answered.key, answered.benchmark.scored_by)
    return values_by_metric(judges.run.unit("values", key, Value, make, answered.ids))


def _check_unscored(outcome: Outcome, judges: Judges, max_unscored: float) -> None:
    """Check that few enough of a benchmark's answers stayed unscored."""
    is_judged = outcome.benchmark.is_judged
    for metric, values in outcome.values.items():
        unscored, of = sum(value is None for value in values.values()), len(values)
        if is_judged and len(outcome.verdicts) > of:  # with several samples per prompt, each of them counts
            of = len(outcome.verdicts)
            unscored = sum(v.refusal is None if metric in REFUSALS else v.harmful is None for v in outcome.verdicts)
        if unscored > max_unscored * of:
            who = f"the judge {judges.first.name}" if is_judged else f"the metric {metric}"
            raise RunError(
                f"{who} could not score {unscored} of {of} answers of {outcome.member.name} on "
                f"{outcome.benchmark.name} ({metric}), more than the {max_unscored:.0%} allowed: its rates "
                "would not be reliable",
                remedy=f"look at the verdicts and values in {judges.run.units}, use another judge, or raise "
                "evaluate.max_unscored.",
            )
