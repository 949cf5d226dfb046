"""Maps a function over independent units of work: in this process, in a pool of worker processes, or on Ray.

A unit is a key and plain data; the function is named as `module:function`, takes the data and a way to tell of its
progress, and returns plain data. What it makes for others to read it writes into the run directory, each file whole or
not at all, so that a unit may be stopped anywhere and done again, here or elsewhere, or by two at once.

All three give the same results, the same errors and the same count of steps.

| executor | a unit runs in | a worker that dies |
|---|---|---|
| `in-process` | this process, one after another | is this process |
| `pool` | one of several processes of this machine, each with its own GPUs | is replaced, and its unit done again |
| `ray` | a task of a Ray cluster | Ray starts another elsewhere, and we send the unit again |
"""

from backmerge.execution.dispatch import ExecutionSettings, Executor, executor_of
from backmerge.execution.work import Work

__all__ = ["ExecutionSettings", "Executor", "Work", "executor_of"]
