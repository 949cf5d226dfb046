"""Map a function over independent units of work: in this process, in a pool of worker processes, or on Ray.

A unit is a key and plain data. The function is named as `module:function`, takes the data and a progress callback, and
returns plain data. Files for others are written into the run directory, each completely or not at all, so that a unit
may be stopped at any time and repeated, here or elsewhere, or by two processes at once.

All three give the same results, the same errors and the same number of steps.

| executor | a unit runs in | a worker that dies |
|---|---|---|
| `in-process` | this process, one after another | is this process |
| `pool` | one of several processes of this machine, each with its own GPUs | is replaced, and its unit is repeated |
| `ray` | a task of a Ray cluster | Ray starts another one, and we send the unit again |
"""

from backmerge.execution.dispatch import ExecutionSettings, Executor, executor_of
from backmerge.execution.work import Work

__all__ = ["ExecutionSettings", "Executor", "Work", "executor_of"]
