"""A failure in a worker, as plain data on its way to the driver and as the error it is there."""

from __future__ import annotations

import inspect
import traceback
from typing import Any

from backmerge import errors
from backmerge.errors import BackmergeError


class WorkerError(RuntimeError):
    """A fault of ours (or of the user's own code) in a worker; its text holds the traceback of the worker."""


def as_plain(error: Exception) -> dict[str, Any]:
    """What the driver must know of an error; of a user's own kind, the nearest of ours is told."""
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
