"""Verdicts on answers: each judge judges each answer to a prompt once; verdicts are stored as units of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from backmerge.errors import RunError
from backmerge.judging.protocol import Judge
from backmerge.measuring.answer import Answered
from backmerge.measuring.usage import Usage
from backmerge.records import Completion, Example, Verdict
from backmerge.runs import RunDirectory, key_of


class Judged(NamedTuple):
    """Answers with the judges' verdicts.

    Attributes:
        verdicts: The judge's verdicts, one for each completion; empty for utility.
        second_verdicts: The second judge's verdicts, if there is one.
    """

    answered: Answered
    verdicts: tuple[Verdict, ...]
    second_verdicts: tuple[Verdict, ...]


class Judges:
    """A judge, and perhaps a second one whose verdicts are shown next to the first one's.

    Args:
        run: Stores the units.
        first: Finds refusals and harm.
        second: Another judge.
        usage: Counts verdicts.
    """

    def __init__(
        self, run: RunDirectory, first: Judge, second: Judge | None = None, usage: Usage | None = None
    ) -> None:
        self.run = run
        self.first = first
        self.second = second
        self.usage = usage if usage is not None else Usage()
        self._judged: dict[tuple[str, str, str], Verdict] = {}

    def need_memory_for(self, answered: Sequence[Answered]) -> bool:
        """Return whether a judge, or a scorer, that holds a model in memory will be asked."""
        is_model = any(judge is not None and judge.holds_model for judge in (self.first, self.second))
        return any(one.benchmark.scorer_asks_judge or (is_model and one.benchmark.is_judged) for one in answered)

    def judge(self, answered: Sequence[Answered]) -> list[Judged]:
        """Return all answers with their verdicts; the same answer to the same prompt is judged only once.

        Raises:
            RunError: a judge gave too few verdicts.
        """
        with self.usage.timed("judging"):
            first = self._verdicts(self.first, answered)
            second = self._verdicts(self.second, answered) if self.second is not None else [() for _ in answered]
        return [Judged(*each) for each in zip(answered, first, second, strict=True)]

    def _verdicts(self, judge: Judge, answered: Sequence[Answered]) -> list[tuple[Verdict, ...]]:
        found: list[tuple[Verdict, ...]] = []
        for one in answered:
            if not one.benchmark.is_judged:
                found.append(())
                continue
            given = one.completions
            key = key_of(one.key, judge.identity)
            by_id = {example.id: example for example in one.examples}
            asked = [by_id[completion.example] for completion in given]
            self.usage.num_verdicts_kept += len(given) if self.run.has_unit("verdicts", key) else 0
            make = partial(self._judge, judge, asked, given)
            verdicts = self.run.unit("verdicts", key, Verdict, make, one.ids if given else ())
            for example, completion, verdict in zip(asked, given, verdicts, strict=True):
                self._judged[_pair(judge, example, completion)] = verdict
            found.append(tuple(verdicts))
        judge.release()
        return found

    def _judge(self, judge: Judge, examples: Sequence[Example], given: Sequence[Completion]) -> list[Verdict]:
        """Return one verdict per completion; the judge is asked only if this run does not have it."""
        pairs = [_pair(judge, example, completion) for example, completion in zip(examples, given, strict=True)]
        # for equal answers to a prompt, only the first is judged
        first = {pair: place for place, pair in reversed(list(enumerate(pairs))) if pair not in self._judged}
        new = sorted(first.values())
        self.usage.num_judged += len(new)
        self.usage.num_judged_once += len(given) - len(new)
        made = judge([examples[place] for place in new], [given[place] for place in new])
        if len(made) != len(new):
            raise RunError(
                f"the judge {judge.name} returned {len(made)} verdicts for {len(new)} completions",
                remedy="a judge must return one verdict for each completion, in order; None for unscored findings.",
            )
        for place, verdict in zip(new, made, strict=True):
            self._judged[pairs[place]] = verdict
        return [
            replace(self._judged[pair], example=completion.example, sample=completion.sample)
            for pair, completion in zip(pairs, given, strict=True)
        ]


def _pair(judge: Judge, example: Example, completion: Completion) -> tuple[str, str, str]:
    asked = key_of([[m.role, m.content] for m in example.messages], dict(example.facts))
    return judge.identity, asked, completion.text
