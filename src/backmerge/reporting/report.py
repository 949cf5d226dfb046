"""Write a finished run as files for people: `report.html`, tables, plots, and a card next to every merged model.

Everything is made from the run's files, so it can be made again later, with the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from backmerge.errors import RunError
from backmerge.records import Estimate
from backmerge.reporting import findings
from backmerge.reporting.card import write_cards
from backmerge.reporting.cell_maps import category_maps, drift_maps
from backmerge.reporting.explained import KINDS, TERMS, commands, next_steps, spent, what_was_done
from backmerge.reporting.heatmap import COLOURS
from backmerge.reporting.page import embedded, environment, script, visible
from backmerge.reporting.side_by_side import script_data, side_by_side
from backmerge.reporting.tables import as_csv
from backmerge.results import ROLES, PointRow, RestoreResults
from backmerge.runs import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FinishedRun", "environment", "read_run", "rendered", "visible", "write_report"]


class LossRow(BaseModel):
    """A line of `loss.jsonl`."""

    step: int
    loss: float


class _Part(BaseModel):
    """A part of the settings, with the fields that the report shows."""


class _Sampling(_Part):
    seed: int


class _Evaluate(_Part):
    sampling: _Sampling


class _Finetune(_Part):
    seeds: list[int]
    dataset: str


class _Search(_Part):
    name: str = "grid"


class _Report(_Part):
    text: str


class _Settings(_Part):
    evaluate: _Evaluate
    finetune: _Finetune | None = None
    search: _Search = _Search()
    report: _Report


class FinishedRun(NamedTuple):
    """The files of a finished run, as far as they are reported.

    Attributes:
        results: `results.json`.
        samples: `samples.json`: prompts with the models' answers side by side.
        experiment: The resolved configuration.
        experiment_text: The same, as it is in the file.
        losses: Training loss by tuned model; empty if nothing was tuned.
        sessions: `sessions.jsonl`: the cost of each session; empty if not recorded.
    """

    results: RestoreResults
    samples: Mapping[str, Any]
    experiment: Mapping[str, Any]
    experiment_text: str
    losses: Mapping[str, Sequence[Mapping[str, float]]]
    sessions: Sequence[Mapping[str, Any]] = ()


def write_report(directory: Path) -> None:
    """Write `report.html`, `scores.csv`, `summary.csv`, `plots/` and the cards of the merged models.

    Args:
        directory: A finished run.

    Raises:
        RunError: the run is missing, unfinished or damaged.
    """
    from backmerge.reporting import pareto, plots
    from backmerge.reporting.drawing import write_figure

    run = read_run(directory)
    write_whole(directory / "scores.csv", as_csv([asdict(score) for score in run.results.scores]))
    write_whole(directory / "summary.csv", as_csv([row.plain() for row in run.results.summary]))
    curves = write_figure(directory / "plots" / "curves", plots.curves(run.results))
    if run.results.has_safety:
        write_figure(directory / "plots" / "pareto", pareto.pareto(run.results))
    write_cards(directory, run.results, next((file.read_bytes() for file in curves if file.suffix == ".png"), None))
    # written last, so that an existing report has its tables and plots next to it
    write_whole(directory / "report.html", rendered(run))


def read_run(directory: Path) -> FinishedRun:
    """Read the files of a finished run.

    Raises:
        RunError: a file is missing, damaged, or from another version.
    """
    results = RestoreResults.read(directory)
    experiment_text = _text(directory, "experiment.yaml")
    losses = {
        row.name: [_checked(LossRow, file, values).model_dump() for values in _lines(file)]
        for row in results.tuned
        if (file := directory / "tuned" / row.name / "loss.jsonl").is_file()
    }
    # those of the shards too, whose answers the run uses
    sittings = [*sorted(directory.glob("shards/*/sessions.jsonl")), directory / "sessions.jsonl"]
    return FinishedRun(
        results,
        _read(directory, "samples.json"),
        _settings(directory / "experiment.yaml", experiment_text),
        experiment_text,
        losses,
        [
            _checked(dict[str, Any], file, row)
            for file in sittings
            if file.is_file()
            for row in _lines(file, is_torn=True)
        ],
    )


def rendered(run: FinishedRun) -> str:
    """Return the report as one self-contained HTML page."""
    from markupsafe import Markup

    results, choice = run.results, run.results.choice
    rows = findings.comparison(results)
    answers = side_by_side(run.samples, choice.point, run.experiment["report"]["text"])
    program = script("report.js")
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            results=results,
            choice=choice,
            confirmation=results.confirmation,
            experiment=run.experiment,
            experiment_text=run.experiment_text,
            headline=findings.standing(results).words,
            tone=findings.standing(results).tone,
            standings=findings.standings(results),
            is_shown_to_fail=findings.is_shown_to_fail,
            candidate_rows=findings.candidate_rows,
            verdict=findings.verdict_sentence(results),
            covers=findings.intervals_cover(results),
            next_steps=list(next_steps(results)),
            recipe="" if choice.point is None else findings.recipe_text(results),
            explanations=list(findings.explanations(results)),
            weaknesses=list(findings.weaknesses(results)),
            limits=findings.limits_of(results),
            losses_text=findings.losses_text,
            has_safety=results.has_safety,
            done=list(what_was_done(results, run.experiment)),
            rows=rows,
            figures=[row for row in rows if row.is_primary],
            points=_points(results),
            handed_over=findings.handed_over(results),
            served_text=findings.served_text,
            is_whole=results.is_whole,
            **_figures(run),
            category_maps=category_maps(results),
            drift_maps=drift_maps(results),
            answers=answers,
            spent=list(spent(run.sessions)),
            commands=list(commands(run.experiment)),
            colours=COLOURS,
            kinds=KINDS,
            terms=TERMS,
            roles=ROLES,
            policy=program.policy,
            # our own text, and JSON without a `<`: nothing in them can end the element
            script=Markup(program.text),  # noqa: S704
            data=Markup(embedded(script_data(answers, run.samples["totals"]))),  # noqa: S704
        )
    )


def _figures(run: FinishedRun) -> dict[str, Any]:
    from backmerge.reporting import pareto, plots

    results = run.results
    places = pareto.pareto_places(results)
    about = "Utility against attack success rate"
    compared = results.comparison
    return {
        "curves": [
            _inline(plots.curve(results, benchmark), f"curve-{index}", f"{benchmark.name} against λ")
            for index, benchmark in enumerate(results.benchmarks)
        ],
        "pareto": _inline(pareto.pareto(results), "pareto", f"{about}, by recipe", pareto.spots(places))
        if results.has_safety
        else None,
        "front": _inline(pareto.front(results), "front", f"{about}, the best of each method")
        if compared and results.has_safety
        else None,
        "loss": _inline(plots.training_loss(run.losses), "loss", "Training loss by step") if run.losses else None,
    }


def _points(results: RestoreResults) -> list[tuple[PointRow, dict[tuple[str, str], Estimate]]]:
    """Return every point with its cells on the selection prompts, base first, tuned last."""
    cells: dict[str, dict[tuple[str, str], Estimate]] = {}
    for entry in results.summary:
        if entry.split == "selection":
            cells.setdefault(entry.point, {})[entry.benchmark, entry.metric] = entry.estimate
    order = {"base": 0, "merged": 1, "tuned": 2}
    rows = sorted(results.points, key=lambda point: order[point.role])
    return [(point, cells.get(point.point, {})) for point in rows]


def _inline(figure: Figure, name: str, description: str, spots: Mapping[str, str] | None = None) -> Any:
    from markupsafe import Markup

    from backmerge.reporting.drawing import inline_svg

    # matplotlib has escaped every text in it
    return Markup(inline_svg(figure, name, description, spots))  # noqa: S704


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
            remedy="run its command again; it continues where it stopped, and ends with a report.",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(directory / name, error) from error


def _read(directory: Path, name: str) -> Any:
    return _parsed(directory / name, _text(directory, name))


def _settings(file: Path, text: str) -> Mapping[str, Any]:
    try:
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _damaged(file, error) from error
    _checked(_Settings, file, settings)
    values: Mapping[str, Any] = settings
    return values


def _lines(path: Path, *, is_torn: bool = False) -> list[Any]:
    """Read a JSON Lines file; without its last line, if a killed writer may have left it incomplete."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error
    whole = text.rpartition("\n")[0] if is_torn else text
    return [_parsed(path, line) for line in whole.split("\n") if line]


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error


def _checked(kind: Any, path: Path, values: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _damaged(path, f"'{'.'.join(map(str, first['loc']))}': {first['msg']}") from error


def _damaged(path: Path, how: object) -> RunError:
    return RunError(
        f"{path} is damaged: {how}",
        remedy="delete it and run the run's command again; finished work is kept.",
    )
