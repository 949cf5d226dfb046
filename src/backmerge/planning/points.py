"""The points that are measured on the way from base to tuned, and the models at each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from backmerge.benchmarks.guards import Asked
from backmerge.checkpoints.adapter import open_weights
from backmerge.checkpoints.companions import Side
from backmerge.checkpoints.locate import short_name
from backmerge.checkpoints.reader import Checkpoint, Weights
from backmerge.errors import ConfigError, RunError
from backmerge.finetuning.datasets import TrainingData
from backmerge.finetuning.settings import num_steps
from backmerge.merging.inputs import InputStatistics
from backmerge.merging.method import INPUTS, Method, checked, find_method
from backmerge.merging.methods.task_vectors import task_arithmetic
from backmerge.merging.recipe import Rounding, Variant, lam_name, order_of
from backmerge.merging.schedule import Settings
from backmerge.merging.served import Wanted, as_given, in_form
from backmerge.planning.settings import DEFAULT_LAMS, Experiment, PathSettings, SweepSettings
from backmerge.registry import NOTHING_ALLOWED, Permissions
from backmerge.runs import key_of

Role = Literal["base", "tuned", "merged"]
ALL = "all"  # origin of the one model that several tuned ones are merged into
NO_MODELS: Mapping[str, Weights] = MappingProxyType({})
NO_INPUTS: Mapping[tuple[Asked, str], InputStatistics] = MappingProxyType({})


class Point(NamedTuple):
    """A point on the way; with several tuned models, it has one model for each, or one for all.

    Attributes:
        name: `base`, `tuned`, or such as `linear@0.4`.
        series: A name for points that differ only in λ, such as `linear`.
        lam: λ; `None` for methods without λ, and if it differs from tensor to tensor.
        sweep: The recipe without λ.
        method: The sweep's method.
        setting: λ in the recipe's form: a number, a list, a table; `None` if the method has no λ.
        is_joint: Whether all tuned models go into one merge.
        step: On the path of the tuning: after this many steps.
        ema: On that path: the average of the snapshots up to there, with this decay.
    """

    name: str
    role: Role
    series: str
    lam: float | None
    sweep: SweepSettings | None = None
    method: Method | None = None
    setting: Any = None
    is_joint: bool = False
    step: int | None = None
    ema: float | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """Return how the point is made, as plain data."""
        if self.step is not None:
            return {"method": "path", "parameters": {"step": self.step, "ema": self.ema}, "tuned": "each"}
        if self.sweep is None:
            return {"method": None, "parameters": {}, "tuned": "each"}
        return {
            "method": self.sweep.method,
            "parameters": {
                **self.sweep.parameters,
                **({"seed": self.sweep.seed} if self.sweep.seed else {}),
                **({"guard": self.sweep.guard.short} if self.sweep.guard else {}),
                **({"task": self.sweep.task.short} if self.sweep.task else {}),
            },
            "tuned": "all" if self.is_joint else "each",
        }


def at_lam(point: Point, lam: float) -> Point:
    """Return the point of the same series at another λ."""
    assert point.sweep is not None, f"{point.name} has no recipe to repeat"
    return point._replace(name=f"{point.series}@{lam_name(lam)}", lam=lam, setting=lam)


class Member(NamedTuple):
    """One model at a point.

    Attributes:
        name: Such as `linear@0.4/seed-42`.
        point: The point that it belongs to.
        tuned: The name of the tuned model that it comes from, or `all`; `None` for the base.
        variant: Its weights; `None` for a model of a server, or one that answered earlier.
    """

    name: str
    point: Point
    tuned: str | None
    variant: Variant | None

    @property
    def local_variant(self) -> Variant:
        """Return the weights of a model that is on this machine."""
        assert self.variant is not None, f"{self.name} is not on this machine"
        return self.variant


BASE = Point("base", "base", "base", 0.0, setting=0.0)
TUNED = Point("tuned", "tuned", "tuned", 1.0, setting=1.0)


def points_of(sweeps: Sequence[SweepSettings], permissions: Permissions = NOTHING_ALLOWED) -> list[Point]:
    """Return base, tuned, and every merge, by method and λ; repeated ones once.

    Raises:
        ConfigError: two different recipes would have one name.
    """
    merged: dict[str, Point] = {}
    for sweep in sweeps:
        for point in _points(sweep, find_method(sweep.method, permissions)):
            known = merged.setdefault(point.name, point)
            if known.sweep is None or point.sweep is None:
                continue
            if point.sweep.label is not None and _recipe_of(known.sweep) != _recipe_of(point.sweep):
                raise ConfigError(
                    f"two entries of 'merge' have the label '{point.series}'", remedy="give them different labels."
                )
            if known.sweep.models != point.sweep.models or guards_of(known.sweep) != guards_of(point.sweep):
                raise ConfigError(
                    f"two entries of 'merge' would have the name '{point.series}': folders of their models, or files "
                    "of their guards, have the same name",
                    remedy="rename one of them, or give each entry a label.",
                )
    return [BASE, TUNED, *merged.values()]


def _recipe_of(sweep: SweepSettings) -> dict[str, Any]:
    return sweep.model_dump(exclude={"lam", "schedules"})


def is_joint(sweep: SweepSettings, method: Method) -> bool:
    """Return whether all tuned models go into one merge: as set, or as the method requires."""
    if sweep.tuned is not None:
        return sweep.tuned == "all"
    return method.num_tuned[0] > 1


def series_of(sweep: SweepSettings, method: Method) -> str:
    """Return the name of points that differ only in λ: their label, or the method with its parameters."""
    if sweep.label is not None:
        return sweep.label
    named: dict[str, Any] = dict(sorted(sweep.parameters.items())) | ({"seed": sweep.seed} if sweep.seed else {})
    named |= {name: short_name(model) for name, model in sorted(sweep.models.items())}
    named |= {name.removesuffix("_inputs"): asked.short for name, asked in guards_of(sweep).items()}
    inside = ",".join(f"{key}={value}" for key, value in named.items())
    # if the method takes one model or several, the name says which
    is_told = sweep.tuned == "all" and method.num_tuned[0] == 1
    return f"{sweep.method}{'[all]' if is_told else ''}{f'({inside})' if inside else ''}"


def _points(sweep: SweepSettings, method: Method) -> Iterator[Point]:
    series, joint = series_of(sweep, method), is_joint(sweep, method)
    if not method.has_lam:
        yield Point(series, "merged", series, None, sweep, method, None, joint)
        return
    # only a merge of all tuned models ends elsewhere than at the tuned models themselves
    for lam in sorted({*lams_of(sweep), *((1.0,) if joint and lams_of(sweep) else ())}):
        yield Point(f"{series}@{lam_name(lam)}", "merged", series, lam, sweep, method, lam, joint)
    for setting in sweep.schedules:
        name = f"{series}@{key_of(setting, order_of(setting))[:6]}"
        yield Point(name, "merged", name, None, sweep, method, setting, joint)


def lams_of(sweep: SweepSettings) -> tuple[float, ...]:
    """Return the λs of a method that has one; the paper's, if neither numbers nor schedules are set."""
    if sweep.lam is None:
        return () if sweep.schedules else DEFAULT_LAMS
    return sweep.lam


class Output(NamedTuple):
    """The form in which merged models are measured and written.

    Attributes:
        served_as: `auto` is an adapter if that represents the recipe exactly.
        dtype: Dtype of the tensors, as safetensors names it; if `None`, the base's own, or float32 for an adapter.
        rounding: How values are rounded to that dtype.
        config_from: The side that their configuration comes from, if it has one.
        tokenizer_from: The side that their tokenizer, chat templates and processors come from, if it has them.
    """

    served_as: Wanted = "auto"
    dtype: str | None = None
    rounding: Rounding = "nearest"
    config_from: Side = "tuned"
    tokenizer_from: Side = "tuned"


def members_at(
    point: Point,
    base: Checkpoint,
    tuned: Mapping[str, Weights],
    output: Output | None = None,
    models: Mapping[str, Weights] = NO_MODELS,
    inputs: Mapping[tuple[Asked, str], InputStatistics] = NO_INPUTS,
) -> list[Member]:
    """Return the models at a point: one for each tuned model, or one for all.

    Merged models are in the form in which they will be written, tuned models in the form in which they were given.

    Args:
        point: The point.
        base: The base.
        tuned: The tuned models, by name.
        output: The form of merged models.
        models: Other models that a method needs, by their names in the settings.
        inputs: Statistics of inputs, by guard or task and the model's fingerprint; as long as there are none, a merge's
            form is known, but not its weights.

    Raises:
        ConfigError: an adapter is requested, but the recipe is not one.
    """
    if point.role == "base":
        return [Member("base", point, None, Variant(base))]
    groups: dict[str, Any] = {ALL: tuple(tuned.values())} if point.is_joint else dict(tuned)
    variants = {name: _variant(point, base, weights, models, inputs) for name, weights in groups.items()}
    members = [Member(f"{point.name}/{name}", point, name, variant) for name, variant in variants.items()]
    if point.role == "tuned":
        dtype = output.dtype if output is not None else None
        return [m._replace(variant=as_given(replace(m.local_variant, dtype=dtype))) for m in members]
    return [m._replace(variant=as_output(m.local_variant, output)) for m in members]


def as_output(variant: Variant, output: Output | None) -> Variant:
    """Return a merge in the form in which it will be written.

    Raises:
        ConfigError: an adapter is requested, but the recipe is not one.
    """
    form = output or Output()
    plain = replace(
        variant,
        dtype=form.dtype,
        rounding=form.rounding,
        config_from=form.config_from,
        tokenizer_from=form.tokenizer_from,
    )
    return in_form(plain, form.served_as)


def guards_of(sweep: SweepSettings) -> dict[str, Asked]:
    """Return the prompts whose inputs of layers a merge needs, by the names that methods give them."""
    asked: dict[str, Asked | None] = dict(zip(INPUTS, (sweep.guard, sweep.task), strict=True))
    return {name: settings for name, settings in asked.items() if settings is not None}


def _inputs_of(
    sweep: SweepSettings,
    base: Checkpoint,
    tuned: Weights | tuple[Weights, ...],
    inputs: Mapping[tuple[Asked, str], InputStatistics],
) -> dict[str, InputStatistics]:
    """Return a merge's statistics, by the names that methods give them; empty until they are collected."""
    if not inputs or isinstance(tuned, tuple):
        return {}
    models = dict(zip(INPUTS, (base, tuned), strict=True))
    return {name: inputs[asked, models[name].fingerprint] for name, asked in guards_of(sweep).items()}


def _variant(
    point: Point,
    base: Checkpoint,
    tuned: Weights | tuple[Weights, ...],
    models: Mapping[str, Weights],
    inputs: Mapping[tuple[Asked, str], InputStatistics],
) -> Variant:
    if point.step is not None:
        assert not isinstance(tuned, tuple)
        if point.ema is None:
            return Variant(base, snapshot_of(tuned, base, point.step))
        return averaged(tuned, base, point.step, point.ema)
    sweep = point.sweep
    if sweep is None or point.method is None:
        return Variant(base, tuned)  # Linear at λ=1 is the tuned model, bit for bit
    return Variant(
        base,
        tuned,
        point.method,
        1.0 if point.setting is None else point.setting,
        sweep.parameters,
        sweep.seed,
        {name: models[model] for name, model in sweep.models.items()},
        _inputs_of(sweep, base, tuned, inputs),
    )


def path_points(settings: PathSettings | None, steps: Sequence[int]) -> list[Point]:
    """Return the points of the tuning's own path: snapshots after these steps, and their averages."""
    if settings is None:
        return []
    kinds: list[tuple[str, float | None]] = [("snapshots", None)] if settings.snapshots else []
    kinds += [(f"snapshots(ema={settings.ema:g})", settings.ema)] if settings.ema else []
    return [
        Point(f"{series}@{step}", "merged", series, None, step=step, ema=ema) for series, ema in kinds for step in steps
    ]


def check_sweep(sweep: SweepSettings, method: Method, num_tuned: int) -> None:
    """Check that the method takes these models and parameters.

    Raises:
        BackmergeError: it does not.
    """
    if "lam" in sweep.parameters:
        raise ConfigError("'lam' is among the method's other parameters", remedy="give λ with 'lam' instead.")
    checked(
        method,
        num_tuned=num_tuned if is_joint(sweep, method) else 1,
        models=tuple(sweep.models),
        inputs=guards_of(sweep),
        parameters=sweep.parameters,
    )
    if not method.has_lam and (sweep.lam or sweep.schedules):
        raise ConfigError(
            f"{sweep.method} has no λ: it computes its own ratio",
            remedy="remove 'lam' and 'schedules'; it is measured as one point next to the others.",
        )


def check_recipe(point: Point, base: Checkpoint, num_tuned: int) -> None:
    """Check that the settings of a merge have a value for every tensor of the base, within their ranges.

    Raises:
        MergeError: a pattern matches nothing, a tensor has no row, or λ is outside its range.
    """
    sweep = point.sweep
    if sweep is None or point.method is None:
        return
    # settings depend only on the tensors' names: the base represents all models
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
    """Check that the tuning is long enough for a snapshot, if its path is measured.

    Raises:
        ConfigError: it is not.
    """
    tuning = experiment.finetune
    if experiment.path is None or tuning is None or tuning.keep_every is None:
        return
    fewest = min(num_steps(tuning, len(data.training)) for data in training.values())
    if fewest < tuning.keep_every:
        raise ConfigError(
            f"finetune.keep_every is {tuning.keep_every}, but the tuning has {fewest} steps: none would be stored",
            remedy="lower it.",
        )


SNAPSHOTS = "snapshots"  # fine-tuning's name of the folder that contains `step-N`


def steps_kept(tuned: Sequence[Weights]) -> list[int]:
    """Return the steps at which a snapshot of every tuned model was stored.

    Raises:
        RunError: there are none.
    """
    found = [{int(place.name.removeprefix("step-")) for place in _folder(each).glob("step-*")} for each in tuned]
    steps = sorted(set.intersection(*found)) if found else []
    if not steps:
        raise RunError(
            "no snapshots of the tuning were stored",
            remedy="set finetune.keep_every to a number of steps; the models are then trained again, with snapshots.",
        )
    return steps


def snapshot_of(tuned: Weights, base: Checkpoint, step: int) -> Weights:
    """Return the model after this many steps."""
    return open_weights(_folder(tuned) / f"step-{step}", base)


def averaged(tuned: Weights, base: Checkpoint, step: int, decay: float) -> Variant:
    """Return the moving average of snapshots up to a step: m ← decay·m + (1 - decay)·snapshot, m₁ the first.

    An average of deltas is the delta of the average, so this is an ordinary recipe.
    """
    steps = [kept for kept in steps_kept([tuned]) if kept <= step]
    shares = [(1.0 if place == 0 else 1 - decay) * decay ** (len(steps) - 1 - place) for place in range(len(steps))]
    snapshots = tuple(snapshot_of(tuned, base, kept) for kept in steps)
    if len(snapshots) == 1:
        return Variant(base, snapshots[0])
    return Variant(base, snapshots, task_arithmetic, 1.0, {"weight": shares})


def _folder(tuned: Weights) -> Path:
    return tuned.directory / SNAPSHOTS
