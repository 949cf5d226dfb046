"""Report a finished run's results to MLflow, Weights & Biases or Trackio, once for each tracker."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from backmerge.errors import ConfigError, RunError
from backmerge.progress import say
from backmerge.registry import NOTHING_ALLOWED, TRACKERS, Permissions, resolve
from backmerge.reporting.card_reading import json_object
from backmerge.reporting.report import read_run
from backmerge.runs import key_of, write_whole
from backmerge.sharing.tracked import Tracked, tracked, write_files

PROJECT = "backmerge"  # the project of runs, unless the tracker's own settings name one
REPORTED = "reported.json"  # in the run: which tracker has which results

Tracker = Callable[[Tracked, Path], str]


def check_trackers(names: Sequence[str], permissions: Permissions = NOTHING_ALLOWED) -> None:
    """Check that each is known and installed, before a run that takes hours.

    Raises:
        ConfigError: one is unknown, its library is missing, or it is the user's own code and that is not allowed.
    """
    for name in names:
        if name in TRACKERS.entries and importlib.util.find_spec(name) is None:
            raise ConfigError(f"{name} is not installed", remedy=f"pip install 'backmerge[{name}]'")
        resolve(TRACKERS, name, permissions)


def report_to(names: Sequence[str], directory: Path, permissions: Permissions = NOTHING_ALLOWED) -> None:
    """Report a finished run to trackers, each result only once.

    Args:
        names: Names in the table of trackers, or `package.module:function`: called with the data (`Tracked`) and a
            folder of files, it returns where to look, and raises `ConnectionError` if the tracker cannot be reached.
        directory: The run directory.
        permissions: What may be run.

    Raises:
        ConfigError: see `check_trackers`.
        RunError: the run is not finished, or a tracker cannot be reached; the results stay as they are.
    """
    if not names:
        return
    check_trackers(names, permissions)
    run = read_run(directory)
    told, key = dict(json_object(directory / REPORTED)), key_of(run.results.plain())
    for name in dict.fromkeys(names):
        if told.get(name) == key:
            say(f"{name} already has these results; to report them again, delete {directory / REPORTED}.")
            continue
        tracker: Tracker = resolve(TRACKERS, name, permissions)
        with tempfile.TemporaryDirectory() as place:
            write_files(run, directory, Path(place))
            where = _carried_out(tracker, name, tracked(run), Path(place))
        told[name] = key
        write_whole(directory / REPORTED, json.dumps(told, indent=2) + "\n")
        say(f"Reported to {name}: {where}")


def _carried_out(tracker: Tracker, name: str, what: Tracked, place: Path) -> str:
    try:
        return tracker(what, place)
    except ConnectionError as error:
        raise RunError(
            f"cannot report to {name}: {error}",
            remedy=f"the run is finished; fix that, and run the same command again to report to {name}.",
        ) from error
