"""Read several finished runs, or a suite of them, to compare them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from backmerge.errors import RunError
from backmerge.records import Estimate
from backmerge.reporting.report import read_run
from backmerge.results import SUITE_FILE, RestoreResults

TABLES = ("table1", "table2", "table3", "figure2", "figure3")  # of the paper

Place = tuple[str, str, str, str]  # split, point, benchmark, metric


class Run(NamedTuple):
    """A finished run among others.

    Attributes:
        name: Its folder's name, with as many parent folders as needed to distinguish it.
        results: `results.json`.
        experiment: Its resolved settings.
        cells: The measured figures, by split, point, benchmark and metric.
        values: The same for each model separately.
    """

    name: str
    results: RestoreResults
    experiment: Mapping[str, Any]
    cells: Mapping[Place, Estimate]
    values: Mapping[Place, Sequence[float]]

    @property
    def model(self) -> str:
        """Return the base's name, without its owner."""
        return Path(str(self.results.base.name).partition("@")[0]).name

    @property
    def task(self) -> str:
        """Return the task that was tuned on; the run's title if the model was tuned elsewhere."""
        finetune = self.experiment.get("finetune")
        return str(self.results.name) if finetune is None else Path(str(finetune["dataset"])).name


class Suite(NamedTuple):
    """Runs that belong together.

    Attributes:
        title: The title of their table or figure.
        table: `table1`, `figure2` and so on; `None` if they are only compared.
        directories: The folders of its runs.
    """

    title: str
    table: str | None
    directories: tuple[Path, ...]


def is_suite(directory: Path) -> bool:
    """Return whether a folder holds the runs of a suite, and is not itself a run."""
    return (directory / SUITE_FILE).is_file()


def read_suite(directory: Path) -> Suite:
    """Read the suite.yaml of a suite's folder.

    Raises:
        RunError: `suite.yaml` is damaged.
    """
    file = directory / SUITE_FILE
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        title, table = str(values["name"]), values["table"]
        names = [str(one["name"]) for one in values["experiments"]]
        # a name must not lead out of this folder
        if not names or any(Path(name).name != name or name == ".." for name in names):
            raise ValueError("the names of its experiments are not plain folder names")
        if table not in {*TABLES, None}:
            raise ValueError(f"'{table}' is not one of {', '.join(TABLES)}")
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        raise RunError(
            f"{file} is damaged: {error}", remedy="run the suite's command again; finished work is kept."
        ) from error
    return Suite(title, table, tuple(directory / name for name in names))


def read_runs(directories: Sequence[Path], check: Callable[[Path], None] = lambda _: None) -> list[Run]:
    """Read finished runs, in the order given, each once.

    Args:
        directories: The run directories.
        check: Called with each before it is read; raises an error if it is not an experiment's run.

    Raises:
        RunError: a run is missing, unfinished, damaged, or of another version; the message names them all.
    """
    found, faults = {}, []
    names = _names(directories)
    for directory, name in names.items():
        try:
            check(directory)
            run = read_run(directory)
            found[name] = run_of(name, run.results, run.experiment)
        except RunError as error:
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        told = "\n".join(f"  {fault.message}" for fault in faults)
        raise RunError(
            f"{len(faults)} of {len(names)} runs cannot be compared:\n{told}",
            remedy="run their commands again to continue them, or leave them out.",
        )
    return list(found.values())


def run_of(name: str, results: RestoreResults, experiment: Mapping[str, Any]) -> Run:
    """Make a run from its results and settings."""
    cells = {(entry.split, entry.point, entry.benchmark, entry.metric): entry.estimate for entry in results.summary}
    values: dict[Place, list[float]] = {}
    for score in results.scores:
        # a model's name is its point, followed by its tuned model
        point = score.model.rpartition("/")[0] or score.model
        if score.value is not None:
            place = score.split, point, score.benchmark, score.metric
            values.setdefault(place, []).append(score.value)
    return Run(name, results, experiment, cells, values)


def _names(directories: Sequence[Path]) -> dict[Path, str]:
    """Return each folder's last name, with as many parents as they need to differ."""
    places = list(dict.fromkeys(directory.resolve() for directory in directories))
    for depth in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(names)) == len(names):
            break
    return dict(zip(places, names, strict=True))
