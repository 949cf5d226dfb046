"""The demonstration."""

import contextlib
import io
import json
from collections.abc import Iterable
from pathlib import Path

from backmerge.cli import app

SEEDS = (42, 1024, 48763)


def demonstration(directory: Path, tuned: Iterable[Path], *settings: str) -> str:
    """Run `backmerge demo` with models that were tuned before, in place of those that it tunes; gives what it printed.

    Args:
        directory: The run's.
        tuned: Those models.
        settings: More of them.
    """
    given = ("finetune=null", f"tuned={json.dumps([str(place) for place in tuned])}", *settings)
    options = [word for setting in given for word in ("--set", setting)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        app(["demo", "--out", str(directory), *options], standalone_mode=False)
    return printed.getvalue()
