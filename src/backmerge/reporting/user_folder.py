"""Add a command's files to a user's folder, without replacing the user's files."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from backmerge.errors import RunError
from backmerge.runs import write_whole

ADDED = ".backmerge-files.json"  # lists the files that commands added to a user's folder


@contextlib.contextmanager
def added_to(out: Path) -> Iterator[Path]:
    """Make a temporary folder to fill; its files then go into the user's folder `out`, replacing only earlier ones.

    `out` keeps a list of the files that were added this way.

    Raises:
        RunError: `out` has a file with such a name that was not added this way.
    """
    with tempfile.TemporaryDirectory(prefix="backmerge-") as temporary:
        made = Path(temporary)
        yield made
        names = sorted(str(file.relative_to(made)) for file in made.rglob("*") if file.is_file())
        try:
            known = set(TypeAdapter(list[str]).validate_json((out / ADDED).read_bytes()))
        except (OSError, ValidationError):
            known = set()
        foreign = next((name for name in names if os.path.lexists(out / name) and name not in known), None)
        if foreign is not None:
            raise RunError(
                f"{out / foreign} already exists, and {ADDED} does not list it as written by backmerge",
                remedy="give another --out, or move that file elsewhere.",
            )
        write_whole(out / ADDED, json.dumps(sorted(known.union(names))) + "\n")
        for name in names:
            write_whole(out / name, (made / name).read_bytes())
