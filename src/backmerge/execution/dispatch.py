"""The one way in: units to whichever executor the settings name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator

from backmerge.config import Settings
from backmerge.execution.work import (
    Counter,
    Function,
    OnDone,
    ProgressAggregator,
    Work,
    check_keys,
    function_of,
    name_of,
    plain_copy,
)
from backmerge.progress import Advance


class ExecutionSettings(Settings):
    """Where work runs; no result depends on it."""

    executor: Literal["in-process", "pool", "ray"] = Field(
        "in-process", description="In this process, in a pool of processes of this machine, or on a Ray cluster."
    )
    num_workers: PositiveInt | None = Field(
        None, description="Processes of the pool; by default as many as the GPUs suffice for, without any GPU one."
    )
    num_gpus: NonNegativeFloat | None = Field(
        None, description="GPUs of one unit: 0.5 lets two share one. By default 1 where there are any, else 0."
    )
    num_cpus: NonNegativeFloat = Field(1, description="CPU cores that Ray reserves for one unit.")
    ray_address: str | None = Field(
        None, description="The cluster, such as ray-head:6379 or ray://host:10001; by default as ray.init() finds it."
    )
    ray_runtime_env: dict[str, Any] = Field(
        default_factory=dict, description="Passed to ray.init, such as {working_dir: .} to ship your own code."
    )
    retries: NonNegativeInt = Field(2, description="How often a unit is done again whose worker or node died.")

    @field_validator("num_gpus")
    @classmethod
    def _whole_above_one(cls, num_gpus: float | None) -> float | None:
        if num_gpus is not None and num_gpus > 1 and num_gpus != int(num_gpus):
            raise ValueError("a unit takes a part of one GPU, or a whole number of them")
        return num_gpus


def carry_out_here(function: str, works: Sequence[Work], told: ProgressAggregator, on_done: OnDone) -> list[Any]:
    """The results, in the order of the units; an error passes as it is.

    Args:
        function: `module:function`.
        works: The units.
        told: Of the driver's bar.
        on_done: Called with each unit and its result.
    """
    do = function_of(function)
    results = []
    for work in works:

        def tell(steps: int, note: str, key: str = work.key) -> None:
            told.reached(key, steps, note)

        counter = Counter(tell, every=0.0)
        result = plain_copy(do(plain_copy(work.spec), counter))
        results.append(result)
        on_done(work, result)
    return results


def carry_out(
    function: str | Function,
    works: Sequence[Work],
    settings: ExecutionSettings,
    *,
    advance: Advance,
    on_done: OnDone,
    shared: Path,
    plugins: Sequence[str] = (),
) -> list[Any]:
    """Do all units; gives their results in the order of the units.

    Args:
        function: `module:function`, or that function: takes a unit's spec and an `Advance`, to which it reports its
            steps, and returns plain data. It writes what others read into `shared`, by absolute paths.
        works: The units.
        settings: Where they run.
        advance: Of the driver's bar; told each step once, however often a unit is done.
        on_done: Called with each unit and its result, in the order in which they end, in this process.
        shared: A directory that all workers see, such as the run directory; what workers of a pool print is in its
            folder `workers`.
        plugins: The user's own code (`module:function`) that units use, shipped to Ray's workers.

    Raises:
        BackmergeError: the first that a unit raised, or a unit whose workers died again and again; the other units
            are stopped.
        OSError: the system refused something to a unit.
        WorkerError: another exception in a unit that ran in another process; in this process it passes as it is.
        ValueError: two units share a key, or no other process could find the function.
        TypeError: a spec is no plain data.
    """
    check_keys(works)
    name = name_of(function)
    plain = [Work(work.key, plain_copy(work.spec)) for work in works]
    told = ProgressAggregator(advance)
    if not plain:
        return []
    if settings.executor == "pool":
        from backmerge.execution.pool import carry_out_in_pool

        return carry_out_in_pool(name, plain, settings, told, on_done, shared / "workers")
    if settings.executor == "ray":
        from backmerge.execution.ray_cluster import carry_out_on_ray

        return carry_out_on_ray(name, plain, settings, told, on_done, shared, plugins)
    return carry_out_here(name, plain, told, on_done)
