"""Define a unit of work, the function that does it, and how its progress reaches the driver."""

from __future__ import annotations

import importlib
import inspect
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from backmerge import errors
from backmerge.errors import BackmergeError
from backmerge.progress import Advance

Function = Callable[[Mapping[str, Any], Advance], Any]
OnDone = Callable[["Work", Any], None]


class Work(NamedTuple):
    """A unit: it may be stopped at any time and repeated, also by two workers at once, with the same result.

    Attributes:
        key: Its name in messages and logs; unique within a call.
        spec: Plain data (as in JSON) that fully describes the work.
    """

    key: str
    spec: Mapping[str, Any]


def name_of(function: str | Function) -> str:
    """Return the name `module:function` of a function that another process can find.

    Raises:
        ValueError: it is not a top-level function of an importable module.
    """
    name = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
    module, _, attribute = name.partition(":")
    if module == "__main__" or not attribute.isidentifier():
        raise ValueError(f"{name} is not a top-level function of a module, so no other process can find it")
    if not isinstance(function, str) and function_of(name) is not function:
        raise ValueError(f"{name} names a different function from the one given")
    return name


def function_of(name: str) -> Function:
    """Return the function with that name."""
    module, _, attribute = name.partition(":")
    function: Function = getattr(importlib.import_module(module), attribute)
    return function


def plain_copy(value: Any) -> Any:
    """Return a value after a round trip through JSON, as every executor sends it; tuples become lists.

    Raises:
        TypeError: it contains something that is not plain data.
    """
    return json.loads(json.dumps(value))


def check_keys(works: Sequence[Work]) -> None:
    """Check that no two units share a key.

    Raises:
        ValueError: two units share a key.
    """
    keys = [work.key for work in works]
    if len(set(keys)) < len(keys):
        raise ValueError(f"two units have the key {next(key for key in keys if keys.count(key) > 1)}")


class Counter:
    """The `Advance` that a unit gets: counts its steps, and reports the sum at intervals.

    Args:
        tell: Called with the steps so far and the latest note.
        every: Seconds between two reports; the driver gets the rest with the unit's result.
    """

    def __init__(self, tell: Callable[[int, str], None], every: float) -> None:
        self.steps = 0
        self._tell = tell
        self._every = every
        self._last = -float("inf")

    def __call__(self, steps: int, note: str = "", /) -> None:
        """Add finished steps."""
        self.steps += steps
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self._tell(self.steps, note)


class ProgressAggregator:
    """Pass on each unit's steps to the driver's bar; a repeated unit counts only once it passes its old position.

    Args:
        advance: The progress bar's callback.
    """

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._furthest: dict[str, int] = {}

    def reached(self, key: str, steps: int, note: str = "") -> None:
        """Record the steps of a unit since it was (last) started."""
        more = steps - self._furthest.get(key, 0)
        if more > 0:
            self._furthest[key] = steps
            self._advance(more, note)

    def note(self, text: str) -> None:
        """Print a note next to the progress bar, which a plain print would break."""
        self._advance(0, text)


class WorkerError(RuntimeError):
    """A fault of ours (or of the user's own code) in a worker; its text contains the worker's traceback."""


def as_plain(error: Exception) -> dict[str, Any]:
    """Return an error as plain data; a user's own error class is reported as the nearest one of ours."""
    if isinstance(error, BackmergeError):
        kind = next(kind for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
        taken = inspect.signature(kind).parameters
        return {"kind": kind.__name__, **{name: text for name, text in vars(error).items() if name in taken}}
    # errors of the system (disk full, no permission) keep their number, for which the command line has a remedy
    if isinstance(error, OSError) and error.errno is not None:
        name = None if error.filename is None else str(error.filename)
        return {"errno": error.errno, "strerror": error.strerror, "filename": name}
    return {"traceback": "".join(traceback.format_exception(error))}


def from_plain(failure: dict[str, Any], key: str) -> Exception:
    """Return the error of a failed unit, for the driver to raise.

    Args:
        failure: From `as_plain`.
        key: The unit's.
    """
    if "kind" in failure:
        kind: type[BackmergeError] = getattr(errors, failure["kind"])
        return kind(**{name: value for name, value in failure.items() if name != "kind"})
    if "errno" in failure:
        return OSError(failure["errno"], failure["strerror"], failure["filename"])
    return WorkerError(f"the unit '{key}' failed in its worker:\n{failure['traceback']}")
