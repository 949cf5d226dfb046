"""What is measured: points on the way from base to tuned, and the models that stand at each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from backmerge.checkpoints.reader import Checkpoint, Weights
from backmerge.merging.recipe import Variant, lam_name
from backmerge.pipeline.experiment import SweepSettings

Role = Literal["base", "tuned", "merged"]


class Point(NamedTuple):
    """A place on the way; with several tuned models, one model of each stands there.

    Attributes:
        name: `base`, `tuned`, or such as `linear@0.4`.
        series: What varies only in λ, such as `linear`.
    """

    name: str
    role: Role
    series: str
    lam: float
    sweep: SweepSettings | None = None


class Member(NamedTuple):
    """One model at a point.

    Attributes:
        name: Such as `linear@0.4/seed-42`.
        point: Where it stands.
        tuned: The name of the tuned model that it comes from; `None` for the base.
        variant: Its weights.
    """

    name: str
    point: Point
    tuned: str | None
    variant: Variant


BASE = Point("base", "base", "base", 0.0)
TUNED = Point("tuned", "tuned", "tuned", 1.0)


def points_of(sweeps: Sequence[SweepSettings]) -> list[Point]:
    """Base, tuned, and every merge, by method and λ; what is asked for twice is there once."""
    merged: dict[str, Point] = {}
    for sweep in sweeps:
        named = dict(sorted(sweep.parameters.items())) | ({"seed": sweep.seed} if sweep.seed else {})
        inside = ",".join(f"{key}={value}" for key, value in named.items())
        series = f"{sweep.method}({inside})" if inside else sweep.method
        for lam in sorted(sweep.lam):
            name = f"{series}@{lam_name(lam)}"
            merged.setdefault(name, Point(name, "merged", series, lam, sweep))
    return [BASE, TUNED, *merged.values()]


def members_at(point: Point, base: Checkpoint, tuned: Mapping[str, Weights], dtype: str | None = None) -> list[Member]:
    """The models at a point, one for each tuned model; merged in a dtype (as safetensors names it), or the base's."""
    if point.role == "base":
        return [Member("base", point, None, Variant(base))]
    return [
        Member(f"{point.name}/{name}", point, name, replace(_variant(point, base, weights), dtype=dtype))
        for name, weights in tuned.items()
    ]


def _variant(point: Point, base: Checkpoint, tuned: Weights) -> Variant:
    if point.sweep is None:
        return Variant(base, tuned)  # Linear at λ=1 is the tuned model, bit for bit
    sweep = point.sweep
    return Variant(base, tuned, sweep.method, point.lam, sweep.parameters, sweep.seed)
