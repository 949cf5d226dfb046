"""mergekit, in a virtual environment of its own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

VERSION = "0.1.5"
DEFAULT = Path(".venv-mergekit")
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def mergekit_python(given: Path | None) -> Path:
    """The interpreter that has mergekit: the given one, or that of `.venv-mergekit`, which is made if it is not there.

    As in the Makefile, TORCH (such as torch==2.13.0) and PIP_ARGS decide what pip is asked for.

    Raises:
        SystemExit: the given interpreter has another mergekit, or none.
    """
    if given is None:
        given = DEFAULT / "bin/python"
        if not (DEFAULT / ".done").exists():
            _make()
    find = "from importlib.metadata import version; print(version('mergekit'))"
    found = subprocess.run([given, "-c", find], capture_output=True, text=True, check=False).stdout.strip()
    if found != VERSION:
        raise SystemExit(f"{given} has mergekit '{found}', and {VERSION} is compared with")
    return given.absolute()  # not resolved: its own name is what makes it the environment's interpreter


def _make() -> None:
    pin = re.search(r"^torch==\S+$", CONSTRAINTS.read_text(), re.MULTILINE)
    assert pin is not None
    torch = os.environ.get("TORCH") or pin[0]
    pip = [str(DEFAULT / "bin/python"), "-m", "pip", "install", "--quiet"]
    print(f"Setting up {DEFAULT} (minutes the first time) ...", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(DEFAULT)], check=True)
    subprocess.run([*pip, *shlex.split(os.environ.get("PIP_ARGS", "")), torch, f"mergekit=={VERSION}"], check=True)
    (DEFAULT / ".done").touch()
