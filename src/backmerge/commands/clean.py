"""`backmerge clean`: what takes space in a run, and removing what its results do not need."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backmerge.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from backmerge.pipeline.cleaning import Space


def clean(
    run: Annotated[Path | None, typer.Argument(help="A run directory.")] = None,
    all_but: Annotated[
        str | None,
        typer.Option(
            metavar="PARTS",
            help="Remove everything but these, such as merged,report; settings, results and log stay always.",
        ),
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="Remove the answers kept for later runs ($BACKMERGE_CACHE) instead.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
) -> None:
    """Say what takes space in a run, and remove what its results do not need.

    By default that is: answers unit by unit, unconfirmed models, and what killed processes left. Merged and tuned
    models, records, results and report stay. A cleaned run that is given again makes its answers anew.

    Example: backmerge clean runs/demo --dry-run

    Only the model and the report: backmerge clean runs/demo --all-but merged,report --yes
    """
    from backmerge.pipeline.cleaning import (
        bytes_of,
        cached_answers,
        check_finished,
        clean_cache,
        space_of,
        to_remove,
    )
    from backmerge.pipeline.cleaning import clean as clean_run
    from backmerge.progress import size_text

    if cache:
        if run is not None or all_but is not None:
            raise ConfigError("--cache is of no single run", remedy="leave RUN and --all-but away, or --cache.")
        files = cached_answers()
        if not files:
            typer.echo("No answers are cached.")
            return
        typer.echo(f"{size_text(bytes_of(files))} of cached answers in {files[0].parent}")
        if not dry_run and _is_agreed("Remove them? Later runs make them anew.", is_given=yes):
            typer.echo(f"Removed {size_text(clean_cache())}.")
        return
    if run is None:
        raise ConfigError("which run?", remedy="backmerge clean RUN, or --cache.")
    kept = None if all_but is None else [name.strip() for name in all_but.split(",") if name.strip()]
    spaces = space_of(run)
    leaving = to_remove(spaces, kept)
    _tell(spaces, leaving)
    check_finished(run, leaving)
    if not leaving:
        typer.echo("There is nothing to remove.")
        return
    typer.echo(f"To remove: {size_text(sum(space.num_bytes for space in leaving))}. Then:")
    for space in leaving:
        if space.part.lost != "nothing":
            typer.echo(f"  without {space.part.name}, {space.part.lost}")
    if not dry_run and _is_agreed("Remove?", is_given=yes):
        typer.echo(f"Removed {size_text(clean_run(run, kept))} from {run}.")


def _tell(spaces: Sequence[Space], leaving: Sequence[Space]) -> None:
    from backmerge.progress import size_text

    gone = {space.part.name for space in leaving}
    for space in sorted(spaces, key=lambda space: -space.num_bytes):
        fate = "remove" if space.part.name in gone else "keep"
        typer.echo(f"{size_text(space.num_bytes):>9}  {fate:6}  {space.part.name:11}  {space.part.what}")


def _is_agreed(question: str, *, is_given: bool) -> bool:
    """Whether the user agrees, by option or at the terminal.

    Raises:
        ConfigError: there is nobody to ask.
    """
    if is_given:
        return True
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("nobody is here to be asked, so nothing was removed", remedy="add --yes, or --dry-run.")
    return typer.confirm(question)
