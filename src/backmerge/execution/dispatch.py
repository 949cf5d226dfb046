"""The one way in: units to whichever executor the settings name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backmerge.execution.in_process import carry_out_here
from backmerge.execution.settings import ExecutionSettings
from backmerge.execution.work import Function, OnDone, Told, Work, check_keys, name_of, plain_copy
from backmerge.progress import Advance


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
        function: `module:function`, or that function: takes a unit's spec and an `Advance`, to which it tells its
            steps, and returns plain data. It writes what others read into `shared`, by absolute paths.
        works: The units.
        settings: Where they run.
        advance: Of the driver's bar; told each step once, however often a unit is done.
        on_done: Told of each unit and its result, in the order in which they end, in this process.
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
    told = Told(advance)
    if not plain:
        return []
    if settings.executor == "pool":
        from backmerge.execution.pool import carry_out_in_pool

        return carry_out_in_pool(name, plain, settings, told, on_done, shared / "workers")
    if settings.executor == "ray":
        from backmerge.execution.ray_cluster import carry_out_on_ray

        return carry_out_on_ray(name, plain, settings, told, on_done, shared, plugins)
    return carry_out_here(name, plain, told, on_done)
