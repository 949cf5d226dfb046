"""Score existing answers: made elsewhere, or by an earlier run, for another judge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

from backmerge import __version__
from backmerge.benchmarks.catalogue import find_benchmark, find_of_any_kind, named
from backmerge.benchmarks.protocol import Kind
from backmerge.config import Document, validated
from backmerge.errors import DataError, RunError
from backmerge.generation.thoughts import Reply, separated
from backmerge.judging.protocol import Judge, JudgeSettings
from backmerge.measuring.answer import Answered, inputs_of
from backmerge.measuring.judge import Judges
from backmerge.measuring.recorded import read_records
from backmerge.measuring.score import Outcome, judge_and_score
from backmerge.outputs import check_apart, paths_read
from backmerge.pipeline.decision import candidate_of, of_kind, verdict_on
from backmerge.pipeline.results import (
    Outcomes,
    common_parts,
    judges_of,
    write_records,
)
from backmerge.planning.points import ALL, BASE, Member, Point
from backmerge.planning.prepare import check_judge, find_judge
from backmerge.planning.settings import EvaluateSettings, Experiment, check_kind, kind_of_run, settings_left
from backmerge.records import Completion, Verdict
from backmerge.registry import Permissions
from backmerge.results import EvaluateResults, RedecidedPoint, Redecision, RestoreResults
from backmerge.rows import sound_rows
from backmerge.runs import RunDirectory, key_of, write_whole
from backmerge.selection import ChoiceSettings, choose

MODEL = "given"  # name of an unknown model


class Answers(NamedTuple):
    """A file of answers.

    Attributes:
        by_example: Example id to its completions.
        lines: Each line as it was, in order.
    """

    by_example: dict[str, list[Completion]]
    lines: list[dict[str, Any]]


def read_answers(path: Path) -> Answers:
    """Read lines of `{"id": ..., "completion": ...}`; other keys are kept, and a repeated id is another sample.

    A reasoning model's thought is in `thought`, or at the completion's beginning, between the marks of its family.

    Raises:
        DataError: a line is not such an object; names it.
    """
    by_example: dict[str, list[Completion]] = {}
    lines: list[dict[str, Any]] = []
    for row in sound_rows(path):
        name, answer = (row.values.get(key) for key in ("id", "completion"))
        if not isinstance(name, str | int) or not isinstance(answer, str):
            raise DataError(
                f"{row.place}: no text under 'id' and 'completion'",
                remedy='write {"id": "HumanEval/0", "completion": "    return x"}.',
            )
        found = by_example.setdefault(str(name), [])
        thought = row.values.get("thought")
        reply = Reply(thought, answer) if isinstance(thought, str) and thought else separated(answer)
        found.append(
            Completion(str(name), "", reply.answer, 0, finished=True, sample=len(found), thought=reply.thought)
        )
        lines.append(dict(row.values))
    if not lines:
        raise DataError(f"{path} contains no answers", remedy="write one answer per line.")
    return Answers(by_example, lines)


def score_answers(
    path: Path,
    benchmark_name: str,
    judge_settings: JudgeSettings,
    directory: Path,
    *,
    kind: Kind | None = None,
    is_partial: bool = False,
    max_unscored: float,
    permissions: Permissions,
) -> EvaluateResults:
    """Score a file of answers to a benchmark's prompts, and write `results.json` as for an evaluation.

    Args:
        path: The answers; see `read_answers`.
        benchmark_name: A name, or a file of prompts.
        judge_settings: The judge of harm and refusals.
        directory: The run directory.
        kind: Kind of a file of prompts; by default utility.
        is_partial: Whether prompts without an answer are omitted, rather than refused.
        max_unscored: Largest share of the answers that may stay unscored.
        permissions: What may be run.

    Raises:
        BackmergeError: a user error.
    """
    check_apart(directory, [path, *paths_read(named(benchmark_name)), *paths_read(judge_settings)])
    answers = read_answers(path)
    fewest = min(map(len, answers.by_example.values()))
    settings = named(benchmark_name).model_copy(update={"num_samples": fewest})
    benchmark = find_of_any_kind(settings, kind or "utility", permissions)
    known = {example.id for example in benchmark.examples}
    unknown = sorted(set(answers.by_example) - known)
    if unknown:
        raise DataError(
            f"{path} answers '{unknown[0]}', which is not a prompt of {benchmark.name}"
            + (f", and {len(unknown) - 1} more" if len(unknown) > 1 else ""),
            remedy=f"the ids of {benchmark.name} are such as '{benchmark.examples[0].id}'.",
        )
    missing = [example.id for example in benchmark.examples if example.id not in answers.by_example]
    if missing and not is_partial:
        raise DataError(
            f"{path} answers {len(known) - len(missing)} of {len(known)} prompts of {benchmark.name}, but not "
            f"'{missing[0]}'",
            remedy="answer them, or give --partial: the scores then only count answered prompts.",
        )
    judge = find_judge(judge_settings, permissions)
    check_judge(judge, [benchmark])
    asked = tuple(example for example in benchmark.examples if example.id in answers.by_example)
    prompts = {example.id: example.prompt for example in asked}
    by_example = {name: [replace(c, prompt=prompts[name]) for c in found] for name, found in answers.by_example.items()}
    completions = [completion for example in asked for completion in by_example[example.id]]
    answered = Answered(Member(MODEL, BASE, None, None), benchmark, "all", asked, completions, key_of(answers.lines))
    run = RunDirectory(directory)
    with run.held():
        settled = {"answers": str(path), "benchmark": benchmark_name, "judge": judge_settings.model_dump(mode="json")}
        inputs = _begin(run, settled, [answered], judge)
        (outcome,) = judge_and_score(Judges(run, judge), [answered], max_unscored)
        write_whole(run.records / "scored.jsonl", "".join(_scored_lines(answers, outcome)))
        return _finish(run, [outcome], judge, str(path), len(missing), inputs)


def judge_again(
    earlier: Path, judge_settings: JudgeSettings, directory: Path, *, max_unscored: float, permissions: Permissions
) -> EvaluateResults:
    """Judge an earlier run's answers with another judge; report where the two agree.

    Raises:
        BackmergeError: the run is damaged or unfinished, or another user error.
    """
    check_apart(directory, [earlier, *paths_read(judge_settings)])
    settings = settings_left(earlier)
    if kind_of_run(settings) == "answers":
        raise RunError(f"{earlier} has scored answers from a file", remedy="give that file with --benchmark.")
    judged = {**settings.get("evaluate", {}), "utility": [], "keep": []}
    document = Document(str(earlier / "experiment.yaml"), judged, {})
    asked = validated(EvaluateSettings, document).benchmarks
    benchmarks = {b.name: b for b in (find_benchmark(named, kind, permissions) for kind, _, named in asked)}
    judge = find_judge(judge_settings, permissions)
    found = RestoreResults.read(earlier) if kind_of_run(settings) == "experiment" else None
    points = {} if found is None else _points_of(found)
    choice = None if found is None else validated(Experiment, Document(document.source, settings, {})).choice
    answered: list[Answered] = []
    before: list[tuple[Verdict, ...]] = []
    for recorded in read_records(earlier):
        if recorded.kind in ("utility", "keep"):
            continue
        benchmark = benchmarks.get(recorded.benchmark)
        if benchmark is None:
            raise RunError(
                f"{earlier} has answers to {recorded.benchmark}, which is no longer among its benchmarks",
                remedy="restore the earlier data, or evaluate again.",
            )
        point, tuned = _place_of(recorded.model, points, earlier)
        answered.append(recorded.as_answered(Member(recorded.model, point, tuned, None), benchmark))
        before.append(tuple(recorded.verdicts))
    if not answered:
        raise RunError(f"{earlier} has no answers for a judge", remedy="give a run with safety benchmarks.")
    check_judge(judge, [one.benchmark for one in answered])
    run = RunDirectory(directory)
    with run.held():
        settled = {"answers": str(earlier), "judge": judge_settings.model_dump(mode="json")}
        inputs = _begin(run, settled, answered, judge)
        scored = judge_and_score(Judges(run, judge), answered, max_unscored)
        outcomes = [replace(one, second_verdicts=first) for one, first in zip(scored, before, strict=True)]
        decision = None
        if found is not None and found.has_safety and choice is not None:
            decision = _decide(found, choice, outcomes)
        return _finish(run, outcomes, judge, str(earlier), 0, inputs, decision)


def _place_of(model: str, points: Mapping[str, tuple[Point, str | None]], earlier: Path) -> tuple[Point, str | None]:
    """Return the point of a model in the records, and its tuned model; any model of a run without points is a base."""
    if not points:
        return BASE, None
    if model not in points:
        raise RunError(
            f"{earlier} has answers of {model}, which is not among the points of its results",
            remedy="run its command again with the same --out: it writes the results again from its answers.",
        )
    return points[model]


def _points_of(found: RestoreResults) -> dict[str, tuple[Point, str | None]]:
    """Return the point and the tuned model of each model of a run, by its name in the records."""
    points: dict[str, tuple[Point, str | None]] = {"base": (BASE, None)}
    names = [row.name for row in found.tuned]
    for row in found.points:
        point = Point(row.point, row.role, row.series, row.lam)
        points |= {f"{point.name}/{name}": (point, name) for name in [*names, ALL]}
    return points


def _decide(found: RestoreResults, choice: ChoiceSettings, outcomes: Sequence[Outcome]) -> Redecision:
    """Return the new judge's verdict on the merge that the run confirmed, and its own choice of λ.

    Utilities are those of the run: they need no judge. Nothing is generated, so a λ that the new judge would choose
    instead is named, but not confirmed.
    """
    together = Outcomes()
    for outcome in outcomes:
        together.add(outcome)
    benchmarks = list({outcome.benchmark.name: outcome.benchmark for outcome in outcomes}.values())
    primary = {row.name: row.metric for row in found.benchmarks if row.kind == "utility"}
    utilities: dict[str, list[float]] = {}
    for row in found.summary:
        if row.split == "selection" and primary.get(row.benchmark) == row.metric and row.mean is not None:
            utilities.setdefault(row.point, []).append(row.mean)
    candidates = [
        candidate_of(benchmarks, together, point, point.series)._replace(
            utility=fmean(utilities[point.name]) if point.name in utilities else None
        )
        for point in {point.name: point for point, _ in _points_of(found).values()}.values()
        if point.role != "base"
    ]
    chosen = found.choice.point
    safety = of_kind(benchmarks, "safety")
    concluded = None
    if chosen is not None and together.has_difference(chosen, BASE.name, safety, "confirmation", "asr"):
        concluded = verdict_on(together, chosen, safety, "confirmation", choice.margin)
        if concluded.verdict == "restored" and not all(loss.is_kept for loss in found.confirmation.losses):
            concluded = concluded._replace(verdict="not shown")  # losses need no judge
    return Redecision(
        point=chosen,
        margin=choice.margin,
        verdict="not shown" if concluded is None else concluded.verdict,
        earlier_verdict=found.confirmation.verdict,
        asr_difference=None if concluded is None else concluded.asr_difference,
        chosen_by_this_judge=choose(candidates, choice).point,
        candidates=tuple(
            RedecidedPoint(point=c.point, lam=c.lam, utility=c.utility, asr_difference=c.asr_difference)
            for c in candidates
            if c.asr_difference is not None
        ),
    )


def _begin(
    run: RunDirectory, settings: Mapping[str, Any], answered: Sequence[Answered], judge: Judge
) -> dict[str, Any]:
    """Write the settings; return the hashes of everything that the scores depend on."""
    check_kind(run.path, "answers")
    inputs = inputs_of(dict(settings), answered, [judge], "given")
    run.begin(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True), inputs)
    return inputs


def _finish(
    run: RunDirectory,
    outcomes: Sequence[Outcome],
    judge: Judge,
    source: str,
    num_missing: int,
    inputs: Mapping[str, Any],
    decision: Redecision | None = None,
) -> EvaluateResults:
    together = Outcomes()
    for outcome in outcomes:
        together.add(outcome)
    write_records(run, together)
    results = EvaluateResults(
        kind="score",
        backmerge=__version__,
        model=source,
        inputs=inputs,
        environment={"engine": "given"},
        **judges_of(judge, None),
        num_unanswered=num_missing,
        decision=decision,
        **common_parts(together),
    )
    results.write(run.path)
    return results


def _scored_lines(answers: Answers, outcome: Outcome) -> list[str]:
    """Return each line of the file unchanged, with its findings added."""
    verdicts = {(v.example, v.sample): v for v in outcome.verdicts}
    counted: dict[str, int] = {}
    lines = []
    for values in answers.lines:
        name = str(values["id"])
        sample = counted[name] = counted.get(name, -1) + 1
        found: dict[str, Any] = {"scores": {metric: by[name] for metric, by in outcome.values.items()}}
        if (name, sample) in verdicts:
            verdict = verdicts[name, sample]
            found["verdict"] = {"harmful": verdict.harmful, "refusal": verdict.refusal, "reason": verdict.reason}
        lines.append(json.dumps({**values, **found}, ensure_ascii=False) + "\n")
    return lines


def is_run(path: Path) -> bool:
    """Return whether a path is an earlier run."""
    return path.is_dir() and (path / "experiment.yaml").is_file()
