"""Run an experiment from its settings to a merged model and a report; each stage is stored when it is done."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from backmerge import __version__
from backmerge.benchmarks.scoring import primary_metric
from backmerge.benchmarks.split import SPLITS, Split
from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.reader import Weights
from backmerge.config import Document
from backmerge.generation.protocol import Generator, made_engine
from backmerge.measuring.answer import Job
from backmerge.measuring.evaluate import Evaluator, evaluator_of
from backmerge.measuring.speed import expected_time
from backmerge.measuring.usage import Usage, session
from backmerge.merging.recipe import Variant, order_of
from backmerge.outputs import check_apart, models_in, paths_read
from backmerge.pipeline.comparison import Contender, comparison_of, confirmed_points, contenders_of
from backmerge.pipeline.decision import (
    confirmation_of,
    counted_looks,
    findings_at,
    margin_note,
    misses_target,
    with_findings,
)
from backmerge.pipeline.guarding import guard_rows, with_inputs
from backmerge.pipeline.handover import hand_over, write_chosen
from backmerge.pipeline.results import (
    Outcomes,
    common_parts,
    differences_of,
    pair_tests_of,
    summary_of,
    write_records,
)
from backmerge.pipeline.samples import samples_of
from backmerge.pipeline.sharding import measured_on, tell_of_shards
from backmerge.pipeline.sweep import sweep
from backmerge.pipeline.tuning import drift_rows
from backmerge.pipeline.validation import (
    ValidationScore,
    validate,
    validated,
    validation_note,
    validation_rows,
)
from backmerge.planning.estimate import confirmed_points as planned_to_confirm
from backmerge.planning.estimate import cost_of, needs_of_plan
from backmerge.planning.points import BASE, TUNED, Member, Point, path_points, steps_kept
from backmerge.planning.prepare import Plan, prepare
from backmerge.planning.settings import Experiment, absolute_paths, as_stored, check_kind, without_folders
from backmerge.progress import bar, say
from backmerge.registry import NOTHING_ALLOWED, Permissions
from backmerge.reporting.card import license_terms
from backmerge.results import (
    Base,
    BenchmarkRow,
    ChosenLam,
    Comparison,
    Confirmation,
    DriftRow,
    PointRow,
    RestoreResults,
    Sizes,
    TunedModel,
)
from backmerge.runs import RunDirectory, key_of
from backmerge.selection import Choice, choose
from backmerge.selection import Verdict as Confirmed
from backmerge.selection.sense_checks import Finding

# a changed setting repeats these stages; later ones are repeated if their own inputs changed
FIRST_STAGE_OF = {
    "base": "finetune",
    "tuned": "sweep",
    "finetune": "finetune",
    "merge": "sweep",
    "merged_as": "sweep",
    "merged_dtype": "sweep",
    "merged_rounding": "sweep",
    "merged_verified": "write",
    "config_from": "sweep",
    "tokenizer_from": "sweep",
    "evaluate": "sweep",
    "search": "sweep",
    "path": "sweep",
    "layers": "sweep",
    "choice": "choose",
    "report": "report",
    "name": "report",
}
STAGES = ("finetune", "sweep", "choose", "write", "confirm", "report")


@dataclass(frozen=True)
class Finished:
    """A finished experiment.

    Attributes:
        directory: The run directory.
        results: The contents of `results.json`.
    """

    directory: Path
    results: RestoreResults

    @property
    def verdict(self) -> Confirmed:
        """The confirmation's verdict; `not shown` if no λ was chosen."""
        return self.results.confirmation.verdict


def run_experiment(
    experiment: Experiment,
    directory: Path,
    permissions: Permissions = NOTHING_ALLOWED,
    *,
    document: Document | None = None,
) -> Finished:
    """Run an experiment, or continue it where it stopped.

    Args:
        experiment: The resolved settings.
        directory: The run directory, made if absent.
        permissions: What may be run.
        document: Where the settings come from, for messages.

    Raises:
        BackmergeError: a user error, all problems of the settings together; finished work is kept.
    """
    check_apart(directory, paths_read(experiment))
    prepared = prepare(experiment, permissions, document)
    engine = made_engine(experiment.evaluate.engine, permissions)
    run = RunDirectory(directory)
    with run.held():
        _note_changes(run, experiment)
        tell_of_shards(run, prepared, engine)
        with session(run) as counted:
            inputs = _inputs(prepared, engine.identity)
            run.begin(as_stored(experiment), inputs, _tuned_otherwise(run, prepared))
            tuned, prepared = _with_tuned_and_inputs(run, prepared, engine, counted.usage)
            outcomes = Outcomes()
            steps = steps_kept(list(tuned.values())) if experiment.path is not None else ()
            points = [*prepared.points, *path_points(experiment.path, steps)]
            cost = cost_of(experiment, needs_of_plan(prepared, points, tuned, engine), points)
            counted.planned = cost.counts
            judges = (prepared.judge, prepared.second_judge)
            with evaluator_of(
                run,
                engine,
                judges,
                experiment.evaluate,
                experiment.execution,
                permissions=permissions,
                usage=counted.usage,
            ) as evaluator:
                say(f"{cost.sentence}\n{_expected_time(evaluator, prepared, tuned, points)}")
                chosen = _choose(evaluator, prepared, tuned, points, outcomes, key_of(inputs))
                run.log(f"choice: {chosen.choice.reason}")
                with bar("Writing the merged models", len(tuned)):
                    written = write_chosen(run, prepared, tuned, chosen.point)
                _confirm(evaluator, prepared, tuned, chosen, written, outcomes)
            comparison = comparison_of(prepared, outcomes, chosen.rivals) if chosen.rivals else None
            confirmation, findings = _concluded(run, prepared, inputs, chosen, list(written), outcomes, comparison)
            merged = hand_over(run, written, confirmation, chosen.choice)
            results = RestoreResults(
                name=experiment.name,
                backmerge=__version__,
                environment={"python": platform.python_version(), "machine": platform.machine(), **engine.identity},
                inputs=inputs,
                tuned=tuple(_tuned_row(name, weights) for name, weights in tuned.items()),
                drift=tuple(_drift(run, prepared, tuned)),
                guards=tuple(guard_rows(prepared.guards, prepared.inputs, run.path)),
                merged=tuple(merged),
                confirmation=confirmation,
                findings=findings,
                comparison=comparison,
                **_planned_parts(prepared),
                **_chosen_parts(prepared, chosen, outcomes),
                pair_tests=pair_tests_of(outcomes, chosen.point.name, "confirmation") if chosen.point else (),
                **common_parts(outcomes),
            )
            write_records(run, outcomes)
            run.write_json("samples.json", samples_of(outcomes, prepared, chosen.point))
            results.write(run.path)
        # the report reads from disk, so that it can be made again separately, and includes this session's cost
        from backmerge.reporting.report import write_report
        from backmerge.reporting.run_tables import write_tables

        write_report(run.path)
        write_tables(run.path)
        say(f"{counted.usage.sentence}.")
        run.log(f"done: {confirmation.verdict}; {counted.usage.sentence}")
    return Finished(directory, results)


class _Chosen(NamedTuple):
    """The result of the sweep.

    Attributes:
        points: All points that may have been measured.
        validation: Each point's score on held-out rows.
        choice: The rule's choice, with its reason.
        point: The chosen point, if there is one.
        rivals: The best point of each other series, if series are compared.
    """

    points: list[Point]
    validation: dict[str, ValidationScore]
    choice: Choice
    point: Point | None
    rivals: list[Contender]


def _choose(
    evaluator: Evaluator,
    prepared: Plan,
    tuned: Mapping[str, Weights],
    points: Sequence[Point],
    outcomes: Outcomes,
    key: str,
) -> _Chosen:
    """Measure the points, and those that the search adds; choose one."""
    found = sweep(evaluator, prepared, tuned, points, outcomes, key)
    points = [*points, *found.points]
    validation = validate(evaluator, prepared, tuned, points)
    candidates = validated(found.candidates, validation)
    settings = prepared.experiment.choice
    choice = choose(candidates, settings).or_closest
    notes = (validation_note(validation), *found.notes, margin_note(prepared))
    choice = choice._replace(reason=" ".join(filter(None, (choice.reason, *notes))))
    point = next((point for point in points if point.name == choice.point), None)
    rivals = contenders_of(prepared, candidates, points) if settings.compare else []
    return _Chosen(points, validation, choice, point, rivals)


def _concluded(
    run: RunDirectory,
    prepared: Plan,
    inputs: Mapping[str, Any],
    chosen: _Chosen,
    written: Sequence[str],
    outcomes: Outcomes,
    comparison: Comparison | None,
) -> tuple[Confirmation, tuple[Finding, ...]]:
    """Return the confirmation, and the sense checks' findings about it."""
    point = chosen.point
    confirmation = confirmation_of(prepared, outcomes, point, list(written))
    compared = {row.point: row.verdict for row in comparison.rows if row.point is not None} if comparison else {}
    confirmed = compared | ({point.name: confirmation.verdict} if point else {})
    looks = counted_looks(run, prepared, inputs, confirmed)
    confirmation = confirmation.model_copy(update={"looks": looks})
    findings = findings_at(prepared, outcomes, point.name if point else None)
    is_missed = misses_target(chosen.choice, prepared.experiment.choice)
    return with_findings(confirmation, findings, misses_target=is_missed), findings


def _planned_parts(prepared: Plan) -> dict[str, Any]:
    """Return the fields of the results about the plan."""
    base = prepared.base
    return {
        "base": Base(name=prepared.experiment.base, fingerprint=base.fingerprint, **license_terms(base.directory)),
        "benchmarks": tuple(_benchmark_rows(prepared)),
        "second_judge": None if prepared.second_judge is None else prepared.second_judge.name,
        "split": prepared.experiment.evaluate.split,
    }


def _chosen_parts(prepared: Plan, chosen: _Chosen, outcomes: Outcomes) -> dict[str, Any]:
    """Return the fields of the results about the points and the choice among them."""
    points = chosen.points
    return {
        "points": tuple(
            PointRow(point=p.name, role=p.role, series=p.series, lam=p.lam, setting=p.setting, **p.recipe)
            for p in points
            if p in (BASE, TUNED) or any(outcomes.at(p.name, b.name, s) for b in prepared.benchmarks for s in SPLITS)
        ),
        "choice": _choice_row(prepared.experiment, chosen.choice, chosen.point),
        "validation": tuple(validation_rows(chosen.validation)),
        "summary": tuple(summary_of(outcomes, points)),
        "differences": tuple(row for split in SPLITS for row in differences_of(outcomes, points, split)),
    }


def _note_changes(run: RunDirectory, experiment: Experiment) -> None:
    """Print which settings differ from the last time, and what is therefore repeated."""
    before = check_kind(run.path, "experiment")
    if not before:
        return
    now = absolute_paths(experiment)
    del now["execution"]
    changed = [key for key in now if now[key] != before.get(key)]
    if not changed:
        say(f"Continuing {run.path}: finished work is kept.")
        run.log("resumed")
        return
    first = min((STAGES.index(FIRST_STAGE_OF[key]) for key in changed), default=0)
    line = (
        f"Changed since the last time in {run.path}: {', '.join(changed)}. "
        f"Repeated if they depend on it: {', '.join(STAGES[first:])}."
    )
    say(line)
    run.log(line)


def _inputs(prepared: Plan, engine: Mapping[str, str]) -> dict[str, Any]:
    """Return everything that the results depend on, as names and hashes: if one differs, they are another run's."""
    settings = without_folders(prepared.experiment.model_dump(mode="json", exclude={"name", "report", "execution"}))
    return {"settings": key_of(settings, order_of(settings["merge"])), **measured_on(prepared, engine)}


def _with_tuned_and_inputs(
    run: RunDirectory, prepared: Plan, engine: Generator, usage: Usage
) -> tuple[Mapping[str, Weights], Plan]:
    """Return the tuned models, made if they do not exist, and the input statistics that merges need."""
    with usage.timed("fine-tuning"):
        tuned = prepared.tuned or _finetune(run, prepared)
    return tuned, with_inputs(prepared, tuned, run.path, engine)


def _finetune(run: RunDirectory, prepared: Plan) -> dict[str, Weights]:
    # imported here: a run on existing models needs neither peft nor the Trainer
    from backmerge.pipeline.tuning import tune_seeds

    settings = prepared.experiment.finetune
    assert settings is not None
    places = {seed: run.tuned / f"seed-{seed}" for seed in settings.seeds}
    return tune_seeds(
        prepared.base, prepared.experiment.base, settings, prepared.training, places, log=run.log, replace=False
    )


def _tuned_otherwise(run: RunDirectory, prepared: Plan) -> list[Path]:
    """Return the models in the run's `tuned/` whose places are needed for models tuned with these settings."""
    from backmerge.finetuning.trainer import is_trained, training_key

    settings = prepared.experiment.finetune
    keys = (
        {}
        if settings is None
        else {
            f"seed-{seed}": training_key(prepared.base, data, settings, seed)
            for seed, data in prepared.training.items()
        }
    )
    return [place for place in models_in(run.tuned) if place.name in keys and not is_trained(place, keys[place.name])]


def _expected_time(evaluator: Evaluator, prepared: Plan, tuned: Mapping[str, Weights], points: Sequence[Point]) -> str:
    """Return how long all planned answers will take, as a sentence."""

    def jobs(of: Sequence[Point], split: Split) -> list[Job]:
        members = [member for point in of for member in prepared.members_at(point, tuned)]
        return [
            Job(member, benchmark, split, prepared.splits[benchmark.name][split])
            for member in members
            for benchmark in prepared.benchmarks
        ]

    confirming = jobs([BASE, TUNED], "confirmation")
    if evaluator.missing(confirming, is_fresh=True):  # otherwise it is already done
        confirming = jobs(planned_to_confirm(points, compares=prepared.experiment.choice.compare), "confirmation")
    return expected_time(evaluator, jobs(points, "selection"), confirming, base=prepared.base)


def _measure(
    evaluator: Evaluator,
    prepared: Plan,
    members: Sequence[Member],
    split: Any,
    description: str,
    outcomes: Outcomes,
) -> None:
    jobs = [
        Job(member, benchmark, split, prepared.splits[benchmark.name][split])
        for member in members
        for benchmark in prepared.benchmarks
    ]
    with bar(description, sum(len(job.examples) for job in jobs), "answers") as advance:
        for outcome in evaluator.evaluate(jobs, advance, is_fresh=split == "confirmation"):
            outcomes.add(outcome)


def _confirm(
    evaluator: Evaluator,
    prepared: Plan,
    tuned: Mapping[str, Weights],
    chosen: _Chosen,
    written: Mapping[str, Variant],
    outcomes: Outcomes,
) -> None:
    """Measure base, tuned and, as loaded from disk, the chosen merges on prompts that λ was not chosen on.

    If series are compared, the best point of each other series is measured too, merged in memory.
    """
    # if the tuned model itself was chosen, it is also measured as written
    point = chosen.point
    live = [BASE] if point == TUNED else [BASE, TUNED]
    live += confirmed_points(chosen.rivals, point)
    members = [member for one in live for member in prepared.members_at(one, tuned)]
    if point is not None:
        members += [Member(f"{point.name}/{name}", point, name, variant) for name, variant in written.items()]
    _measure(evaluator, prepared, members, "confirmation", "Confirmation on other prompts", outcomes)


def _drift(run: RunDirectory, prepared: Plan, tuned: Mapping[str, Weights]) -> list[DriftRow]:
    """Return how far tuning moved each part, stored as a unit, since it reads every tuned model once."""
    key = key_of(prepared.base.fingerprint, {name: weights.fingerprint for name, weights in tuned.items()})
    rows = run.rows("drift", key, lambda: drift_rows(prepared.base, tuned))
    return [DriftRow(**row) for row in rows]


def _tuned_row(name: str, weights: Weights) -> TunedModel:
    kind: Literal["adapter", "checkpoint"] = "adapter" if isinstance(weights, AdapterOnBase) else "checkpoint"
    return TunedModel(name=name, kind=kind, fingerprint=weights.fingerprint)


def _benchmark_rows(prepared: Plan) -> list[BenchmarkRow]:
    return [
        BenchmarkRow(
            name=benchmark.name,
            kind=benchmark.kind,
            metric=primary_metric(benchmark),
            sizes=Sizes(**{split: len(examples) for split, examples in prepared.splits[benchmark.name].items()}),
            judge=prepared.judge.name if benchmark.is_judged else None,
            judge_is_weak=benchmark.is_judged and prepared.judge.is_weak,
        )
        for benchmark in prepared.benchmarks
    ]


def _choice_row(experiment: Experiment, choice: Choice, chosen: Point | None) -> ChosenLam:
    return ChosenLam(
        rule=experiment.choice.rule,
        margin=experiment.choice.margin,
        keep_margin=experiment.choice.keep_margin if experiment.evaluate.keep else None,
        point=choice.point,
        series=chosen.series if chosen else None,
        lam=chosen.lam if chosen else None,
        setting=chosen.setting if chosen else None,
        reason=choice.reason,
        steps=choice.steps,
    )
