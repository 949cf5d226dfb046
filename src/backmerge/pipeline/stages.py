"""An experiment from its settings to a merged model and a report, each stage kept as it is done."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from backmerge import __version__
from backmerge.benchmarks.scoring import primary_metric
from backmerge.benchmarks.split import Split
from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.reader import Weights
from backmerge.config import Document, as_yaml
from backmerge.generation.protocol import made_engine
from backmerge.measuring.answer import Job
from backmerge.measuring.evaluate import Evaluator, evaluator_of
from backmerge.measuring.speed import expected_time
from backmerge.measuring.usage import Spent, session
from backmerge.merging.recipe import Variant, order_of
from backmerge.outputs import check_apart, paths_read
from backmerge.pipeline.comparison import Contender, comparison_of, confirmed_points, contenders_of
from backmerge.pipeline.decision import (
    confirmation_of,
    counted_looks,
    evidence_of,
    losses_at,
    margin_note,
    with_findings,
)
from backmerge.pipeline.guarding import guard_rows, with_inputs
from backmerge.pipeline.handover import hand_over, write_chosen
from backmerge.pipeline.results import (
    Outcomes,
    common_parts,
    differences_of,
    summary_of,
    write_records,
)
from backmerge.pipeline.samples import samples_of
from backmerge.pipeline.sharding import measured_on, tell_of_shards
from backmerge.pipeline.sweep import sweep
from backmerge.pipeline.tuning import drift_rows
from backmerge.pipeline.validation import (
    validate,
    validated,
    validation_note,
    validation_rows,
)
from backmerge.planning.estimate import confirmed_points as planned_to_confirm
from backmerge.planning.estimate import cost_of, needs_of_plan
from backmerge.planning.points import BASE, TUNED, Member, Point, steps_kept
from backmerge.planning.prepare import Plan, prepare
from backmerge.planning.settings import Experiment, check_kind
from backmerge.progress import bar, say
from backmerge.registry import NOTHING_ALLOWED, Permissions
from backmerge.reporting.card import license_terms
from backmerge.results import (
    Base,
    BenchmarkRow,
    ChosenLam,
    DriftRow,
    PointRow,
    RestoreResults,
    Sizes,
    TunedModel,
)
from backmerge.runs import RunDirectory, key_of, models_in
from backmerge.selection import Choice, choose
from backmerge.selection import Verdict as Confirmed
from backmerge.selection.sense_checks import findings_of

# a changed setting redoes these; what comes after is redone as far as its own inputs changed
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
    """What an experiment left.

    Attributes:
        directory: The run directory.
        results: As in `results.json`.
    """

    directory: Path
    results: RestoreResults

    @property
    def verdict(self) -> Confirmed:
        """What the confirmation says; `not shown` if no λ was chosen."""
        return self.results.confirmation.verdict


def run_experiment(
    experiment: Experiment,
    directory: Path,
    permissions: Permissions = NOTHING_ALLOWED,
    *,
    document: Document | None = None,
) -> Finished:
    """Carry out an experiment, or go on with it where it was.

    Args:
        experiment: The resolved settings.
        directory: The run directory, made if absent.
        permissions: What may be run.
        document: Where the settings come from, for messages.

    Raises:
        BackmergeError: a user error, all problems of the settings together; what was done so far is kept.
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
            run.begin(as_yaml(experiment), inputs, _tuned_otherwise(run, prepared))
            tuned, prepared = _with_tuned_and_inputs(run, prepared, counted.spent)
            evaluator = evaluator_of(
                run,
                engine,
                (prepared.judge, prepared.second_judge),
                experiment.evaluate,
                experiment.execution,
                permissions=permissions,
                spent=counted.spent,
            )
            outcomes = Outcomes()
            points = [*prepared.points, *_path(experiment, tuned)]
            cost = cost_of(experiment, needs_of_plan(prepared, points, tuned, engine), points)
            counted.planned = cost.counts
            say(f"{cost.sentence}\n{_expected_time(evaluator, prepared, tuned, points)}")
            found = sweep(evaluator, prepared, tuned, points, outcomes, key_of(inputs))
            points += found.points
            validation = validate(evaluator, prepared, tuned, points)
            found = found._replace(
                candidates=validated(found.candidates, validation),
                notes=[*filter(None, [validation_note(validation)]), *found.notes],
            )
            choice = _or_closest(choose(found.candidates, experiment.choice))
            choice = choice._replace(
                reason=" ".join(filter(None, (choice.reason, *found.notes, margin_note(prepared))))
            )
            run.log(f"choice: {choice.reason}")
            chosen = next((point for point in points if point.name == choice.point), None)
            with bar("Writing the merged models", len(tuned)):
                written = write_chosen(run, prepared, tuned, chosen)
            rivals = contenders_of(prepared, found.candidates, points) if experiment.choice.compare else []
            _confirm(evaluator, prepared, tuned, chosen, written, rivals, outcomes)
            engine.release()  # all is answered; a suite's next experiment brings an engine of its own
            confirmation = confirmation_of(prepared, outcomes, chosen, list(written))
            looks = counted_looks(run, prepared, inputs, chosen, confirmation.verdict)
            confirmation = confirmation.model_copy(update={"looks": looks})
            evidence = evidence_of(
                outcomes,
                prepared.benchmarks,
                "confirmation",
                experiment.choice.margin,
                merged=chosen.name if chosen else None,
                judges=(prepared.judge, prepared.second_judge),
                losses=losses_at(prepared, outcomes, chosen.name) if chosen else (),
            )
            findings = findings_of(evidence, experiment.choice.accept)
            # the confirmation tests the margin, which is less than rule `target` asks for
            confirmation = with_findings(
                confirmation,
                findings,
                misses_target=experiment.choice.rule == "target" and not any(step.passes for step in choice.steps),
            )
            merged = hand_over(run, written, confirmation, choice)
            results = RestoreResults(
                name=experiment.name,
                backmerge=__version__,
                environment={"python": platform.python_version(), "machine": platform.machine(), **engine.identity},
                base=Base(
                    name=experiment.base,
                    fingerprint=prepared.base.fingerprint,
                    **license_terms(prepared.base.directory),
                ),
                tuned=tuple(_tuned_row(name, weights) for name, weights in tuned.items()),
                inputs=inputs,
                benchmarks=tuple(_benchmark_rows(prepared)),
                drift=tuple(_drift(run, prepared, tuned)),
                second_judge=None if prepared.second_judge is None else prepared.second_judge.name,
                guards=tuple(guard_rows(prepared.guards, prepared.inputs, run.path)),
                points=tuple(
                    PointRow(point=p.name, role=p.role, series=p.series, lam=p.lam, setting=p.setting, **p.recipe)
                    for p in points
                    if any(outcomes.at(p.name, b.name, "selection") for b in prepared.benchmarks)
                ),
                choice=_choice_row(experiment, choice, chosen),
                split=experiment.evaluate.split,
                validation=tuple(validation_rows(validation)),
                confirmation=confirmation,
                findings=findings,
                comparison=comparison_of(prepared, outcomes, rivals) if rivals else None,
                merged=tuple(merged),
                **common_parts(outcomes),
                summary=tuple(summary_of(outcomes, points)),
                differences=tuple(
                    row for split in ("selection", "confirmation") for row in differences_of(outcomes, points, split)
                ),
            )
            write_records(run, outcomes)
            run.write_json("samples.json", samples_of(outcomes, prepared, chosen))
            results.write(run.path)
        # the report reads what is on disk, so that it can be made again by itself, and tells what this session cost
        from backmerge.reporting.report import write_report
        from backmerge.reporting.run_tables import write_tables

        write_report(run.path)
        write_tables(run.path)
        say(f"{counted.spent.sentence}.")
        run.log(f"done: {confirmation.verdict}; {counted.spent.sentence}")
    return Finished(directory, results)


def _note_changes(run: RunDirectory, experiment: Experiment) -> None:
    """Say which settings differ from the last time, and what will therefore be redone."""
    before = check_kind(run.path, "experiment")
    if not before:
        return
    now = experiment.model_dump(mode="json", exclude={"execution"})
    changed = [key for key in now if now[key] != before.get(key)]
    if not changed:
        say(f"Going on with {run.path}: what is done is kept.")
        run.log("resumed")
        return
    first = min((STAGES.index(FIRST_STAGE_OF[key]) for key in changed), default=0)
    line = (
        f"Changed since the last time in {run.path}: {', '.join(changed)}. "
        f"Redone as far as they depend on it: {', '.join(STAGES[first:])}."
    )
    say(line)
    run.log(line)


def _inputs(prepared: Plan, engine: Mapping[str, str]) -> dict[str, Any]:
    """All that the findings rest on, as names and hashes: where one of them differs, they are no longer of this run."""
    settings = prepared.experiment.model_dump(mode="json", exclude={"name", "report", "execution"})
    return {"settings": key_of(settings, order_of(settings["merge"])), **measured_on(prepared, engine)}


def _with_tuned_and_inputs(run: RunDirectory, prepared: Plan, spent: Spent) -> tuple[Mapping[str, Weights], Plan]:
    """The tuned models, made if they are not there, and what merges need to know of the base's inputs."""
    with spent.timed("fine-tuning"):
        tuned = prepared.tuned or _finetune(run, prepared)
    return tuned, with_inputs(prepared, tuned, run.path)


def _finetune(run: RunDirectory, prepared: Plan) -> dict[str, Weights]:
    # imported here: a run on models that exist needs neither peft nor the Trainer
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
    """How long all that may be asked will take, as a sentence."""

    def jobs(of: Sequence[Point], split: Split) -> list[Job]:
        members = [member for point in of for member in prepared.members_at(point, tuned)]
        return [
            Job(member, benchmark, split, prepared.splits[benchmark.name][split])
            for member in members
            for benchmark in prepared.benchmarks
        ]

    confirming = jobs([BASE, TUNED], "confirmation")
    if evaluator.missing(confirming, is_fresh=True):  # else it was carried out, on merges whose names are not known yet
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
    chosen: Point | None,
    written: Mapping[str, Variant],
    rivals: Sequence[Contender],
    outcomes: Outcomes,
) -> None:
    """Measure base, tuned and, as loaded from disk, the chosen merges on prompts that λ was not chosen on.

    Where series are compared, the best of each of the others is measured too, as merged in memory.
    """
    # where the tuned model itself was chosen, it too is measured as written
    live = [BASE] if chosen == TUNED else [BASE, TUNED]
    live += confirmed_points(rivals, chosen)
    members = [member for point in live for member in prepared.members_at(point, tuned)]
    if chosen is not None:
        members += [Member(f"{chosen.name}/{name}", chosen, name, variant) for name, variant in written.items()]
    _measure(evaluator, prepared, members, "confirmation", "Confirmation on other prompts", outcomes)


def _drift(run: RunDirectory, prepared: Plan, tuned: Mapping[str, Weights]) -> list[DriftRow]:
    """How far tuning moved each part, kept as a unit: it takes a pass over every tuned model."""
    key = key_of(prepared.base.fingerprint, {name: weights.fingerprint for name, weights in tuned.items()})
    rows = run.rows("drift", key, lambda: drift_rows(prepared.base, tuned))
    return [DriftRow(**row) for row in rows]


def _path(experiment: Experiment, tuned: Mapping[str, Weights]) -> list[Point]:
    """The points of the tuning's own path, if they are asked for."""
    settings = experiment.path
    if settings is None:
        return []
    steps = steps_kept(list(tuned.values()))
    kinds: list[tuple[str, float | None]] = [("snapshots", None)] if settings.snapshots else []
    kinds += [(f"snapshots(ema={settings.ema:g})", settings.ema)] if settings.ema else []
    return [
        Point(f"{series}@{step}", "merged", series, None, step=step, ema=ema) for series, ema in kinds for step in steps
    ]


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


def _or_closest(choice: Choice) -> Choice:
    """The choice; if none kept the rule's limit, the closest, so that it is written to `unconfirmed/` and measured.

    The confirmation keeps 5 % whatever it tests, and says whether this one fails or could not be decided.
    """
    if choice.closest is None:
        return choice
    reason = f"{choice.reason} None passed, so the closest, {choice.closest}, was written and measured."
    return choice._replace(point=choice.closest, reason=reason)


def _choice_row(experiment: Experiment, choice: Choice, chosen: Point | None) -> ChosenLam:
    return ChosenLam(
        rule=experiment.choice.rule,
        margin=experiment.choice.margin,
        point=choice.point,
        series=chosen.series if chosen else None,
        lam=chosen.lam if chosen else None,
        setting=chosen.setting if chosen else None,
        reason=choice.reason,
        steps=choice.steps,
    )
