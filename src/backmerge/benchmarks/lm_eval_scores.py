"""Turn answers into a harness task's scores, with its own filters, metrics and aggregation."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from backmerge.benchmarks.lm_eval_tasks import templates_compiled_once
from backmerge.benchmarks.scoring import Values
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


def averaged(part: LmEvalPart) -> list[str]:
    """Return metric and filter of everything that the task averages; metrics where higher is better come first."""
    keys = [f"{metric},{of.name}" for of in part.task._filters for metric in part.task.aggregation()]
    return sorted((key for key in keys if _is_averaged(part, key)), key=lambda key: not _is_better_higher(part, key))


def results(
    parts: Sequence[LmEvalPart], groups: Mapping[str, Any], examples: Sequence[Example], responses: Responses
) -> LmEvalResults:
    """Return scores of all of the parts' examples, or of some."""
    values: dict[str, Values] = defaultdict(dict)
    figures: dict[str, dict[str, Any]] = {}
    preferred: set[str] = set()
    for part in parts:
        chosen = [example for example in examples if example.category == part.name]
        if not chosen:
            continue
        measured = _measured(part, chosen, responses)
        figures[part.name] = {
            "sample_len": max((len(found) for found in measured.values()), default=0),
            **{key: _aggregation(part, key)(list(found.values())) for key, found in measured.items()},
        }
        for key, found in measured.items():
            if _is_rate(part, key, found.values()):
                values[key].update({example.id: _known(found.get(example.id)) for example in chosen})
                if _is_better_higher(part, key):
                    preferred.add(key)
    # the harness aggregates groups from their tasks' figures
    figures |= {name: group.aggregate(figures) for name, group in groups.items()}
    return LmEvalResults(
        {key: values[key] for key in sorted(values, key=lambda key: key not in preferred)},
        {
            name: {key: float(value) for key, value in of.items() if "," in key and _is_number(value)}
            for name, of in figures.items()
        },
    )


def _measured(part: LmEvalPart, examples: Sequence[Example], responses: Responses) -> dict[str, dict[str, Any]]:
    """Return metric and filter to each example's value, of any type, as the harness's evaluator collects them."""
    requests = {
        example.id: [
            replace(request, resps=list(given), filtered_resps={})
            for request, given in zip(part.requests[example.id], responses[example.id], strict=True)
        ]
        for example in examples
    }
    kept = part.task.instances
    part.task._instances = [request for of in requests.values() for request in of]
    try:
        part.task.apply_filters()
    finally:
        part.task._instances = kept
    with templates_compiled_once():
        return _collected(part, requests)


def _collected(part: LmEvalPart, requests: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    measured: dict[str, dict[str, Any]] = defaultdict(dict)
    for name in next(iter(requests.values()))[0].filtered_resps:
        for identity, of in requests.items():
            found = part.task.process_results(of[0].doc, [request.filtered_resps[name] for request in of])
            for metric, value in found.items():
                measured[f"{metric},{name}"][identity] = value
    return measured


def _metric(key: str) -> str:
    return key.rpartition(",")[0]


def _aggregation(part: LmEvalPart, key: str) -> Any:
    from lm_eval.api.metrics import mean

    return part.task.aggregation().get(_metric(key), mean)


def _is_better_higher(part: LmEvalPart, key: str) -> bool:
    return bool(part.task.higher_is_better().get(_metric(key), True))


def _is_averaged(part: LmEvalPart, key: str) -> bool:
    from lm_eval.api.metrics import mean, nanmean

    return _aggregation(part, key) in {mean, nanmean}


def _is_rate(part: LmEvalPart, key: str, values: Iterable[Any]) -> bool:
    """Whether the harness averages the values, and they lie in [0, 1]."""
    return _is_averaged(part, key) and all(
        _is_number(value) and (math.isnan(value) or 0 <= value <= 1) for value in values
    )


def _is_number(value: Any) -> bool:
    import numpy as np

    return isinstance(value, int | float | np.number | np.bool_)


def _known(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)
