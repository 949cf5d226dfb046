"""Define the base class of executors, and return the one that the settings name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

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
    """Where work runs; results do not depend on it."""

    executor: Literal["in-process", "pool", "ray"] = Field(
        "in-process", description="In this process, in a pool of processes of this machine, or on a Ray cluster."
    )
    num_workers: PositiveInt | None = Field(
        None, description="Processes of the pool; by default as many as there are GPUs for, or one without GPUs."
    )
    num_gpus: NonNegativeFloat | None = Field(
        None, description="GPUs per unit: 0.5 lets two units share one. By default 1 if there are GPUs, else 0."
    )
    num_cpus: NonNegativeFloat = Field(1, description="CPU cores that Ray reserves for one unit.")
    ray_address: str | None = Field(
        None, description="The cluster, such as ray-head:6379 or ray://host:10001; by default as ray.init() finds it."
    )
    ray_runtime_env: dict[str, Any] = Field(
        default_factory=dict, description="Passed to ray.init, such as {working_dir: .} to ship your own code."
    )
    retries: NonNegativeInt = Field(2, description="How often a unit is repeated if its worker or node dies.")

    @field_validator("num_gpus")
    @classmethod
    def _whole_above_one(cls, num_gpus: float | None) -> float | None:
        if num_gpus is not None and num_gpus > 1 and num_gpus != int(num_gpus):
            raise ValueError("a unit takes a part of one GPU, or a whole number of them")
        return num_gpus


class Executor(ABC):
    """Does units of one function. Processes and connections are started when first needed, and kept between calls.

    Use it in a `with` statement: whatever it started is stopped at its end, also after an error or Ctrl-C.

    Args:
        function: `module:function`; takes a unit's spec and an `Advance`, to which it reports its steps, and returns
            plain data. It writes files for others into `shared`, by absolute paths.
        settings: Where units run.
        shared: A directory that all workers see, such as the run directory.
    """

    def __init__(self, function: str, settings: ExecutionSettings, shared: Path) -> None:
        self.function = function
        self.settings = settings
        self.shared = shared

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def carry_out(self, works: Sequence[Work], *, advance: Advance, on_done: OnDone) -> list[Any]:
        """Do all units; return their results in the order of the units.

        Args:
            works: The units.
            advance: The driver's progress bar; called once for each step, however often a unit is repeated.
            on_done: Called with each unit and its result, in the order in which they finish, in this process.

        Raises:
            BackmergeError: the first error of a unit, or a unit whose workers died repeatedly; the other units are
                stopped.
            OSError: the system refused something to a unit.
            WorkerError: another exception in a unit that ran in another process; in this process it is not wrapped.
            ValueError: two units share a key.
            TypeError: a spec is not plain data.
        """
        check_keys(works)
        plain = [Work(work.key, plain_copy(work.spec)) for work in works]
        return self._carry_out(plain, ProgressAggregator(advance), on_done) if plain else []

    @abstractmethod
    def _carry_out(self, works: Sequence[Work], told: ProgressAggregator, on_done: OnDone) -> list[Any]:
        """Do at least one unit."""

    def release(self) -> None:  # noqa: B027 - nothing to stop by default
        """Stop everything that was started, which frees its memory; the next call starts it again."""


class InProcess(Executor):
    """Does units in this process, one after another; errors are not wrapped."""

    def _carry_out(self, works: Sequence[Work], told: ProgressAggregator, on_done: OnDone) -> list[Any]:
        do = function_of(self.function)
        results = []
        for work in works:

            def tell(steps: int, note: str, key: str = work.key) -> None:
                told.reached(key, steps, note)

            result = plain_copy(do(plain_copy(work.spec), Counter(tell, every=0.0)))
            results.append(result)
            on_done(work, result)
        return results


def executor_of(
    function: str | Function, settings: ExecutionSettings, *, shared: Path, plugins: Sequence[str] = ()
) -> Executor:
    """Return the executor that the settings name, for one function; nothing is started yet.

    Args:
        function: The function of the units, or its name; see `Executor`.
        settings: Where units run.
        shared: A directory that all workers see; the output of a pool's workers is in its folder `workers`.
        plugins: The user's own code (`module:function`) that units use, shipped to Ray's workers.

    Raises:
        ValueError: no other process could find the function.
    """
    name = name_of(function)
    if settings.executor == "pool":
        from backmerge.execution.pool import Pool

        return Pool(name, settings, shared)
    if settings.executor == "ray":
        from backmerge.execution.ray_cluster import RayCluster

        return RayCluster(name, settings, shared, plugins)
    return InProcess(name, settings, shared)
