"""`backmerge run`: run an experiment file or a suite of them, or only check it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backmerge.commands.options import (
    CodeExecution,
    ConfigFrom,
    DryRunOption,
    Plugins,
    ReportTo,
    SetOption,
    ShardOption,
    Strict,
    TokenizerFrom,
    files_values,
    output_values,
)
from backmerge.commands.running import run_document, stoppable
from backmerge.errors import ConfigError, NotShownError, RunError
from backmerge.generation.quiet import quieten
from backmerge.registry import Permissions

if TYPE_CHECKING:
    from backmerge.config import Document
    from backmerge.pipeline.suite import Outcome, Planned
    from backmerge.planning.settings import Experiment


def run(
    experiment: Annotated[Path, typer.Argument(help="The experiment file, or a suite of several (YAML).")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The run directory; for a suite, the folder of its runs. By default runs/NAME."),
    ] = None,
    set_: SetOption = None,
    scale: Annotated[
        str | None, typer.Option(help="Use a scale that the file defines under `scales`, e.g. demo.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Run only this experiment of a suite; may be repeated.")
    ] = None,
    as_: Annotated[
        str | None,
        typer.Option("--as", help="Override merged_as of the file: auto, adapter or checkpoint."),
    ] = None,
    dtype_out: Annotated[
        str | None,
        typer.Option("--dtype-out", help="Override merged_dtype of the file: float32, bfloat16 or float16."),
    ] = None,
    config_from: ConfigFrom = None,
    tokenizer_from: TokenizerFrom = None,
    dry_run: DryRunOption = False,
    allow_plugins: Plugins = False,
    allow_code_execution: CodeExecution = False,
    report_to: ReportTo = None,
    strict: Strict = False,
    shard: ShardOption = None,
) -> None:
    """Run an experiment file or a suite. Continues an interrupted run.

    Example: backmerge run experiment.yaml --out runs/mine --set choice.margin=0.05

    The paper's first table, as a dry run and on the embedded model: backmerge run
    experiments/paper/table1.yaml --dry-run; backmerge run experiments/paper/table1.yaml --scale demo --out
    runs/table1-demo
    """
    from backmerge.config import load_extended, validated, with_overrides
    from backmerge.outputs import check_apart

    permissions = Permissions(allow_plugins, allow_code_execution)
    chosen = output_values(as_, dtype_out) | files_values(config_from, tokenizer_from)
    form = [f"{key}={value}" for key, value in chosen.items()]
    overrides = [*form, *(set_ or ())]
    document = load_extended(experiment)
    if out is not None and not (out / "units").is_dir():  # a run's own experiment.yaml can continue the run
        check_apart(out, [experiment])
    if "experiments" in document.values:
        from backmerge.pipeline.suite import plan_suite

        if shard is not None:
            raise ConfigError(
                f"{experiment} is a suite, and --shard splits a single experiment",
                remedy="give the file of one experiment.",
            )
        planned = plan_suite(experiment, scale=scale, overrides=overrides, only=only or ())
        if dry_run:
            look_through(planned.experiments, permissions)
            return
        place = out if out is not None else Path("runs") / experiment.stem
        _run_suite(
            planned,
            place,
            permissions,
            strict=strict,
            report_to=report_to or (),
        )
        return
    if only:
        raise ConfigError(f"{experiment} is one experiment, and --only is for suites", remedy="omit --only.")
    document = load_extended(experiment, scale)
    if dry_run:
        from backmerge.planning.settings import Experiment

        document = with_overrides(document, overrides)
        look_through({experiment.stem: validated(Experiment, document)}, permissions, document)
        return
    run_document(
        document,
        overrides,
        out if out is not None else Path("runs") / experiment.stem,
        permissions,
        strict=strict,
        report_to=report_to or (),
        shard=shard,
    )


def look_through(
    experiments: Mapping[str, Experiment], permissions: Permissions, document: Document | None = None
) -> None:
    """Print the dry run of each experiment; raise an error if a run would fail."""
    quieten()
    from backmerge.planning.dry_run import assumptions, dry_run, lines_of, total_line

    found = {}
    for name, experiment in experiments.items():
        found[name] = dry_run(experiment, permissions, document)
        typer.echo(f"{name}: {experiment.name}")
        for line in lines_of(found[name]):
            typer.echo(line)
    if len(found) > 1:
        typer.echo(total_line(list(found.values())))
    for line in assumptions():
        typer.echo(line)
    faulty = [name for name, one in found.items() if one.faults]
    if faulty:
        several = f"{len(faulty)} of {len(found)} experiments cannot run as they are: {', '.join(faulty)}"
        raise ConfigError(
            several if len(found) > 1 else f"the experiment '{faulty[0]}' cannot run as it is",
            remedy="correct the faults listed above; nothing was written.",
        )
    typer.echo("Nothing was written, and the hub was not contacted.")


def _run_suite(
    planned: Planned,
    out: Path,
    permissions: Permissions,
    *,
    strict: bool,
    report_to: Sequence[str],
) -> None:
    quieten()
    from backmerge.pipeline.suite import check_suite, run_suite
    from backmerge.sharing.trackers import check_trackers
    from backmerge.sharing.trackers import report_to as tell

    check_trackers(report_to, permissions)
    with stoppable(out):
        check_suite(planned, permissions)
        outcomes = run_suite(
            planned,
            out,
            permissions,
            on_done=_tell,
        )
    _sum_up(planned.title, outcomes, out)
    for name, outcome in outcomes.items():
        if outcome.finished is not None:
            tell(report_to, out / name, permissions)
    failed = [name for name, outcome in outcomes.items() if outcome.error is not None]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(outcomes)} experiments failed: {', '.join(failed)}",
            remedy=f"fix the errors above, then run the same command again to continue with {out}.",
        )
    others = {
        name: o.finished.verdict for name, o in outcomes.items() if o.finished and o.finished.verdict != "restored"
    }
    if strict and others:
        told = ", ".join(f"{name} ({verdict})" for name, verdict in others.items())
        raise NotShownError(f"--strict requires 'restored', and these are not: {told}")


def _tell(name: str, outcome: Outcome) -> None:
    if outcome.error is not None:
        typer.echo(f"{name} failed: {outcome.error}", err=True)


def _sum_up(title: str, outcomes: Mapping[str, Outcome], out: Path) -> None:
    """Print one table: base, tuned and chosen merge on the first metric of every benchmark."""
    from rich.console import Console
    from rich.table import Table

    from backmerge.reporting.findings import comparison, percent
    from backmerge.results import ROLES

    table = Table(title=f"{title} (percent)", title_justify="left")
    for column in ("experiment", "benchmark", *ROLES, "chosen", "verdict"):
        table.add_column(column, justify="right" if column in ROLES else "left", overflow="fold")
    for name, outcome in outcomes.items():
        if outcome.finished is None:
            table.add_row(name, "failed")
            continue
        results = outcome.finished.results
        rows: Sequence[tuple[str, ...]] = [
            (
                f"{row.benchmark} {row.metric}",
                *(percent(row.cells[role].value).removesuffix(" %") if role in row.cells else "—" for role in ROLES),
            )
            for row in comparison(results)
            if row.is_primary or row.metric in ("asr", "over_refusal")
        ]
        for number, row in enumerate(rows):
            last = (str(results.choice.point or "—"), outcome.finished.verdict) if number == 0 else ("", "")
            table.add_row(results.name if number == 0 else "", *row, *last)
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(f"  Run directories: {out}. For a table or figure: backmerge report {out}", soft_wrap=True)
