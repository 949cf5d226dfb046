"""A finished run for experiment trackers: settings, figures, curves and files; no prompts and no answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from backmerge.reporting.findings import comparison
from backmerge.reporting.report import FinishedRun, rendered
from backmerge.results import RestoreResults

STEPS = 1000  # trackers count steps in integers: λ is sent in thousandths
# files with figures only; the report is sent too, made again without answers
FILES = ("results.json", "scores.csv", "summary.csv")
REPORT = "report.html"
# characters that every tracker accepts in a name, with the slash as a separator of parts
_UNUSUAL = re.compile(r"[^\w .@=-]")


class Curve(NamedTuple):
    """One metric of one series over λ, on the prompts that λ was chosen on.

    Attributes:
        name: Series, benchmark and metric, as a metric's name.
        points: λ with its figures: `mean`, `low`, `high`.
    """

    name: str
    points: tuple[tuple[float, Mapping[str, float]], ...]


class Tracked(NamedTuple):
    """The data for a tracker.

    Attributes:
        name: The run's name.
        settings: Flat: `evaluate.engine.name` to a number, a truth value, or text.
        findings: Verdict and choice, as text.
        figures: The metrics of base, tuned and chosen model, and differences, by name.
        curves: The curves over λ.
        rows: The summary, as in `results.json`.
    """

    name: str
    settings: Mapping[str, Any]
    findings: Mapping[str, str]
    figures: Mapping[str, float]
    curves: tuple[Curve, ...]
    rows: Sequence[Mapping[str, Any]]


def tracked(run: FinishedRun) -> Tracked:
    """Return a tracker's data from a finished run."""
    results = run.results
    return Tracked(
        results.name,
        dict(_flat(run.experiment)),
        _findings(results),
        dict(_unique(_figures(results))),
        tuple(_curves(results)),
        [row.plain() for row in results.summary],
    )


def write_files(run: FinishedRun, directory: Path, place: Path) -> None:
    """Write the files for a tracker: figures, plots, and the report without prompts and answers.

    Args:
        run: A finished run.
        directory: The run's folder.
        place: An empty folder.
    """
    for name in FILES:
        if (directory / name).is_file():
            (place / name).write_bytes((directory / name).read_bytes())
    for plot in sorted((directory / "plots").glob("*.[ps][nv]g")):
        (place / "plots").mkdir(exist_ok=True)
        (place / "plots" / plot.name).write_bytes(plot.read_bytes())
    (place / REPORT).write_text(rendered(without_answers(run)), encoding="utf-8")


def without_answers(run: FinishedRun) -> FinishedRun:
    """Return the same run without prompts and answers."""
    experiment = {**run.experiment, "report": {**run.experiment.get("report", {}), "text": "none"}}
    return run._replace(samples={**run.samples, "samples": []}, experiment=experiment)


def steps_of(what: Tracked) -> dict[int, dict[str, float]]:
    """Return all curves' figures at each λ, in thousandths, rising: some trackers accept no earlier step later."""
    steps: dict[int, dict[str, float]] = {}
    for curve in what.curves:
        for lam, figures in curve.points:
            at = steps.setdefault(round(lam * STEPS), {})
            at |= {f"{curve.name}/{key}": value for key, value in figures.items()}
    return dict(sorted(steps.items()))


def metric_name(*parts: str) -> str:
    """Join parts to one name that every tracker accepts."""
    return "/".join(_UNUSUAL.sub("_", part) for part in parts)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield leaves by their dotted path; a list of plain values is one leaf, as JSON, and so is an empty value."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{path}.{index}")
    elif isinstance(value, (str, bool, int, float)):
        yield path, value
    else:
        yield path, json.dumps(value)


def _findings(results: RestoreResults) -> dict[str, str]:
    choice = results.choice
    return {
        "verdict": str(results.confirmation.verdict),
        "chosen": str(choice.point),
        "chosen_lam": str(choice.lam),
        "base_fingerprint": str(results.base.fingerprint),
        "backmerge": str(results.backmerge),
    }


def _figures(results: RestoreResults) -> Iterator[tuple[str, float]]:
    for row in comparison(results):
        for role, cell in row.cells.items():
            if cell.value is not None:
                name = metric_name("confirmation", row.benchmark, row.metric, role)
                yield name, cell.value
                yield f"{name}_low", cell.low
                yield f"{name}_high", cell.high
    confirmation = results.confirmation
    differences = {
        "asr_difference": confirmation.asr_difference,
        "tuned_asr_difference": confirmation.tuned_asr_difference,
        **{metric_name("loss", row.benchmark): row.loss for row in confirmation.losses},
    }
    for key, difference in differences.items():
        if difference is not None:
            yield key, difference.difference
            yield f"{key}_low", difference.low
            yield f"{key}_high", difference.high
    if confirmation.kept_gain is not None:
        yield "kept_gain", confirmation.kept_gain


def _curves(results: RestoreResults) -> Iterator[Curve]:
    """Yield every series that has a λ, from the base at 0 to the tuned model at 1."""
    found: dict[tuple[str, str, str], dict[float, Mapping[str, float]]] = {}
    series = [p.series for p in results.points if p.role == "merged" and p.lam is not None]
    for row in results.summary:
        if row.split != "selection" or row.lam is None or row.mean is None:
            continue
        mine = dict.fromkeys(series) if row.role in ("base", "tuned") else {row.series: None}
        for name in mine:
            curve = found.setdefault((name, row.benchmark, row.metric), {})
            # a merge of all has its own model at λ = 1, next to the tuned models themselves
            if row.role == "merged" or row.lam not in curve:
                curve[row.lam] = {"mean": row.mean, "low": row.low, "high": row.high}
    curves = [(metric_name(*key), tuple(sorted(points.items(), key=lambda p: p[0]))) for key, points in found.items()]
    yield from (Curve(name, points) for name, points in _unique(curves))


def _unique(named: Any) -> Iterator[tuple[str, Any]]:
    """Yield pairs with unique names, even if replaced characters made two of them equal."""
    seen: dict[str, int] = {}
    for name, value in named:
        seen[name] = seen.get(name, 0) + 1
        yield (name if seen[name] == 1 else f"{name}-{seen[name]}"), value
