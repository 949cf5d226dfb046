"""Run several experiments from one file: each has its own run directory, and all are checked before the first starts.

    name: Table 1
    table: table1
    experiments:
      - {name: reasoning, file: reasoning.yaml}
      - {name: code, file: code.yaml, set: {finetune: {seeds: [42]}}}

Results are in DIR/NAME, and DIR/suite.yaml says which belong together.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import yaml
from pydantic import Field, model_validator

from backmerge.config import Document, Settings, load_extended, merged, part, validated, with_overrides
from backmerge.errors import BackmergeError, ConfigError, RunError
from backmerge.outputs import check_apart, paths_read
from backmerge.pipeline.stages import Finished, run_experiment
from backmerge.planning.prepare import prepare
from backmerge.planning.settings import Experiment
from backmerge.progress import say
from backmerge.registry import NOTHING_ALLOWED, Permissions, closest
from backmerge.runs import write_whole

SUITE_FILE = "suite.yaml"
FolderName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # a plain folder name, not a path


class SuiteExperiment(Settings):
    """One of the experiments.

    Attributes:
        name: Name of its run directory, and in tables.
        file: Its experiment file, relative to the suite's folder.
        set: Settings that override the file's: mappings are merged, everything else is replaced.
    """

    name: FolderName
    file: str
    set: Mapping[str, Any] = Field(default_factory=dict)


class Suite(Settings):
    """Experiments that are run one after the other and reported together.

    Attributes:
        name: The name in tables and figures.
        table: The table or figure that the report makes of them.
        experiments: The experiments, in this order.
        set: Settings that override the files' for all of them; those of a single experiment take precedence.
    """

    name: str
    table: Literal["table1", "table2", "table3", "figure2", "figure3"] | None = None
    experiments: Annotated[tuple[SuiteExperiment, ...], Field(min_length=1)]
    set: Mapping[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_unique_names(self) -> Self:
        twice = [name for name, count in Counter(one.name for one in self.experiments).items() if count > 1]
        if twice:
            raise ValueError(f"two experiments are named '{twice[0]}', but each needs its own folder")
        return self


class Planned(NamedTuple):
    """A suite with its experiments' resolved settings.

    Attributes:
        suite: As in the file.
        source: The file.
        scale: The scale of the experiments, if one was requested.
        experiments: The settings of the requested ones, by name.
    """

    suite: Suite
    source: Path
    scale: str | None
    experiments: Mapping[str, Experiment]

    @property
    def title(self) -> str:
        """Its name, and the scale: figures at another scale do not describe the suite's models."""
        return self.suite.name if self.scale is None else f"{self.suite.name}, at the scale '{self.scale}'"


class Outcome(NamedTuple):
    """The end of an experiment: finished, or a user error."""

    finished: Finished | None
    error: BackmergeError | None


def is_suite(document: Document) -> bool:
    """Return whether a file describes a suite rather than one experiment."""
    return "experiments" in document.values


def plan_suite(
    path: Path, *, scale: str | None = None, overrides: Sequence[str] = (), only: Sequence[str] = ()
) -> Planned:
    """Read a suite and all of its experiments' files.

    Args:
        path: The suite's file.
        scale: Scale of the experiments, which their files must define; a scale with that name in the suite's file is
            applied to the suite.
        overrides: `key.path=value` options for all experiments, which take precedence over the suite's settings.
        only: Names of experiments; all if empty.

    Raises:
        ConfigError: the suite or an experiment cannot be used; lists the faults of all.
    """
    document = load_extended(path, scale, needs_scale=False)
    suite = validated(Suite, document)
    names = [one.name for one in suite.experiments]
    for name in only:
        if name not in names:
            raise ConfigError(
                f"{path} has no experiment '{name}'{closest(name, names)}", remedy=f"it has {', '.join(names)}."
            )
    found: dict[str, Experiment] = {}
    faults: dict[str, BackmergeError] = {}
    for place, one in enumerate(suite.experiments):
        if only and one.name not in only:
            continue
        try:
            found[one.name] = validated(Experiment, _document(document, one, place, scale, overrides))
        except ConfigError as error:
            faults[one.name] = error
    _raise_all(path, faults, len(found) + len(faults))
    return Planned(suite, path, scale, found)


def _document(
    document: Document, one: SuiteExperiment, place: int, scale: str | None, overrides: Sequence[str]
) -> Document:
    """Return an experiment's file, with its scale, the suite's settings for all and for it, and the options last."""
    at = ("experiments", place, "file")
    file = Path(document.files.get(at, document.source)).parent / Path(one.file).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"{document.source}, {document.place(at)}: the file '{one.file}' does not exist",
            remedy="paths are relative to the folder of the suite's file.",
        )
    found = load_extended(file, scale)
    for key in (("set",), ("experiments", place, "set")):
        if key in document.lines:
            found = merged(found, part(document, key), source=found.source)
    return with_overrides(found, overrides)


def check_suite(planned: Planned, permissions: Permissions = NOTHING_ALLOWED) -> None:
    """Find what every experiment names, including models and data; write and keep nothing.

    Raises:
        ConfigError: an experiment cannot be run; lists the faults of all.
    """
    faults: dict[str, BackmergeError] = {}
    for name, experiment in planned.experiments.items():
        say(f"Checking {name} ...")
        try:
            prepare(experiment, permissions)
        except BackmergeError as error:
            faults[name] = error
    _raise_all(planned.source, faults, len(planned.experiments))


def run_suite(
    planned: Planned,
    directory: Path,
    permissions: Permissions = NOTHING_ALLOWED,
    *,
    on_done: Callable[[str, Outcome], None] = lambda *_: None,
) -> dict[str, Outcome]:
    """Run every experiment in its own run directory, or continue it where it stopped.

    An error in one of them, after it has started, does not stop the others.

    Args:
        planned: The suite, checked.
        directory: Gets a folder for each experiment, and `suite.yaml`.
        permissions: What may be run.
        on_done: Called with each experiment as it ends.

    Raises:
        RunError: the directory contains something else.
    """
    _check_directory(directory)
    check_apart(directory, [path for experiment in planned.experiments.values() for path in paths_read(experiment)])
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_whole(directory / SUITE_FILE, yaml.safe_dump(_described(planned), sort_keys=False, allow_unicode=True))
    outcomes: dict[str, Outcome] = {}
    for number, (name, experiment) in enumerate(planned.experiments.items(), start=1):
        say(f"\n{number} of {len(planned.experiments)}: {name}")
        try:
            finished = run_experiment(
                experiment,
                directory / name,
                permissions=permissions,
            )
            outcomes[name] = Outcome(finished, None)
        except BackmergeError as error:
            outcomes[name] = Outcome(None, error)
        gc.collect()  # frees the device memory of an unreferenced engine for the next one
        on_done(name, outcomes[name])
    return outcomes


def _check_directory(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise RunError(f"{directory} is a file, not a folder", remedy="give another --out.")
    if not directory.is_dir() or (directory / SUITE_FILE).exists():
        return
    if (directory / "experiment.yaml").exists():
        raise RunError(
            f"{directory} is the run directory of one experiment", remedy="give another --out; nothing was changed."
        )
    if any(directory.iterdir()):
        raise RunError(
            f"{directory} has files but no {SUITE_FILE}, so it does not belong to a suite",
            remedy="give another --out; nothing was changed.",
        )


def _described(planned: Planned) -> dict[str, Any]:
    """Return the contents of `suite.yaml`: all experiments, including those that were not requested this time."""
    values = planned.suite.model_dump(mode="json")
    return {"name": planned.title, "scale": planned.scale, **{key: values[key] for key in values if key != "name"}}


def _raise_all(path: Path, faults: Mapping[str, BackmergeError], num_experiments: int) -> None:
    if not faults:
        return
    # a fault of a shared file, or of an option, is reported once
    of: dict[str, list[str]] = {}
    for name, error in faults.items():
        of.setdefault(str(error), []).append(name)
    told = [f"  {', '.join(names)}: " + fault.replace("\n", "\n    ") for fault, names in of.items()]
    others = ", or run the others with --only NAME" if len(faults) < num_experiments else ""
    raise ConfigError(
        f"{path}: {len(faults)} of {num_experiments} experiments cannot be run, so none was started:\n"
        + "\n".join(told),
        remedy=f"fix these{others}.",
    )
