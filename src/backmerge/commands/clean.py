"""`backmerge clean`: show what takes up space in a run, and remove what its results do not need."""

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
            metavar="PART,...",
            help="Remove everything except these parts, e.g. merged,report. Settings, results and log are always kept.",
        ),
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="Remove the cached answers of all runs ($BACKMERGE_CACHE) instead.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
) -> None:
    """Show what takes up space in a run, and remove unneeded files.

    By default this removes the stored answers that a run continues from (units), unconfirmed models, and leftovers of
    killed processes. Merged and tuned models, records, results and report are kept. If you repeat the run's command
    afterwards, it generates the answers again.

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
            raise ConfigError("--cache is not for a single run", remedy="omit RUN and --all-but, or --cache.")
        files = cached_answers()
        if not files:
            typer.echo("No answers are cached.")
            return
        typer.echo(f"{size_text(bytes_of(files))} of cached answers in {files[0].parent}")
        if not dry_run and _is_agreed("Remove them? Later runs will generate them again.", is_given=yes):
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
    """Return whether the user agrees, by option or at the terminal.

    Raises:
        ConfigError: there is no terminal.
    """
    if is_given:
        return True
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(
            "there is no terminal to ask for confirmation, so nothing was removed", remedy="add --yes or --dry-run."
        )
    return typer.confirm(question)
