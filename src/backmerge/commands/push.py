"""`backmerge push`: a merged model to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backmerge.errors import RunError

if TYPE_CHECKING:
    from backmerge.sharing.folder import Package
    from backmerge.sharing.pushing import Destination


def push(
    directory: Annotated[Path, typer.Argument(help="A merged model's folder; or a run with one in its merged/.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository, made if absent.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it; private otherwise.")] = False,
    revision: Annotated[str, typer.Option(help="The branch, made if absent.")] = "main",
    unconfirmed: Annotated[
        bool,
        typer.Option("--unconfirmed", help="Send a model though it was not shown to be safe; its card says so."),
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Put this model in the place of another one that is there.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would go where; the hub is not asked.")
    ] = False,
) -> None:
    """Send a merged model to the Hugging Face hub: weights, configuration, tokenizer, card and recipe, nothing else.

    It goes in one commit, whole or not at all; stopped, the same command goes on. Prompts, answers and records of the
    run never go. Log in first with `hf auth login`, or put a token into HF_TOKEN.

    Example: backmerge push runs/mine me/my-model-restored --dry-run
    """
    from backmerge.sharing.folder import CARD, package_of
    from backmerge.sharing.hub_faults import check_name
    from backmerge.sharing.places import model_in
    from backmerge.sharing.pushing import Destination

    check_name(repo)  # also where nothing is sent: a dry run is there to find this
    package = package_of(model_in(directory, may_be_unconfirmed=unconfirmed))
    if not package.is_confirmed and not unconfirmed:
        raise RunError(
            f"the model in {package.directory} was not shown to be as safe as its base, by its {CARD}",
            remedy="look at the run's report.html; --unconfirmed sends it all the same, with a card that says so.",
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
        changed = "  (without the names of this machine's folders)" if isinstance(file.content, bytes) else ""
        typer.echo(f"  {size_text(file.size):>10}  {file.name}{changed}")
    typer.echo(f"  {size_text(package.size):>10}  in all, from {package.directory}")
    if package.kept:
        typer.echo(f"What stays here: {', '.join(package.kept)}.")
    typer.echo("Nothing was sent, and the hub was not asked.")


def _send(package: Package, to: Destination) -> None:
    from backmerge.sharing.pushing import push as push_package

    try:
        done = push_package(package, to)
    except KeyboardInterrupt:
        typer.echo(
            f"Stopped. Nothing of it is seen in {to.repo} yet; the same command goes on, without sending again what "
            "was sent.",
            err=True,
        )
        raise
    if done.deleted:
        typer.echo(f"Removed there, of another model: {', '.join(done.deleted)}.")
    typer.echo(done.url if done.is_new else f"{to.repo} holds this model already: {done.url}")
