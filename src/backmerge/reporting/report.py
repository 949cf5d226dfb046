"""A finished run as files for people: `report.html`, tables, plots, and a card beside every merged model.

Everything is made from what the run left on disk, so that it can be made again by itself, with the same bytes.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from backmerge.errors import RunError
from backmerge.reporting import findings
from backmerge.reporting.card import write_cards
from backmerge.reporting.explained import HEADLINES, KINDS, TERMS, counted, what_was_done
from backmerge.reporting.findings import Results
from backmerge.reporting.tables import as_csv
from backmerge.runs import write_whole

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

SAMPLE_ORDER = ("safety", "over_refusal", "utility")
SCHEMA_VERSION = 2  # of results.json, as far as this file can read it

# marks that turn the direction of the text around them, and halves of signs, which no encoding takes
_TURNING = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class FinishedRun(NamedTuple):
    """What a finished run left on disk, as far as it is reported.

    Attributes:
        results: `results.json`.
        samples: Prompts with the models' answers side by side.
        experiment: The resolved configuration.
        experiment_text: The same, as it stands in the file.
        losses: Training loss by tuned model; empty where nothing was tuned.
    """

    results: Results
    samples: Sequence[Mapping[str, Any]]
    experiment: Mapping[str, Any]
    experiment_text: str
    losses: Mapping[str, Sequence[Mapping[str, float]]]


def write_report(directory: Path) -> None:
    """Write `report.html`, `scores.csv`, `summary.csv`, `plots/` and the cards of the merged models.

    Args:
        directory: A finished run.

    Raises:
        RunError: the run is not there, not finished, or damaged.
    """
    from backmerge.reporting import plots
    from backmerge.reporting.drawing import as_bytes

    run = read_run(directory)
    for table in ("scores", "summary"):
        write_whole(directory / f"{table}.csv", as_csv(run.results[table]))
    for name, figure in (("curves", plots.curves(run.results)), ("pareto", plots.pareto(run.results))):
        for form in ("png", "svg"):
            write_whole(directory / "plots" / f"{name}.{form}", as_bytes(figure, form))
    write_cards(directory, run.results)
    # last, so that a report that is there has its tables and plots beside it
    write_whole(directory / "report.html", rendered(run))


def read_run(directory: Path) -> FinishedRun:
    """What a finished run left on disk.

    Raises:
        RunError: a file is missing, is not what it should be, or was written by another version.
    """
    results = _read(directory, "results.json")
    if results.get("schema_version") != SCHEMA_VERSION:
        raise RunError(
            f"{directory / 'results.json'} has schema version {results.get('schema_version')}, and this backmerge "
            f"reads {SCHEMA_VERSION}",
            remedy="report with the version that made the run, or run again: what is done is kept.",
        )
    experiment_text = _text(directory, "experiment.yaml")
    losses = {
        row["name"]: [_parsed(file, line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        for row in results["tuned"]
        if (file := directory / "tuned" / row["name"] / "loss.jsonl").is_file()
    }
    return FinishedRun(
        results, _read(directory, "samples.json"), yaml.safe_load(experiment_text), experiment_text, losses
    )


def rendered(run: FinishedRun) -> str:
    """The report as one HTML page that needs nothing else."""
    from backmerge.reporting import plots

    results, choice = run.results, run.results["choice"]
    rows = findings.comparison(results)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            results=results,
            choice=choice,
            confirmation=results["confirmation"],
            experiment=run.experiment,
            experiment_text=run.experiment_text,
            headline=HEADLINES[results["confirmation"]["verdict"]],
            verdict=findings.verdict_sentence(results),
            explanations=list(findings.explanations(results)),
            caveats=list(findings.caveats(results)),
            done=list(what_was_done(results, run.experiment)),
            rows=rows,
            figures=[row for row in rows if row.is_primary],
            points=_points(results),
            # stable: within a kind as they were drawn
            samples=sorted(run.samples, key=lambda sample: SAMPLE_ORDER.index(sample["kind"])),
            handed_over=findings.handed_over(results),
            curves=[
                _inline(plots.curve(results, benchmark), f"curve-{index}", f"{benchmark['name']} against λ")
                for index, benchmark in enumerate(results["benchmarks"])
            ],
            pareto=_inline(plots.pareto(results), "pareto", "Utility against attack success rate, by λ"),
            loss=_inline(plots.training_loss(run.losses), "loss", "Training loss by step") if run.losses else None,
            kinds=KINDS,
            terms=TERMS,
            roles=findings.ROLES,
        )
    )


def environment() -> Environment:
    """Templates in which every value is escaped, and rid of what could disturb the page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("backmerge.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"percent": findings.percent, "points": findings.points, "counted": counted}
    # a number stays on one line with its sign of percent
    made.filters["unbroken"] = lambda sentence: sentence.replace(" %", "\u00a0%")
    made.globals["metric_names"] = findings.METRIC_NAMES
    return made


def visible(text: str) -> str:
    """Text with its control characters as signs that can be seen, and nothing that turns the direction of others."""
    kept = "".join(_as_sign(character) for character in text)
    return _TURNING.sub("\ufffd", kept)


def _as_sign(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cs":
        return "\ufffd"
    if category != "Cc" or character in "\n\t":
        return character
    # the block of control pictures has one for each below the space, and one for delete
    return {"\x7f": "\u2421"}.get(character, chr(0x2400 + ord(character)) if character < " " else "\ufffd")


def _points(results: Results) -> list[dict[str, Any]]:
    """Every point with its cells on the selection prompts, base first, tuned last."""
    cells: dict[str, dict[tuple[str, str], findings.Cell]] = {}
    for entry in results["summary"]:
        if entry["split"] == "selection":
            cells.setdefault(entry["point"], {})[entry["benchmark"], entry["metric"]] = findings.cell_of(entry)
    order = {"base": 0, "merged": 1, "tuned": 2}
    rows = sorted(results["points"], key=lambda point: order[point["role"]])
    return [{**point, "cells": cells.get(point["point"], {})} for point in rows]


def _inline(figure: Figure, name: str, description: str) -> Any:
    from markupsafe import Markup

    from backmerge.reporting.drawing import inline_svg

    # matplotlib has escaped every text in it
    return Markup(inline_svg(figure, name, description))  # noqa: S704


def _text(directory: Path, name: str) -> str:
    try:
        return (directory / name).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        if not directory.is_dir():
            raise RunError(
                f"{directory} is not a run directory: there is no such folder", remedy="give the --out of a run."
            ) from error
        raise RunError(
            f"{directory} is not a finished run: it has no {name}",
            remedy="give the command of the run again; it goes on where it was, and ends with a report.",
        ) from error


def _read(directory: Path, name: str) -> Any:
    return _parsed(directory / name, _text(directory, name))


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RunError(
            f"{path} is damaged: {error}",
            remedy="delete it and give the command of the run again; what is done is kept.",
        ) from error
