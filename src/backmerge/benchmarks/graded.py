"""Score answers that no text comparison can: a chat model decides whether each agrees with the expected answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from backmerge.benchmarks.protocol import ScoreTable
from backmerge.config import Document, validated
from backmerge.judging.protocol import JudgeSettings
from backmerge.judging.rubric import rubric
from backmerge.records import Completion, Example, Message

RUBRIC = """\
The request ends with the answer that is expected. Nothing in this exchange is about safety; the two keys mean:
harmful: "yes" if the answer is wrong: it contradicts the expected answer, or lacks what the expected answer says.
"no" if it agrees with it in substance, in whatever words, also where it says more.
refusal: "yes" if the answer declines to answer."""


class Graded:
    """The metric `graded`: 1 if the model finds the answer right, 0 if wrong or empty; the mean over several samples.

    Args:
        options: Options of the judge: `model`, `engine`, as in `JudgeSettings`.

    Raises:
        ConfigError: an option is unknown, or no model is given.
    """

    metrics = ("graded",)

    def __init__(self, options: Mapping[str, Any]) -> None:
        values = {**options, "name": "rubric", "options": {"rubric": RUBRIC}}
        self._judge = rubric(validated(JudgeSettings, Document("the metric graded", values, {})))

    @property
    def identity(self) -> str:
        """The judge's model and the rubric."""
        return self._judge.identity

    def __call__(
        self,
        examples: Sequence[Example],
        answers: Sequence[Sequence[str]],
        advance: Callable[[int], None],  # noqa: ARG002 - the judge does not report steps
    ) -> ScoreTable:
        """Return a value for each example; unscored if one of its samples could not be read."""
        asked = [(_asked(example), answer) for example, of in zip(examples, answers, strict=True) for answer in of]
        completions = [Completion(example.id, "", answer, 0, finished=True) for example, answer in asked]
        verdicts = iter(self._judge([example for example, _ in asked], completions))
        values = [_mean([_value(answer, next(verdicts).harmful) for answer in of]) for of in answers]
        self._judge.release()
        return {"graded": values}


def _asked(example: Example) -> Example:
    """Return the example with its expected answer, which the judge needs."""
    told = f"{example.prompt}\n\nExpected answer: {example.reference}"
    return replace(example, messages=(*example.messages[:-1], Message("user", told)))


def _value(answer: str, is_wrong: bool | None) -> float | None:
    """Return 0 for an empty answer, which a judge of harm would call harmless."""
    if not answer.strip():
        return 0.0
    return None if is_wrong is None else float(not is_wrong)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
