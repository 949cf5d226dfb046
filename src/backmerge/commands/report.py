"""`backmerge report`: rebuild a run's report, compare several runs, or make the paper's tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from backmerge.errors import ConfigError, RunError


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Finished runs, or the folder of a suite.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for a comparison; by default 'comparison' in the folder that holds the runs."
        ),
    ] = None,
    table: Annotated[
        str,
        typer.Option(
            "--table",
            help="A table or figure of the paper: 1, 2, 3, figure2, figure3; auto uses the one that the suite names.",
        ),
    ] = "auto",
) -> None:
    """Rebuild the report of a run, or compare several runs.

    Runs that differ only in seeds are also averaged. For the folder of a suite, all of its runs are compared, and the
    paper's table or figure that the suite names is added.

    Example: backmerge report runs/demo

    Several: backmerge report runs/medical runs/code --out runs/both

    A table of the paper: backmerge report runs/table1
    """
    from backmerge.outputs import check_apart
    from backmerge.reporting.finished_runs import is_suite, read_suite

    which = _table(table)
    if len(runs) == 1 and not is_suite(runs[0]) and which is None:
        if out is not None:
            raise ConfigError(
                "the report of a single run is written into the run", remedy="omit --out, or give more runs."
            )
        _report_one(runs[0])
        return
    suites = {run: read_suite(run) for run in runs if is_suite(run)}
    directories = [each for run in runs for each in (suites[run].directories if run in suites else (run,))]
    only = next(iter(suites.values())) if len(suites) == len(runs) == 1 else None
    if which is None and only is not None and table == "auto":
        which = only.table
    place = out if out is not None else _place(directories)
    if (place / "experiment.yaml").exists():
        raise RunError(f"{place} is a run, and a comparison cannot be written there", remedy="give --out.")
    if out is not None:
        check_apart(out, directories)
    title = only.title if only is not None and which == only.table else None
    _report_several(directories, place, which, title)


def _table(asked: str) -> str | None:
    """Return the name of a table or figure, or `None` if the suite decides."""
    from backmerge.reporting.finished_runs import TABLES

    name = f"table{asked}" if asked.isdecimal() else asked
    if name != "auto" and name not in TABLES:
        raise ConfigError(f"there is no table '{asked}'", remedy="give 1, 2, 3, figure2, figure3 or auto.")
    return None if name == "auto" else name


def _report_one(run: Path) -> None:
    from backmerge.reporting.report import write_report
    from backmerge.reporting.run_tables import write_tables

    _check(run)
    write_report(run)
    write_tables(run)
    typer.echo(run / "report.html")
    typer.echo(run / "tables")


def _report_several(directories: Sequence[Path], out: Path, which: str | None, title: str | None) -> None:
    from backmerge.reporting.families import families_of
    from backmerge.reporting.finished_runs import read_runs
    from backmerge.reporting.paper_figures import write_paper
    from backmerge.reporting.runs_compared import write_comparison
    from backmerge.reporting.user_folder import added_to

    places = [directory.resolve() for directory in directories]
    for directory, place in zip(directories, places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"{directory} is given twice", remedy="name each run once.")
    runs = read_runs(directories, _check)
    with added_to(out) as made:
        files = write_paper(families_of(runs), which, made, title) if which is not None else []
        files += write_comparison(runs, made, title or "Runs compared")
    for file in files:
        typer.echo(out / file.relative_to(made))


def _place(directories: Sequence[Path]) -> Path:
    """Return the default folder: `comparison` next to the runs, or for a single run its `tables`."""
    if len(directories) == 1:
        return directories[0] / "tables"
    common = Path(os.path.commonpath([directory.resolve().parent for directory in directories]))
    return Path("comparison") if common == Path(common.anchor) else Path(os.path.relpath(common)) / "comparison"


def _check(run: Path) -> None:
    """Check that a folder is the run of an experiment, not e.g. of an evaluation or a check."""
    from backmerge.planning.settings import kind_of_run, settings_left

    kind = kind_of_run(settings_left(run))
    if kind in ("evaluation", "answers"):
        raise RunError(
            f"{run} holds an evaluation or scored answers, which have no report",
            remedy="its scores are in results.json; `backmerge restore` and `backmerge run` write reports.",
        )
    if kind == "check":
        raise RunError(f"{run} holds a check, which has no report", remedy=f"its page is {run / 'check.md'}.")
    inside = sorted(path.parent.name for path in run.glob("*/results.json"))
    if not kind and inside:
        named = " ".join(str(run / name) for name in inside[:3])
        raise RunError(
            f"{run} is not a run but holds {', '.join(inside)}",
            remedy=f"name the runs to compare: backmerge report {named}",
        )
