"""BIG-Bench Hard: 27 reasoning tasks, asked with three worked shots each, through lm-evaluation-harness.

Data: `SaylorTwift/bbh` on the hub, or the authors' own JSON files (suzgunmirac/BIG-Bench-Hard, MIT), from Suzgun et al.
(arXiv 2210.09261): 6,511 rows of `input` and `target`, 250 for most tasks. The task is the harness's `bbh_cot_fewshot`,
whose files contain the shots.

Worked example: "not ( True ) and ( True ) is" after three shots; an answer that ends with "So the answer is False." is
right. The harness takes the text after the first "the answer is " on its line, without the line's last character: an
answer without a full stop loses its last letter and is wrong. Answers end at an empty line, and at any capital Q, which
would start the next question.

Two figures: the mean over rows, which the harness reports for the group, and the mean over tasks, which papers report.
They differ, since three tasks have fewer rows.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from backmerge.benchmarks.lm_eval_benchmark import as_benchmark
from backmerge.benchmarks.lm_eval_bridge import LmEvalTask, load_lm_eval_task
from backmerge.benchmarks.lm_eval_tasks import Rows
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, options_of
from backmerge.errors import DataError
from backmerge.records import Example
from backmerge.statistics import wilson

NEEDS = "pip install 'backmerge[lm-eval]'; the hub, or bbh=FOLDER"

GROUP = "bbh_cot_fewshot"
METRIC = "exact_match,get-answer"
TASKS = (
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
)


class TaskMean(NamedTuple):
    """The mean over tasks, with equal weights.

    Attributes:
        value: In [0, 1].
        low, high: 95 % interval: Wilson's, at the effective size.
        n: Rows.
        n_effective: T² / Σ 1/n_t over the T tasks' sizes: the number of rows that the mean is worth if tasks are
            equally difficult; otherwise it is worth at least that.
        num_tasks: T.
    """

    value: float
    low: float
    high: float
    n: int
    n_effective: float
    num_tasks: int


def bbh(settings: BenchmarkSettings) -> Benchmark:
    """Return the 27 tasks as one benchmark; scores report the mean over rows, and that over tasks as `category_mean`.

    Options: `as_turns` (whether the shots are turns of the conversation; true), `is_chat` (true), `limit` (rows of each
    task).

    Raises:
        ConfigError: lm-eval is missing or old, or an option is unknown.
        DataError: see `bbh_task`.
    """
    path = None if settings.data is None else Path(settings.data).expanduser()
    options = options_of(settings, {"as_turns": True, "is_chat": True, "limit": None})
    return as_benchmark("bbh", bbh_task(path, system=settings.system, **options))


def bbh_task(
    path: Path | None = None,
    *,
    as_turns: bool = True,
    is_chat: bool = True,
    system: str | None = None,
    limit: int | None = None,
) -> LmEvalTask:
    """Return BIG-Bench Hard's 27 tasks, with three shots each.

    Args:
        path: A folder with the authors' 27 JSON files, or one that contains it as `bbh`; from the hub by default.
        as_turns: Whether the shots are turns of the conversation, the harness's default today, or in one turn with the
            question, as in the harness at the time of the paper. The paper does not say which.
        is_chat: Whether the chat template is applied; otherwise the prompt is the plain text for a base model.
        system: A system message, before each task's description.
        limit: Only the first rows of each task.

    Raises:
        ConfigError: lm-eval is missing or old.
        DataError: the hub cannot be reached, or a file is missing or damaged.
    """
    rows = None if path is None else {f"{GROUP}_{task}": _rows(path, task) for task in TASKS}
    try:
        return load_lm_eval_task(GROUP, as_turns=as_turns, is_chat=is_chat, system=system, limit=limit, rows=rows)
    except DataError as error:
        if path is not None:
            raise
        raise DataError(
            error.message, remedy="give the folder of the authors' JSON files (suzgunmirac/BIG-Bench-Hard)."
        ) from error


def task_mean(examples: Sequence[Example], values: Mapping[str, float | None]) -> TaskMean:
    """Return the mean over tasks of each task's mean, from values by example id; `None` values are ignored.

    Raises:
        DataError: a task has no value at all.
    """
    by_task: dict[str, list[float]] = defaultdict(list)
    for example in examples:
        known = by_task[example.category or ""]
        value = values[example.id]
        if value is not None:
            known.append(value)
    empty = sorted(task for task, known in by_task.items() if not known)
    if empty or not by_task:
        raise DataError(f"no answer of {', '.join(empty) or 'any task'} was scored, so there is no mean over tasks")
    mean = fmean(fmean(known) for known in by_task.values())
    size = len(by_task) ** 2 / sum(1 / len(known) for known in by_task.values())
    low, high = wilson(mean * size, size)
    return TaskMean(mean, low, high, sum(map(len, by_task.values())), size, len(by_task))


def _rows(path: Path, task: str) -> Rows:
    """Read a task's rows from the authors' file.

    Raises:
        DataError: the file is missing, or does not have the form `{"examples": [{"input": ..., "target": ...}]}`.
    """
    folder = path / "bbh" if (path / "bbh").is_dir() else path
    file = folder / f"{task}.json"
    try:
        read: Any = json.loads(file.read_text(encoding="utf-8"))
        rows = [{"input": row["input"], "target": row["target"]} for row in read["examples"]]
    except OSError as error:
        raise DataError(
            f"BBH's file cannot be read: {error}",
            remedy="give the folder of the authors' 27 JSON files (suzgunmirac/BIG-Bench-Hard).",
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f'{file} does not have the form {{"examples": [{{"input": ..., "target": ...}}]}}: {error!r}',
            remedy="use the file as its authors published it.",
        ) from error
    if not rows or not all(isinstance(text, str) for row in rows for text in row.values()):
        raise DataError(f"{file} has no rows, or a row whose input or target is not a text")
    return {"test": rows}
