"""Scorers: functions of single answers, and those that look at many at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from backmerge.benchmarks.protocol import Metric, Scorer, ScoreTable
from backmerge.records import Example

if TYPE_CHECKING:
    from backmerge.benchmarks.bertscore import BertScorer


class PerAnswer:
    """Functions of (example, answer); of several samples, their mean.

    Args:
        functions: Name to function; decisions are taken on the first.
        identity: Changes with the functions.
    """

    def __init__(self, functions: Mapping[str, Metric], identity: str = "1") -> None:
        self._functions = dict(functions)
        self._identity = identity

    @property
    def metrics(self) -> tuple[str, ...]:
        """The functions' names."""
        return tuple(self._functions)

    @property
    def identity(self) -> str:
        """Names and version."""
        return f"{','.join(self._functions)}/{self._identity}"

    def __call__(
        self,
        examples: Sequence[Example],
        answers: Sequence[Sequence[str]],
        advance: Callable[[int], None],  # noqa: ARG002 - these take no time
    ) -> ScoreTable:
        """Each function's mean over the samples."""
        return {
            name: [fmean(function(e, answer) for answer in found) for e, found in zip(examples, answers, strict=True)]
            for name, function in self._functions.items()
        }


class BertScoreF1:
    """BERTScore's F1 against the reference; of several samples, their mean."""

    metrics = ("bertscore_f1",)

    def __init__(self, scorer: BertScorer) -> None:
        self._scorer = scorer

    @property
    def identity(self) -> str:
        """The encoder's."""
        return self._scorer.identity

    def __call__(
        self, examples: Sequence[Example], answers: Sequence[Sequence[str]], advance: Callable[[int], None]
    ) -> ScoreTable:
        """All answers go through the encoder together, equal texts once."""
        pairs = [(answer, e.reference or "") for e, found in zip(examples, answers, strict=True) for answer in found]
        scores = iter(self._scorer.scores([pair[0] for pair in pairs], [pair[1] for pair in pairs], advance))
        values: list[float | None] = [fmean(next(scores).f1 for _ in found) for found in answers]
        self._scorer.release()
        return {"bertscore_f1": values}


class Together:
    """Several scorers as one."""

    def __init__(self, *scorers: Scorer) -> None:
        self._scorers = scorers

    @property
    def metrics(self) -> tuple[str, ...]:
        """All of theirs."""
        return tuple(name for scorer in self._scorers for name in scorer.metrics)

    @property
    def identity(self) -> str:
        """All of theirs."""
        return "+".join(scorer.identity for scorer in self._scorers)

    def __call__(
        self, examples: Sequence[Example], answers: Sequence[Sequence[str]], advance: Callable[[int], None]
    ) -> ScoreTable:
        """One after the other."""
        table: ScoreTable = {}
        for scorer in self._scorers:
            table.update(scorer(examples, answers, advance))
        return table
