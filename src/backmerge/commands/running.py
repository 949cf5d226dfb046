"""Run an experiment from the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from backmerge.errors import NotShownError
from backmerge.generation.quiet import quieten
from backmerge.registry import NOTHING_ALLOWED, Permissions

if TYPE_CHECKING:
    from backmerge.config import Document
    from backmerge.planning.settings import Experiment
    from backmerge.results import RestoreResults


def run_document(
    document: Document,
    overrides: Sequence[str],
    out: Path,
    permissions: Permissions = NOTHING_ALLOWED,
    *,
    strict: bool = False,
    report_to: Sequence[str] = (),
    shard: str | None = None,
) -> None:
    """Run the experiment that a document describes, and print the results.

    Args:
        document: Settings, from a file or from options.
        overrides: `key.path=value` options.
        out: The run directory.
        permissions: The user's code and model-written code that may run.
        strict: Whether any verdict but `restored` is an error.
        report_to: Trackers that the results go to.
        shard: `I/N`, to do only that part, before λ is chosen.

    Raises:
        NotShownError: under `strict`.
        BackmergeError: a user error.
    """
    from backmerge.config import validated, with_overrides
    from backmerge.planning.settings import Experiment

    document = with_overrides(document, overrides)
    experiment = validated(Experiment, document)
    if shard is not None:
        run_part(experiment, out, shard, permissions)
        return

    def run() -> RestoreResults:
        from backmerge.pipeline.stages import run_experiment

        return run_experiment(experiment, out, permissions, document=document).results

    carry_out(run, out, permissions, strict=strict, report_to=report_to)


def carry_out(
    run: Callable[[], RestoreResults],
    out: Path,
    permissions: Permissions = NOTHING_ALLOWED,
    *,
    strict: bool,
    report_to: Sequence[str],
) -> None:
    """Run an experiment, print the results and send them to trackers.

    Args:
        run: Function that runs it.
        out: Its run directory.
        permissions: What trackers may run.
        strict: Whether any verdict but `restored` is an error.
        report_to: Trackers that the results go to.

    Raises:
        NotShownError: under `strict`.
        BackmergeError: a user error.
    """
    quieten()
    from backmerge.reporting.console import print_summary
    from backmerge.reporting.findings import limiting
    from backmerge.sharing.trackers import check_trackers
    from backmerge.sharing.trackers import report_to as send

    check_trackers(report_to, permissions)  # fail before hours of work
    with stoppable(out):
        results = run()
    print_summary(results, out)
    send(report_to, out, permissions)
    verdict = results.confirmation.verdict
    if strict and verdict != "restored":
        limits = ", ".join(finding.name for finding in limiting(results))
        raise NotShownError(
            f"the verdict is '{verdict}'{f' ({limits})' if limits else ''}, and --strict requires 'restored'"
        )


def run_part(experiment: Experiment, out: Path, shard: str, permissions: Permissions) -> None:
    """Run part `I/N` of an experiment, up to the choice of λ."""
    quieten()
    from backmerge.pipeline.sharding import run_shard, shard_of

    with stoppable(out):
        done = run_shard(experiment, out, shard_of(shard), permissions)
    typer.echo(done.sentence)


@contextmanager
def stoppable(out: Path) -> Iterator[None]:
    """If Ctrl-C stops the block, print how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"Stopped. Finished work is kept: run the same command again to continue with {out}.", err=True)
        raise
