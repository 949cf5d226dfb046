"""Measure one model: no merging, no choice, the whole of each benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backmerge import __version__
from backmerge.checkpoints.adapter import is_adapter
from backmerge.checkpoints.locate import locate_model
from backmerge.checkpoints.reader import Checkpoint
from backmerge.config import Settings, as_yaml
from backmerge.errors import ConfigError, RunError
from backmerge.merging.recipe import Variant
from backmerge.pipeline.evaluation import Evaluator
from backmerge.pipeline.experiment import EvaluateSettings
from backmerge.pipeline.points import BASE, TUNED, Member
from backmerge.pipeline.preparation import (
    find_benchmarks,
    find_judge,
    limited,
    make_engine,
    open_tuned,
    settings_left,
)
from backmerge.pipeline.results import SCHEMA_VERSION, Outcomes, plain, score_rows
from backmerge.progress import bar
from backmerge.runs import RunDirectory, write_whole
from backmerge.selection import ChoiceSettings

WHOLE = "all"  # the split's name in scores


class SingleEvaluation(Settings):
    """What `backmerge evaluate` does.

    Attributes:
        model: A model, or an adapter.
        base: The adapter's base.
        evaluate: Benchmarks, judge and engine.
    """

    model: str
    base: str | None = None
    evaluate: EvaluateSettings


def evaluate_model(settings: SingleEvaluation, directory: Path, *, allow_plugins: bool = False) -> dict[str, Any]:
    """Measure a model and write `results.json`; goes on where an interrupted one stopped.

    Raises:
        BackmergeError: something that the user can mend.
    """
    judge = find_judge(settings.evaluate.judge, allow_plugins=allow_plugins)
    benchmarks = find_benchmarks(settings.evaluate, allow_plugins=allow_plugins)
    if settings.base is None:
        place = locate_model(settings.model)
        if is_adapter(place):
            raise ConfigError(
                f"{place} is an adapter, which is no model without its base", remedy="give its base with --base."
            )
        member = Member("base", BASE, None, Variant(Checkpoint(place)))
    else:
        base = Checkpoint(locate_model(settings.base))
        member = Member("tuned", TUNED, None, Variant(base, open_tuned(locate_model(settings.model), base)))
    engine = make_engine(settings.evaluate, allow_plugins=allow_plugins)
    run = RunDirectory(directory)
    outcomes = Outcomes()
    with run.held():
        before = settings_left(run)
        if before and "model" not in before:
            raise RunError(
                f"{run.path} holds an experiment, not the evaluation of one model",
                remedy="give another --out; nothing was touched.",
            )
        # made anew from the units; until then, those of another model or other prompts must not pass for this one's
        (run.path / "results.json").unlink(missing_ok=True)
        write_whole(run.path / "experiment.yaml", as_yaml(settings))
        evaluator = Evaluator(run, engine, judge, settings.evaluate.sampling, ChoiceSettings().max_unscored)
        examples = {b.name: limited(b.examples, settings.evaluate.limit) for b in benchmarks}
        with bar("Evaluation", sum(map(len, examples.values()))) as advance:
            for benchmark in benchmarks:
                outcomes.add(evaluator.evaluate(member, benchmark, WHOLE, examples[benchmark.name], advance))
        results = plain(
            {
                "schema_version": SCHEMA_VERSION,
                "backmerge": __version__,
                "model": settings.model,
                "environment": engine.identity,
                "judge": {"name": judge.name, "is_weak": judge.is_weak},
                "scores": score_rows(outcomes),
            }
        )
        run.write_json("results.json", results)
    return results
