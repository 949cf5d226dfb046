"""A unit of work, the function that does it, and how the driver learns how far it is."""

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
    """A unit: it may be stopped anywhere and done again, also by two workers at once, and leaves the same.

    Attributes:
        key: Names it in messages and logs; no two units of one call share it.
        spec: Plain data (what JSON holds) that says all there is to do.
    """

    key: str
    spec: Mapping[str, Any]


def name_of(function: str | Function) -> str:
    """`module:function` of a function that another process can find.

    Raises:
        ValueError: it is no top-level function of a module, or of one that is a program of its own.
    """
    name = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
    module, _, attribute = name.partition(":")
    if module == "__main__" or not attribute.isidentifier():
        raise ValueError(f"{name} is not a top-level function of a module, so no other process can find it")
    if not isinstance(function, str) and function_of(name) is not function:
        raise ValueError(f"{name} names another function than the one given")
    return name


def function_of(name: str) -> Function:
    """The function of that name."""
    module, _, attribute = name.partition(":")
    function: Function = getattr(importlib.import_module(module), attribute)
    return function


def plain_copy(value: Any) -> Any:
    """The value as it is after a way through JSON, which every executor sends it; tuples become lists.

    Raises:
        TypeError: it holds something that is no plain data.
    """
    return json.loads(json.dumps(value))


def check_keys(works: Sequence[Work]) -> None:
    """Assert that no two units share a key.

    Raises:
        ValueError: two do.
    """
    keys = [work.key for work in works]
    if len(set(keys)) < len(keys):
        raise ValueError(f"two units have the key {next(key for key in keys if keys.count(key) > 1)}")


class Counter:
    """The `Advance` that a unit is given: counts its steps, and reports the sum now and then.

    Args:
        tell: Told the steps so far and the latest note.
        every: Seconds between two tellings; the driver learns the rest with the unit's result.
    """

    def __init__(self, tell: Callable[[int, str], None], every: float) -> None:
        self.steps = 0
        self._tell = tell
        self._every = every
        self._last = -float("inf")

    def __call__(self, steps: int, note: str = "", /) -> None:
        """So many more steps."""
        self.steps += steps
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self._tell(self.steps, note)


class ProgressAggregator:
    """What the driver's bar was told, unit by unit: one that is done again is silent until it passes where it was.

    Args:
        advance: The bar's.
    """

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._furthest: dict[str, int] = {}

    def reached(self, key: str, steps: int, note: str = "") -> None:
        """A unit has made so many steps since it was begun (again)."""
        more = steps - self._furthest.get(key, 0)
        if more > 0:
            self._furthest[key] = steps
            self._advance(more, note)

    def note(self, text: str) -> None:
        """Say something next to the bar, which would tear where it is printed."""
        self._advance(0, text)


class WorkerError(RuntimeError):
    """A fault of ours (or of the user's own code) in a worker; its text holds the traceback of the worker."""


def as_plain(error: Exception) -> dict[str, Any]:
    """What the driver must know of an error; of a user's own kind, the nearest of ours is reported."""
    if isinstance(error, BackmergeError):
        kind = next(kind for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
        taken = inspect.signature(kind).parameters
        return {"kind": kind.__name__, **{name: text for name, text in vars(error).items() if name in taken}}
    # the system's refusals (disk full, no right) have a number, by which the command line says what to do
    if isinstance(error, OSError) and error.errno is not None:
        name = None if error.filename is None else str(error.filename)
        return {"errno": error.errno, "strerror": error.strerror, "filename": name}
    return {"traceback": "".join(traceback.format_exception(error))}


def from_plain(failure: dict[str, Any], key: str) -> Exception:
    """The error that a failed unit left, to be raised by the driver.

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
