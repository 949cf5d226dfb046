"""Carrying out an experiment from the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from backmerge.commands.quiet import quieten
from backmerge.errors import NotShownError
from backmerge.registry import NOTHING_ALLOWED, Permissions

if TYPE_CHECKING:
    from backmerge.config import Document
    from backmerge.pipeline.stages import Finished


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
    """Carry out the experiment that a document describes, and say what was found.

    Args:
        document: Settings, from a file or from options.
        overrides: `key.path=value` options.
        out: The run directory.
        permissions: What may be run.
        strict: Whether any verdict but `restored` is an error.
        report_to: Trackers that are told of the results.
        shard: `I/N`, to do only that part, before λ is chosen.

    Raises:
        NotShownError: under `strict`.
        BackmergeError: something that the user can mend.
    """
    from backmerge.config import validated, with_overrides
    from backmerge.planning.settings import Experiment

    document = with_overrides(document, overrides)
    experiment = validated(Experiment, document)
    quieten()
    if shard is not None:
        from backmerge.pipeline.sharding import run_shard, shard_of

        with stoppable(out):
            done = run_shard(
                experiment,
                out,
                shard_of(shard),
                permissions,
            )
        typer.echo(done.sentence)
        return
    from backmerge.pipeline.stages import run_experiment
    from backmerge.reporting.console import print_summary
    from backmerge.reporting.findings import limiting
    from backmerge.sharing.trackers import check_trackers
    from backmerge.sharing.trackers import report_to as tell

    check_trackers(report_to, permissions)  # what is missing is told before hours of work
    with stoppable(out):
        finished: Finished = run_experiment(experiment, out, permissions, document=document)
    print_summary(finished.results, out)
    tell(report_to, out, permissions)
    if strict and finished.verdict != "restored":
        limits = ", ".join(finding.name for finding in limiting(finished.results))
        raise NotShownError(
            f"the verdict is '{finished.verdict}'{f' ({limits})' if limits else ''}, and --strict asks for 'restored'"
        )


@contextmanager
def stoppable(out: Path) -> Iterator[None]:
    """Where Ctrl-C stops the block, say how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"Stopped. What is done is kept: the same command goes on with {out}.", err=True)
        raise
