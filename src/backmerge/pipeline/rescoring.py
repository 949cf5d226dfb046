"""Score existing answers: made elsewhere, or by an earlier run, for another judge."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from backmerge import __version__
from backmerge.benchmarks.catalogue import find_benchmark, find_of_any_kind, named
from backmerge.benchmarks.protocol import Benchmark, Kind, ScoreTable
from backmerge.benchmarks.scoring import primary_metric
from backmerge.config import Document, validated
from backmerge.errors import DataError, RunError
from backmerge.generation.thoughts import Reply, separated
from backmerge.judging.protocol import Judge, JudgeSettings
from backmerge.measuring.answer import Answered, inputs_of
from backmerge.measuring.judge import Judges
from backmerge.measuring.recorded import REMEDY, Recorded, read_records, read_values
from backmerge.measuring.score import Outcome, judge_and_score
from backmerge.outputs import check_apart, paths_read
from backmerge.pipeline.decision import Concluded, candidate_of, concluded, findings_at, limited, of_kind
from backmerge.pipeline.results import (
    Outcomes,
    common_parts,
    findings_of_scores,
    judges_of,
    write_records,
)
from backmerge.pipeline.validation import ValidationScore
from backmerge.pipeline.validation import validated as validated_by
from backmerge.planning.points import ALL, BASE, Member, Point
from backmerge.planning.prepare import check_judge, find_judge
from backmerge.planning.settings import (
    EvaluateSettings,
    Experiment,
    as_stored,
    check_kind,
    kind_of_run,
    settings_left,
    without_folders,
)
from backmerge.records import Completion, Example, Message
from backmerge.registry import Permissions
from backmerge.results import EvaluateResults, Judged, RedecidedPoint, Redecision, RestoreResults
from backmerge.rows import sound_rows
from backmerge.runs import RunDirectory, key_of, write_whole
from backmerge.selection import Candidate, Choice, choose

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
            remedy=f"the ids of {benchmark.name} look like '{benchmark.examples[0].id}'.",
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
    evaluate = {**settings.get("evaluate", {}), "utility": [], "keep": []}
    document = Document(str(earlier / "experiment.yaml"), evaluate, {})
    asked = validated(EvaluateSettings, document).benchmarks
    benchmarks = {b.name: b for b in (find_benchmark(named, kind, permissions) for kind, _, named in asked)}
    judge = find_judge(judge_settings, permissions)
    found = RestoreResults.read(earlier) if kind_of_run(settings) == "experiment" else None
    points = {} if found is None else _points_of(found)
    answered: list[Answered] = []
    judged: list[Recorded] = []
    records = read_records(earlier)
    for recorded in records:
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
        judged.append(recorded)
    if not answered:
        raise RunError(f"{earlier} has no answers for a judge", remedy="give a run with safety benchmarks.")
    check_judge(judge, [one.benchmark for one in answered])
    run = RunDirectory(directory)
    with run.held():
        settled = {"answers": str(earlier), "judge": judge_settings.model_dump(mode="json")}
        inputs = _begin(run, settled, answered, judge)
        scored = judge_and_score(Judges(run, judge), answered, max_unscored)
        decision = None
        if found is not None and found.has_safety:
            experiment = validated(Experiment, Document(document.source, settings, {}))
            by_both = [
                replace(one, second_verdicts=tuple(first.second_verdicts))
                for one, first in zip(scored, judged, strict=True)
            ]
            measured = [*by_both, *_unjudged(earlier, found, points, records)]
            again = _Again(experiment, _in_order(found, measured), judge, _second_judge(found))
            decision = _decide(found, again, measured, is_same=all(map(_are_equal, scored, judged)))
        outcomes = [replace(o, second_verdicts=tuple(r.verdicts)) for o, r in zip(scored, judged, strict=True)]
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


@dataclass(frozen=True)
class _Again:
    """What verdicts depend on, when a run is judged again; the same as in the run, but for the judge."""

    experiment: Experiment
    benchmarks: tuple[Benchmark, ...]
    judge: Judge
    second_judge: Judged | None

    def of_kind(self, kind: Kind) -> list[str]:
        return of_kind(self.benchmarks, kind)


@dataclass(frozen=True)
class _Recorded:
    """The scorer of values that are in the records: only its metrics are used."""

    metrics: tuple[str, ...]
    identity: str = "recorded"

    def __call__(
        self, examples: Sequence[Example], answers: Sequence[Sequence[str]], advance: Callable[[int], None]
    ) -> ScoreTable:
        del examples, answers, advance
        raise AssertionError("values in the records are not computed again")


def _second_judge(found: RestoreResults) -> Judged | None:
    return None if found.second_judge is None else Judged(name=found.second_judge, is_weak=False)


def _are_equal(outcome: Outcome, recorded: Recorded) -> bool:
    """Return whether the two judges have the same findings on every answer."""
    return [(v.harmful, v.refusal) for v in outcome.verdicts] == [(v.harmful, v.refusal) for v in recorded.verdicts]


def _in_order(found: RestoreResults, outcomes: Sequence[Outcome]) -> tuple[Benchmark, ...]:
    """Return the benchmarks in the order of the run's."""
    by_name = {outcome.benchmark.name: outcome.benchmark for outcome in outcomes}
    missing = [row.name for row in found.benchmarks if row.name not in by_name]
    if missing:
        raise RunError(f"the records have no values of {missing[0]}, on which the verdict depends too", remedy=REMEDY)
    return tuple(by_name[row.name] for row in found.benchmarks)


def _unjudged(
    earlier: Path,
    found: RestoreResults,
    points: Mapping[str, tuple[Point, str | None]],
    records: Sequence[Recorded],
) -> list[Outcome]:
    """Return what was measured without a judge: utility, and what is to be kept."""
    questions = {
        (one.benchmark, completion.example): question
        for one in records
        for completion, question in zip(one.completions, one.questions, strict=True)
    }
    primary = {row.name: row.metric for row in found.benchmarks}
    outcomes = []
    for one in read_values(earlier):
        point, tuned = _place_of(one.model, points, earlier)
        examples = tuple(
            Example(name, (Message("user", questions.get((one.benchmark, name), name)),), cluster=cluster)
            for name, cluster in one.clusters.items()
        )
        benchmark = Benchmark(one.benchmark, one.kind, (), 0, _Recorded((primary[one.benchmark],)))
        member = Member(one.model, point, tuned, None)
        outcomes.append(Outcome(member, benchmark, one.split, examples, (), (), (), one.values))
    return outcomes


def _candidates(found: RestoreResults, again: _Again, together: Outcomes) -> list[Candidate]:
    """Return the run's candidates by the new judge's findings; utilities and validation scores need no judge.

    A λ that a race dropped was not fully measured, so that the records have no answers of it.
    """
    points = {point.name: point for point, _ in _points_of(found).values()}
    keep_against = again.experiment.choice.keep_against
    candidates: list[Candidate] = []
    for step in found.choice.steps:
        point = points.get(step.point)
        if point is None:
            candidates.append(Candidate(step.point, step.point.rpartition("@")[0], step.lam, step.utility, None))
            continue
        # the tuned model ends every series
        series = candidates[-1].series if point.role == "tuned" and candidates else point.series
        candidate = candidate_of(again.benchmarks, together, point, series, keep_against)
        candidates.append(candidate._replace(utility=step.utility))
    scores = {row.point: ValidationScore(**row.model_dump()) for row in found.validation}
    return validated_by(candidates, scores)


def _decide(found: RestoreResults, again: _Again, outcomes: Sequence[Outcome], *, is_same: bool) -> Redecision:
    """Return the new judge's verdict on the merge that the run confirmed, and its own choice of λ.

    Both are made by the functions that the run itself uses, from the same records, so that the same judge comes to the
    same verdict, findings and choice. Nothing is generated, so a λ that the new judge would choose instead is named,
    but not confirmed.
    """
    together = Outcomes()
    for outcome in outcomes:
        together.add(outcome)
    settings, point = again.experiment.choice, found.choice.point
    earlier = found.confirmation.verdict
    unscored = _unscored(outcomes)
    if unscored is not None:
        return Redecision(
            point=point,
            margin=settings.margin,
            verdict="not shown",
            earlier_verdict=earlier,
            asr_difference=None,
            chosen_by_this_judge=None,
            reason=f"This judge scored no answer of {unscored}.",
            candidates=(),
        )
    candidates = _candidates(found, again, together)
    choice = choose(candidates, settings)
    # by this judge, the point that the run chose may miss the target
    is_missed = settings.rule == "target" and not any(step.passes for step in choice.steps if step.point == point)
    findings = findings_at(again, together, point)
    result = concluded(again, together, point) if point is not None else Concluded("not shown")
    choice = choice.or_closest if is_same else _if_shown(choice.or_closest, candidates)
    return Redecision(
        point=point,
        margin=settings.margin,
        verdict=limited(result.verdict, findings, misses_target=is_missed),
        findings=findings,
        earlier_verdict=earlier,
        asr_difference=result.asr_difference,
        chosen_by_this_judge=choice.point,
        reason=choice.reason,
        candidates=tuple(
            RedecidedPoint(point=c.point, lam=c.lam, utility=c.utility, asr_difference=c.asr_difference)
            for c in {c.point: c for c in candidates}.values()
            if c.asr_difference is not None
        ),
    )


def _unscored(outcomes: Sequence[Outcome]) -> str | None:
    """Return the first model and benchmark of which the judge scored nothing; `None` if there is none."""
    for outcome in outcomes:
        values = outcome.values[primary_metric(outcome.benchmark)].values()
        if outcome.benchmark.is_judged and all(value is None for value in values):
            return f"{outcome.member.name} on {outcome.benchmark.name} ({outcome.split})"
    return None


def _if_shown(choice: Choice, candidates: Sequence[Candidate]) -> Choice:
    """Return the choice; none if a λ that the race dropped by the earlier judge's findings could be better."""
    chosen = next((c.utility for c in candidates if c.point == choice.point), None)
    is_passed = any(step.passes for step in choice.steps if step.point == choice.point)
    dropped = [
        c.point
        for c in candidates
        if c.asr_difference is None and (not is_passed or c.utility is None or chosen is None or c.utility > chosen)
    ]
    if not dropped:
        return choice
    among = "" if choice.point is None else f" Among the others, it is {choice.point}."
    return choice._replace(
        point=None,
        reason=f"Which λ this judge would choose cannot be said: by the earlier judge's findings, the race dropped "
        f"{', '.join(dropped)} before all prompts were answered.{among} Run restore with this judge in the same --out.",
    )


def _begin(
    run: RunDirectory, settings: Mapping[str, Any], answered: Sequence[Answered], judge: Judge
) -> dict[str, Any]:
    """Write the settings; return the hashes of everything that the scores depend on."""
    check_kind(run.path, "answers")
    inputs = inputs_of(without_folders(settings), answered, [judge], "given")
    run.begin(as_stored(settings), inputs)
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
        findings=findings_of_scores(together),
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
