"""Use a harness task as one of our benchmarks: `lm-eval:TASK` for any TASK of the harness.

Worked example: `lm-eval:gsm8k` asks 1,319 questions with five worked shots as turns, and computes
`exact_match,strict-match` and `exact_match,flexible-extract` of each; λ is chosen on the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from backmerge.benchmarks.lm_eval_bridge import LmEvalTask, load_lm_eval_task
from backmerge.benchmarks.lm_eval_scores import LmEvalResults
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, ScoreTable, options_of
from backmerge.errors import ConfigError, DataError
from backmerge.generation.protocol import LogLikelihood
from backmerge.outputs import digest_of
from backmerge.records import Example
from backmerge.registry import NOTHING_ALLOWED, Permissions, closest
from backmerge.runs import key_of

CODE = frozenset({".yaml", ".yml", ".py"})  # what a task file consists of


@dataclass(frozen=True)
class LmEvalScorer:
    """Values by the task's own filters and metrics.

    Attributes:
        task: The task whose answers are scored.
        metrics: Names in the harness's form, such as `exact_match,get-answer`; decisions use the first.
    """

    task: LmEvalTask
    metrics: tuple[str, ...]

    @property
    def identity(self) -> str:
        """The versions of harness and tasks, and how the tasks are asked."""
        return key_of(self.task.name, dict(self.task.identity))

    def __call__(
        self, examples: Sequence[Example], answers: Sequence[Sequence[str]], advance: Callable[[int], None]
    ) -> ScoreTable:
        """Return a value for each example and metric; the mean if there are more answers than the task itself needs.

        Raises:
            DataError: a metric's values are not rates, or there are too few answers.
        """
        size = self.task.sampling.num_samples
        rounds = max(1, min((len(given) for given in answers), default=0) // size)
        found = [
            _table(self.task.score_answers(examples, [given[i::rounds] for given in answers]), self.metrics, examples)
            for i in range(rounds)
        ]
        advance(len(examples))
        return {
            metric: [_mean(values) for values in zip(*(table[metric] for table in found), strict=True)]
            for metric in self.metrics
        }


@dataclass(frozen=True)
class LmEvalChoices:
    """Values by the likelihoods of the task's continuations.

    Attributes:
        task: The task whose continuations are compared.
        metrics: Names in the harness's form, such as `acc,none`.
    """

    task: LmEvalTask
    metrics: tuple[str, ...]

    def pairs(self, tokenizer: Any, examples: Sequence[Example]) -> list[tuple[str, str]]:
        """Return contexts, rendered once, and continuations, those of all examples in a row."""
        return self.task.pairs(tokenizer, examples)

    def score(self, examples: Sequence[Example], found: Sequence[LogLikelihood]) -> ScoreTable:
        """Return a value for each example and metric, from the likelihoods of its pairs.

        Raises:
            DataError: a metric's values are not rates.
        """
        return _table(self.task.score_likelihoods(examples, found), self.metrics, examples)


def lm_eval(settings: BenchmarkSettings, permissions: Permissions = NOTHING_ALLOWED) -> Benchmark:
    """Return the harness's task in the name, such as `lm-eval:gsm8k`; `data` is a task file of the user's own.

    Options: `as_turns` (whether shots are turns of the conversation; true, the harness's default today), `is_chat`
    (whether the chat template is applied; true), `num_fewshot` (the task's own), `limit` (documents of each task; all).
    `metrics` selects some of those that the task averages, in the harness's form: `exact_match,strict-match`.

    Raises:
        ConfigError: unknown task, metric or option; lm-eval is missing or old; or a task file needs permission.
        DataError: the task's data is not available, or the task is of a kind that is not supported.
    """
    options = options_of(settings, {"as_turns": True, "is_chat": True, "num_fewshot": None, "limit": None})
    task = load_lm_eval_task(
        settings.name.removeprefix("lm-eval:"),
        system=settings.system or None,
        task_path=None if settings.data is None else Path(settings.data).expanduser(),
        permissions=permissions,
        **options,
    )
    made = as_benchmark(settings.name, task, settings.metrics)
    return made if settings.data is None else replace(made, code=_code_of(Path(settings.data).expanduser()))


def _code_of(place: Path) -> str:
    """Return a hash of the user's task files and of the code next to them, which they may name."""
    folder, below = (place, "**/*") if place.is_dir() else (place.parent, "*")
    files = sorted(file for file in folder.glob(below) if file.suffix in CODE and file.is_file())
    return key_of([[str(file.relative_to(folder)), digest_of(file)] for file in files])


def as_benchmark(name: str, task: LmEvalTask, metrics: Sequence[str] = ()) -> Benchmark:
    """Return the task as a benchmark of utility, with the requested metrics or all that each of its tasks averages.

    Raises:
        ConfigError: a requested metric is not one that the task averages.
        DataError: the task averages none, its tasks are asked in different ways, or their documents change.
    """
    task.check_documents()
    unknown = next((metric for metric in metrics if metric not in task.metrics), None)
    if unknown is not None:
        raise ConfigError(
            f"'{name}' has no metric '{unknown}' that it averages{closest(unknown, task.metrics)}",
            remedy=f"known metrics: {', '.join(task.metrics) or 'none'}.",
        )
    chosen = tuple(metrics) or task.metrics
    if not chosen:
        raise DataError(
            f"'{name}' has no metric that is averaged over its documents, so there is no rate to compare models by",
            remedy="use one of its tasks, or another task.",
        )
    scorer = LmEvalScorer(task, chosen)
    if task.wants_likelihoods:
        return Benchmark(name, "utility", task.examples, 1, scorer, choices=LmEvalChoices(task, chosen))
    # sets all fields: greedy is the task's own choice, not only the default here
    sampling = task.sampling.model_dump(exclude={"max_new_tokens", "seed"})
    return Benchmark(name, "utility", task.examples, task.sampling.max_new_tokens, scorer, sampling)


def _table(found: LmEvalResults, metrics: Sequence[str], examples: Sequence[Example]) -> ScoreTable:
    odd = next((metric for metric in metrics if metric not in found.values), None)
    if odd is not None:
        raise DataError(
            f"lm-eval's metric '{odd}' has values outside [0, 1], which are not rates",
            remedy=f"list the metrics to use; these are rates: {', '.join(found.values) or 'none'}.",
        )
    return {metric: [found.values[metric].get(example.id) for example in examples] for metric in metrics}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
