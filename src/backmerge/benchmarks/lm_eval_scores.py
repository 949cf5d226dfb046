"""Score answers with lm-evaluation-harness's own `evaluate`, which gets them from a model that replays them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from backmerge.benchmarks.lm_eval_tasks import as_the_harness_runs, no_progress_bars
from backmerge.benchmarks.scoring import Values
from backmerge.errors import DataError
from backmerge.generation.protocol import Sampling
from backmerge.records import Example

Responses = Mapping[str, Sequence[Sequence[Any]]]  # example id to each of its requests' answers


class LmEvalResults(NamedTuple):
    """The scores of answers to a task's examples.

    Attributes:
        values: Metric and filter in the harness's form (`exact_match,get-answer`) to each example's value: those that
            the harness averages and that lie in [0, 1]; metrics where higher is better come first.
        figures: Task or group to the harness's own figures, including those that are not averages (F1, BLEU,
            perplexity).
    """

    values: dict[str, Values]
    figures: dict[str, dict[str, float]]


@dataclass(frozen=True)
class LmEvalPart:
    """One task of the harness.

    Attributes:
        name: Its name in the harness.
        task: The `lm_eval.api.task.Task`.
        examples: One for each document. With likelihoods, the context of the document's first request.
        requests: Example id to the harness's requests (`Instance`) for it.
        sampling: How answers are drawn; `None` with likelihoods.
    """

    name: str
    task: Any
    examples: tuple[Example, ...]
    requests: Mapping[str, tuple[Any, ...]]
    sampling: Sampling | None

    @property
    def metrics(self) -> list[str]:
        """Metric and filter of everything that the task averages; metrics where higher is better come first."""
        filters = [one["name"] for one in self.task.config.filter_list or [{"name": "none"}]]
        found = [metric for metric in self.task.aggregation() if self.averages(metric)]
        return [
            f"{metric},{name}"
            for is_better in (True, False)
            for name in filters
            for metric in found
            if self.prefers_more_of(metric) == is_better
        ]

    def averages(self, metric: str) -> bool:
        """Whether the harness averages the metric over the documents, as it does by default."""
        from lm_eval.api.metrics import mean, nanmean

        return self.task.aggregation().get(metric, mean) in {mean, nanmean}

    def prefers_more_of(self, metric: str) -> bool:
        """Whether a higher value is better."""
        return bool(self.task.higher_is_better().get(metric, True))

    def check(self, example: str, document: Any) -> None:
        """Check that the example was made of this document.

        Raises:
            DataError: it was made of another.
        """
        if repr(document) != repr(self.requests[example][0].doc):  # not ==, since NaN is not equal to itself
            raise DataError(
                f"lm-eval's task '{self.name}' reads different documents each time ('{example}' changed), so answers "
                "to earlier prompts cannot be scored",
                remedy="let its process_docs draw from a generator with a seed, or switch the cache of datasets on.",
            )


def results(parts: Sequence[LmEvalPart], groups: Mapping[str, Any], responses: Responses) -> LmEvalResults:
    """Return scores of the examples that have responses.

    Raises:
        DataError: a task's documents are not those that were asked about.
    """
    import lm_eval

    from backmerge.benchmarks.lm_eval_model import Replay

    asked = {part.name: [e.id for e in part.examples if e.id in responses] for part in parts}
    chosen = [part for part in parts if asked[part.name]]
    answers = {
        (part.name, place, request.idx): given  # the harness numbers the documents that it is asked for from 0
        for part in chosen
        for place, name in enumerate(asked[part.name])
        for request, given in zip(part.requests[name], responses[name], strict=True)
    }
    with as_the_harness_runs(), no_progress_bars():
        found = lm_eval.evaluate(
            lm=Replay(answers),
            task_dict={"tasks": {part.name: part.task for part in chosen}, "groups": dict(groups)},
            samples={part.name: [part.requests[name][0].doc_id for name in asked[part.name]] for part in chosen},
            bootstrap_iters=0,
        )
    values: dict[str, Values] = defaultdict(dict)
    preferred: set[str] = set()
    for part in chosen:
        for (metric, filtered), of in _by_metric(part, found["samples"][part.name]).items():
            if part.averages(metric) and all(map(_is_rate, of.values())):
                key = f"{metric},{filtered}"
                values[key].update({name: _known(of.get(name)) for name in asked[part.name]})
                preferred |= {key} if part.prefers_more_of(metric) else set()
    return LmEvalResults(
        {key: values[key] for key in sorted(values, key=lambda key: key not in preferred)},
        {
            name: {key: float(value) for key, value in of.items() if "," in key and _is_number(value)}
            for name, of in found["results"].items()
        },
    )


def _by_metric(part: LmEvalPart, rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return metric and filter to each example's value, of any type, from the harness's log of samples."""
    measured: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    for row in rows:
        name = f"{part.name}/{row['doc_id']}"
        part.check(name, row["doc"])
        for metric in row["metrics"]:
            measured[metric, row["filter"]][name] = row[metric]
    return measured


def _is_number(value: Any) -> bool:
    import numpy as np

    return isinstance(value, int | float | np.number | np.bool_)


def _is_rate(value: Any) -> bool:
    return _is_number(value) and (math.isnan(value) or 0 <= value <= 1)


def _known(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)
