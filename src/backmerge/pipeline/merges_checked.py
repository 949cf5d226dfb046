"""Whether the merges of an experiment can be made, by the settings and the base's tensors alone: before any tuning."""

from __future__ import annotations

from collections.abc import Mapping

from backmerge.checkpoints.reader import Checkpoint
from backmerge.errors import ConfigError
from backmerge.finetuning.datasets import TrainingData
from backmerge.finetuning.schedule import num_steps
from backmerge.merging.method import check_inputs, check_models, check_parameters, find_method
from backmerge.merging.recipe import Variant
from backmerge.merging.settings import Settings
from backmerge.planning.points import Point, guards_of, is_joint
from backmerge.planning.settings import Experiment, SweepSettings
from backmerge.registry import NOTHING_ALLOWED, Permissions


def check_sweep(sweep: SweepSettings, num_tuned: int, permissions: Permissions = NOTHING_ALLOWED) -> None:
    """Whether the method is there, and takes these models and parameters.

    Raises:
        BackmergeError: it does not.
    """
    method = find_method(sweep.method, permissions)
    if "lam" in sweep.parameters:
        raise ConfigError("'lam' is among the method's other parameters", remedy="give λ by itself.")
    joint = is_joint(sweep, method)
    check_models(method, num_tuned if joint else 1, tuple(sweep.models))
    check_inputs(method, guards_of(sweep))
    if method.has_lam:
        check_parameters(method, {**sweep.parameters, "lam": 0.5})
        return
    check_parameters(method, sweep.parameters)
    if sweep.lam or sweep.schedules:
        raise ConfigError(
            f"{sweep.method} has no λ: it decides by itself how far to go",
            remedy="leave 'lam' and 'schedules' away; it is measured as one point beside the others.",
        )


def check_recipe(point: Point, base: Checkpoint, num_tuned: int) -> None:
    """Whether the settings of a merge have a value for every tensor of the base, within their ranges.

    Raises:
        MergeError: a pattern matches nothing, a tensor has no row, or λ leaves its range.
    """
    sweep = point.sweep
    if sweep is None or point.method is None:
        return
    # settings are read by the tensors' names alone: the base may stand for all models
    variant = Variant(
        base,
        (base,) * num_tuned if point.is_joint else base,
        point.method,
        1.0 if point.setting is None else point.setting,
        sweep.parameters,
        sweep.seed,
        dict.fromkeys(sweep.models, base),
    )
    settings = Settings([variant])
    for name in base.infos:
        settings.at(name, variant)


def check_snapshots(experiment: Experiment, training: Mapping[int, TrainingData]) -> None:
    """Whether the tuning is long enough to keep a snapshot, where its path is to be measured.

    Raises:
        ConfigError: it is not.
    """
    tuning = experiment.finetune
    if experiment.path is None or tuning is None or tuning.keep_every is None:
        return
    fewest = min(num_steps(tuning, len(data.training)) for data in training.values())
    if fewest < tuning.keep_every:
        raise ConfigError(
            f"finetune.keep_every is {tuning.keep_every}, and the tuning has {fewest} steps: no snapshot would be kept",
            remedy="lower it.",
        )
