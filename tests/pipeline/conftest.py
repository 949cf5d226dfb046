"""The demonstration, run once for all tests that look at what it found."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from backmerge.cli import app


class DemoRun(NamedTuple):
    """A finished demonstration: its directory, its results, and what it printed."""

    directory: Path
    results: dict[str, Any]
    printed: str


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    """`backmerge demo`, as a user types it; about two minutes."""
    directory = tmp_path_factory.mktemp("demo") / "run"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        app(["demo", "--out", str(directory)], standalone_mode=False)
    return DemoRun(directory, json.loads((directory / "results.json").read_text()), printed.getvalue())
