"""`backmerge doctor`: what this machine can run."""

from __future__ import annotations

import typer


def doctor() -> None:
    """Say what this machine has (devices, memory, disk, extras, sandbox) and what can therefore run.

    Example: backmerge doctor
    """
    from backmerge.doctor import examine

    for finding in examine():
        advice = f"  → {finding.advice}" if finding.advice else ""
        typer.echo(f"{finding.what:14} {finding.state}{advice}")
