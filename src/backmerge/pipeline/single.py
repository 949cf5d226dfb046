"""Measure one model: no merging, no choice, the whole of each benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from backmerge import __version__
from backmerge.benchmarks.guards import Asked, Guard, GuardChoice, find_guards, fingerprints_of
from backmerge.benchmarks.split import limited
from backmerge.checkpoints.companions import Side
from backmerge.checkpoints.files import MERGED_DTYPES
from backmerge.checkpoints.locate import locate_model
from backmerge.checkpoints.reader import Checkpoint
from backmerge.config import Document, Settings
from backmerge.errors import ConfigError
from backmerge.execution import ExecutionSettings
from backmerge.generation.protocol import Generator, made_engine
from backmerge.judging.protocol import Judge
from backmerge.measuring.answer import Job, inputs_of
from backmerge.measuring.evaluate import evaluator_of
from backmerge.measuring.speed import expected_time
from backmerge.measuring.usage import session
from backmerge.merging.method import INPUTS, find_method
from backmerge.merging.recipe import Variant, lam_name
from backmerge.merging.served import as_given
from backmerge.outputs import check_apart, paths_read
from backmerge.pipeline.guarding import gathered_statistics, guard_rows
from backmerge.pipeline.merges import lams_of
from backmerge.pipeline.results import (
    Outcomes,
    common_parts,
    findings_of_scores,
    judges_of,
    write_records,
)
from backmerge.planning.findings import Findings, offline
from backmerge.planning.points import BASE, TUNED, Member, Output, Point, as_output, check_sweep
from backmerge.planning.prepare import find_measures, open_tuned, opened_model
from backmerge.planning.settings import EvaluateSettings, SweepSettings, as_stored, check_kind, without_folders
from backmerge.progress import bar, say
from backmerge.registry import NOTHING_ALLOWED, Permissions
from backmerge.results import EvaluateResults, GuardRow
from backmerge.runs import RunDirectory

OF_MERGES = {"lam", "method", "parameters", "guard", "merged_as", "merged_dtype", "config_from", "tokenizer_from"}
WHOLE = "all"  # the split's name in scores


class SingleEvaluation(Settings):
    """The settings of `backmerge evaluate`.

    Attributes:
        model: A model, or an adapter.
        base: The adapter's base, or the model that a checkpoint is merged with.
        lam: Shares of the model in merges with the base; by default 1, the model itself.
        method: Method of the merges.
        parameters: Parameters of the method.
        guard: The prompts on which a merge by direction (`anchored`) should act like the base; they are not measured
            on.
        merged_as: The form in which merges are measured: `adapter`, `checkpoint`, or `auto`, which is an adapter if
            that represents the recipe exactly.
        merged_dtype: Dtype of the merges' tensors: for a checkpoint by default the base's, for an adapter float32.
        config_from: The side that the merges' config.json and generation_config.json come from, if it has them.
        tokenizer_from: The side that their tokenizer, chat templates and processors come from, if it has them.
        evaluate: Benchmarks, judge and engine.
        execution: Where answers are generated; no result depends on it.
    """

    model: str
    base: str | None = None
    lam: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    method: str = "linear"
    parameters: Mapping[str, Any] = Field(default_factory=dict)
    guard: GuardChoice | None = None
    merged_as: Literal["auto", "adapter", "checkpoint"] = "auto"
    merged_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    config_from: Side = "tuned"
    tokenizer_from: Side = "tuned"
    evaluate: EvaluateSettings
    execution: ExecutionSettings = ExecutionSettings()


def evaluate_model(
    settings: SingleEvaluation,
    directory: Path,
    permissions: Permissions = NOTHING_ALLOWED,
    *,
    document: Document | None = None,
) -> EvaluateResults:
    """Measure a model, or its merges with a base, and write `results.json`; continue an interrupted evaluation.

    Args:
        settings: The evaluation's settings.
        directory: The run directory, made if absent.
        permissions: What may be run.
        document: Where the settings come from, for messages.

    Raises:
        BackmergeError: a user error; all problems of the settings together.
    """
    check_apart(directory, paths_read(settings))
    jobs, judge, second, guards, engine = _asked(settings, permissions, document)
    run = RunDirectory(directory)
    outcomes = Outcomes()
    with run.held():
        check_kind(run.path, "evaluation")
        changing = without_folders(settings.model_dump(mode="json", exclude={"execution"}))
        inputs = inputs_of(changing, jobs, (judge, second), engine.identity)
        if guards:  # the statistics themselves are collected later, in the run
            inputs["guards"] = fingerprints_of(guards)
        run.begin(as_stored(settings), inputs)
        jobs, guarded = _with_inputs(jobs, guards, settings, run.path, engine)
        total = sum(len(job.examples) for job in jobs)
        with evaluator_of(
            run, engine, (judge, second), settings.evaluate, settings.execution, permissions=permissions
        ) as evaluator:
            say(expected_time(evaluator, jobs, base=jobs[0].member.local_variant.base))
            with session(run, evaluator.usage), bar("Evaluation", total, "answers") as advance:
                for outcome in evaluator.evaluate(jobs, advance):
                    outcomes.add(outcome)
        write_records(run, outcomes)
        run.log(evaluator.usage.sentence)
        results = EvaluateResults(
            backmerge=__version__,
            model=settings.model,
            base_name=settings.base,
            inputs=inputs,
            environment=engine.identity,
            **judges_of(judge, second),
            guards=tuple(guarded),
            findings=findings_of_scores(outcomes),
            **common_parts(outcomes),
        )
        results.write(run.path)
    return results


def _with_inputs(
    jobs: Sequence[Job], guards: Mapping[Asked, Guard], settings: SingleEvaluation, run: Path, engine: Generator
) -> tuple[list[Job], list[GuardRow]]:
    """Return the jobs, with statistics of the base's inputs on the guard's prompts for merges, and the guard."""
    if settings.guard is None:
        return list(jobs), []
    base, evaluate = jobs[0].member.local_variant.base, settings.evaluate
    found = gathered_statistics(guards, base, evaluate.engine, run=run, is_cached=evaluate.cache, running=engine)
    inputs = {INPUTS[0]: found[settings.guard, base.fingerprint]}
    members = {
        job.member.name: job.member._replace(variant=replace(job.member.local_variant, inputs=inputs)) for job in jobs
    }
    return [job._replace(member=members[job.member.name]) for job in jobs], guard_rows(guards, found, run)


def plan_evaluation(
    settings: SingleEvaluation,
    directory: Path,
    permissions: Permissions = NOTHING_ALLOWED,
    *,
    document: Document | None = None,
) -> str:
    """Check everything that `evaluate_model` would, and return what is left to generate, as a sentence.

    Does not use the hub, loads no weights and writes nothing.

    Raises:
        BackmergeError: all problems of the settings together.
    """
    check_apart(directory, paths_read(settings))
    with offline():
        jobs, judge, second, _, engine = _asked(settings, permissions, document)
        with evaluator_of(
            RunDirectory(directory),
            engine,
            (judge, second),
            settings.evaluate,
            settings.execution,
            permissions=permissions,
        ) as evaluator:
            return expected_time(evaluator, jobs, base=jobs[0].member.local_variant.base, may_measure=False)


class _Measured(NamedTuple):
    """The jobs of an evaluation, and its judge."""

    jobs: list[Job]
    judge: Judge
    second: Judge | None
    guards: Mapping[Asked, Guard]
    engine: Generator


def _asked(settings: SingleEvaluation, permissions: Permissions, document: Document | None) -> _Measured:
    found = Findings(document)
    measures = find_measures(settings.evaluate, found, permissions)
    with found.at("base"):
        if settings.base is not None:
            Checkpoint(locate_model(settings.base))
    with found.at("model"):
        locate_model(settings.model)
    with found.at("evaluate", "engine", "name"):
        engine = made_engine(settings.evaluate.engine, permissions)
    found.raise_any()
    _check_merges_are_asked(settings, document, permissions)
    assert measures.judge is not None
    wanted = [settings.guard] if settings.guard is not None else []
    guards, benchmarks = find_guards(wanted, measures.benchmarks, permissions)
    jobs = [
        Job(member, benchmark, WHOLE, limited(benchmark.examples, settings.evaluate.limit))
        for member in _members(settings, permissions)
        for benchmark in benchmarks
    ]
    return _Measured(jobs, measures.judge, measures.second_judge, guards, engine)


def _check_merges_are_asked(settings: SingleEvaluation, document: Document | None, permissions: Permissions) -> None:
    """Check that the settings of merges come with merges.

    Raises:
        ConfigError: no merge is measured.
    """
    if settings.base is not None and (settings.lam or not find_method(settings.method, permissions).has_lam):
        return
    given = settings.model_dump(include=OF_MERGES, exclude_defaults=True)

    def called(key: str) -> str:
        return (document.option((key,)) if document is not None else None) or key

    names = ", ".join(called(key) for key, value in given.items() if value)
    missing = called("base") if settings.base is None else called("lam")
    if names:
        raise ConfigError(
            f"only merges use {names}, but without {missing} no merge is measured",
            remedy=f"give {missing}, or remove {names}.",
        )


def _members(settings: SingleEvaluation, permissions: Permissions) -> list[Member]:
    """Return the models to measure: one, or one for each λ."""
    if settings.base is None:
        return [Member("base", BASE, None, opened_model(locate_model(settings.model)))]
    base = Checkpoint(locate_model(settings.base))
    tuned = open_tuned(locate_model(settings.model), base)
    method = find_method(settings.method, permissions)
    if not settings.lam and method.has_lam:
        return [Member("tuned", TUNED, None, as_given(Variant(base, tuned)))]
    sweep = SweepSettings(method=settings.method, parameters=settings.parameters, guard=settings.guard)
    check_sweep(sweep, method, 1)
    lams = dict.fromkeys(lams_of(method, settings.lam or None))
    names = {lam: f"{settings.method}@{lam_name(lam)}" if method.has_lam else settings.method for lam in lams}
    return [
        Member(
            point.name,
            point,
            None,
            as_output(
                Variant(base, tuned, method, lam, sweep.parameters),
                Output(
                    settings.merged_as,
                    None if settings.merged_dtype is None else MERGED_DTYPES[settings.merged_dtype],
                    config_from=settings.config_from,
                    tokenizer_from=settings.tokenizer_from,
                ),
            ),
        )
        for lam, name in names.items()
        for point in [Point(name, "merged", settings.method, lam if method.has_lam else None, sweep, method)]
    ]
