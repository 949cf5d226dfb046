"""`backmerge push`, asked as a user does."""

from __future__ import annotations

import typer
from typer.testing import CliRunner

from backmerge.commands.push import push

REPO = "me/restored"


def run_push(*arguments: object) -> str:
    """`backmerge push ...`; gives its output."""
    app = typer.Typer()
    app.command()(push)
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.output
