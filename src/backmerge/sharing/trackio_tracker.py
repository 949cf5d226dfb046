"""Trackio: settings as its config, figures and curves as metrics whose step is λ in thousandths, files as an artifact.

The destination is set by TRACKIO_SPACE_ID, TRACKIO_SERVER_URL; a local database by default (TRACKIO_DIR). A
space on the hub is made private.
"""

from __future__ import annotations

import os
from pathlib import Path

from backmerge.sharing.tracked import Tracked, steps_of
from backmerge.sharing.trackers import PROJECT


def log(what: Tracked, place: Path) -> str:
    """Write a run; return its place.

    Raises:
        ConnectionError: its server or space cannot be reached.
    """
    import trackio

    project = os.environ.get("TRACKIO_PROJECT") or PROJECT
    try:
        run = trackio.init(
            project=project,
            name=what.name,
            config={**what.settings, **what.findings},
            private=True,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        try:
            for step, values in steps_of(what).items():
                trackio.log(values, step=step)
            trackio.log(dict(what.figures))
            trackio.log_artifact(place, name=f"report-{what.name}", type="report")
        finally:
            trackio.finish()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConnectionError(str(error)) from error
    return f"run '{run.name}' of project '{project}'; see it with `trackio show`"
