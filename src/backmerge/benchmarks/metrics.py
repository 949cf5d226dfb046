"""Scorers: functions of single answers, and functions of many answers at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from backmerge.benchmarks.protocol import Metric, Scorer, ScoreTable
from backmerge.records import Example

if TYPE_CHECKING:
    from backmerge.benchmarks.bertscore import BertScorer
import math


class PerAnswer:
    """Functions of (example, answer); the mean if there are several samples.

    Args:
        functions: Name to function; decisions use the first.
        identity: Changes whenever the functions do.
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
        """Return each function's mean over the samples."""
        return {
            name: [fmean(function(e, answer) for answer in found) for e, found in zip(examples, answers, strict=True)]
            for name, function in self._functions.items()
        }


class BertScoreF1:
    """BERTScore's F1 against the reference; the mean if there are several samples."""

    metrics = ("bertscore_f1",)

    def __init__(self, scorer: BertScorer) -> None:
        self._scorer = scorer

    @property
    def identity(self) -> str:
        """The encoder's identity."""
        return self._scorer.identity

    def __call__(
        self, examples: Sequence[Example], answers: Sequence[Sequence[str]], advance: Callable[[int], None]
    ) -> ScoreTable:
        """Score all answers together, equal texts once."""
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
        """The metrics of all scorers."""
        return tuple(name for scorer in self._scorers for name in scorer.metrics)

    @property
    def identity(self) -> str:
        """The identities of all scorers."""
        return "+".join(scorer.identity for scorer in self._scorers)

    def __call__(
        self, examples: Sequence[Example], answers: Sequence[Sequence[str]], advance: Callable[[int], None]
    ) -> ScoreTable:
        """Run the scorers one after the other."""
        table: ScoreTable = {}
        for scorer in self._scorers:
            table.update(scorer(examples, answers, advance))
        return table


KS = (1, 10, 100)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """1 − C(n − c, k) / C(n, k): the unbiased estimate of the probability that one of k samples is right.

    Computed as (C(n, k) − C(n − c, k)) / C(n, k) in integers, rounded once at the end; the published code multiplies up
    to c rounded factors and subtracts from 1.

    Args:
        num_samples: n, at least k.
        num_right: c, from 0 to n.
        k: At least 1.

    Returns:
        In [0, 1]; 0 only if no sample is right.

    Raises:
        ValueError: the three do not fit together. There is no unbiased estimate for k > n.

    Source: Chen et al. (2021), arXiv 2107.03374, equation 1.
    """
    if not (1 <= k <= num_samples and 0 <= num_right <= num_samples):
        raise ValueError(f"pass@{k} is not defined for {num_right} right among {num_samples} samples")
    all_draws = math.comb(num_samples, k)
    return (all_draws - math.comb(num_samples - num_right, k)) / all_draws


def pass_at_ks(is_right: Sequence[bool], ks: Sequence[int] = KS) -> dict[str, float]:
    """Return `{"pass@1": ..., "pass@10": ...}` of one problem's samples, for each k with enough samples."""
    return {f"pass@{k}": pass_at_k(len(is_right), sum(is_right), k) for k in ks if k <= len(is_right)}
