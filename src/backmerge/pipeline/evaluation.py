"""Answers, verdicts and values of one model on one benchmark, each kept as a unit of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from backmerge.benchmarks.protocol import Benchmark
from backmerge.benchmarks.scoring import Values, over_refusal_values, safety_values, score, utility_values
from backmerge.errors import RunError
from backmerge.generation.protocol import Generator, Sampling
from backmerge.judging.protocol import Judge
from backmerge.pipeline.points import Member
from backmerge.records import Completion, Example, Score, Verdict, to_json
from backmerge.runs import RunDirectory, key_of


@dataclass(frozen=True)
class Outcome:
    """What one model did on one benchmark's split.

    Attributes:
        values: Metric to each example's value.
        verdicts: Empty for utility.
    """

    member: Member
    benchmark: Benchmark
    split: str
    examples: tuple[Example, ...]
    completions: tuple[Completion, ...]
    verdicts: tuple[Verdict, ...]
    values: Mapping[str, Values]

    @property
    def scores(self) -> list[Score]:
        """One score per metric."""
        return [
            score(self.member.name, self.benchmark.name, self.split, metric, self.examples, values)
            for metric, values in self.values.items()
        ]


class Evaluator:
    """Measures models, and never the same one twice: what is in the run's units is read from there.

    Args:
        run: Where units are kept.
        engine: Answers prompts.
        judge: Finds refusals and harm.
        sampling: How answers are drawn.
        max_unscored: Share of a benchmark that the judge may leave unscored.
    """

    def __init__(
        self, run: RunDirectory, engine: Generator, judge: Judge, sampling: Sampling, max_unscored: float
    ) -> None:
        self.run = run
        self.engine = engine
        self.judge = judge
        self.sampling = sampling
        self.max_unscored = max_unscored
        self.num_generated = 0

    def evaluate(
        self,
        member: Member,
        benchmark: Benchmark,
        split: str,
        examples: Sequence[Example],
        advance: Callable[[int], None],
    ) -> Outcome:
        """Generate, judge and value, as far as it is not done yet.

        Raises:
            RunError: the judge left too many answers unscored.
        """
        limit = min(self.sampling.max_new_tokens, benchmark.max_new_tokens)
        sampling = self.sampling.model_copy(update={"max_new_tokens": limit})
        asked = key_of([to_json(example) for example in examples])
        key = key_of(member.variant.identity, self.engine.identity, sampling.model_dump(), asked)
        if self.run.has_unit("completions", key):
            advance(len(examples))
        else:
            self.num_generated += len(examples)
        completions = self.run.unit(
            "completions",
            key,
            Completion,
            lambda: self.engine.generate(member.variant, examples, sampling, advance),
        )
        verdicts: list[Verdict] = []
        if benchmark.kind == "utility":
            values = utility_values(benchmark, examples, completions)
        else:
            judged = key_of(key, self.judge.identity)
            verdicts = self.run.unit("verdicts", judged, Verdict, lambda: self.judge(examples, completions))
            values = safety_values(verdicts) if benchmark.kind == "safety" else over_refusal_values(verdicts)
        outcome = Outcome(member, benchmark, split, tuple(examples), tuple(completions), tuple(verdicts), values)
        self._check_unscored(outcome)
        return outcome

    def _check_unscored(self, outcome: Outcome) -> None:
        for metric, values in outcome.values.items():
            unscored = sum(value is None for value in values.values())
            if unscored > self.max_unscored * len(values):
                raise RunError(
                    f"the judge {self.judge.name} gave no usable answer for {unscored} of {len(values)} completions of "
                    f"{outcome.member.name} on {outcome.benchmark.name} ({metric}), more than the "
                    f"{self.max_unscored:.0%} allowed: its rates would mean little",
                    remedy="look at records/verdicts.jsonl, take another judge, or raise choice.max_unscored.",
                )
