"""`backmerge push`: upload a merged model to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backmerge.errors import RunError

if TYPE_CHECKING:
    from backmerge.sharing.folder import Package
    from backmerge.sharing.pushing import Destination


def push(
    directory: Annotated[
        Path, typer.Argument(help="The folder of a merged model, or a run with one model in its merged/.")
    ],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; created if it does not exist.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository public; by default it is private.")
    ] = False,
    revision: Annotated[str, typer.Option(help="The branch; created if it does not exist.")] = "main",
    unconfirmed: Annotated[
        bool,
        typer.Option("--unconfirmed", help="Upload a model that was not shown to be safe; its card says so."),
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace another model in the repository.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be uploaded; does not contact the hub.")
    ] = False,
) -> None:
    """Upload a merged model to the Hugging Face hub. Sends weights, configuration, tokenizer, card and recipe.

    The upload is one commit, so it is complete or does not appear. To continue an interrupted upload, run the same
    command again. Prompts, answers and records of the run are never uploaded. Log in first with `hf auth login`, or put
    a token into HF_TOKEN.

    Example: backmerge push runs/mine me/my-model-restored --dry-run
    """
    from backmerge.sharing.folder import CARD, model_in, package_of
    from backmerge.sharing.hub_faults import check_name
    from backmerge.sharing.pushing import Destination

    check_name(repo)  # a dry run checks this too
    package = package_of(model_in(directory, may_be_unconfirmed=unconfirmed))
    if not package.is_confirmed and not unconfirmed:
        raise RunError(
            f"the model in {package.directory} was not shown to be as safe as its base, according to its {CARD}",
            remedy="read the run's report.html; --unconfirmed uploads it anyway, with a card that says so.",
        )
    to = Destination(repo, revision, is_public=public, may_replace=replace)
    if dry_run:
        _show(package, to)
        return
    _send(package, to)


def _show(package: Package, to: Destination) -> None:
    from backmerge.progress import size_text

    typer.echo(f"To {to.repo}, branch {to.revision}, {'public' if to.is_public else 'private'}:")
    for file in package.files:
        changed = "  (without the paths of this machine)" if isinstance(file.content, bytes) else ""
        typer.echo(f"  {size_text(file.size):>10}  {file.name}{changed}")
    typer.echo(f"  {size_text(package.size):>10}  in total, from {package.directory}")
    if package.kept:
        typer.echo(f"Not uploaded: {', '.join(package.kept)}.")
    typer.echo("Nothing was uploaded, and the hub was not contacted.")


def _send(package: Package, to: Destination) -> None:
    from backmerge.sharing.pushing import push as push_package

    try:
        done = push_package(package, to)
    except KeyboardInterrupt:
        typer.echo(
            f"Stopped. {to.repo} does not show the model yet. Run the same command again to continue; files that the "
            f"hub has are not sent again.",
            err=True,
        )
        raise
    if done.deleted:
        typer.echo(f"Removed from the repository (files of another model): {', '.join(done.deleted)}.")
    typer.echo(done.url if done.is_new else f"{to.repo} already holds this model: {done.url}")
