"""The results of all kinds of runs, typed: `results.json` is exactly one of these types, serialised.

    RestoreResults      `restore`, `run` and `demo`: the choice of λ and its confirmation
    EvaluateResults     `evaluate` and `score`: scores of one model or several
    CheckResults        `check`: whether a model is as safe as its base

`Results.read` returns the type that a file contains. Reports, cards, trackers and the Python interface read these, and
nothing else parses `results.json`. `docs/generate.py` makes `docs/results.md` from the `Attributes` below.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import ValidationError

from backmerge.errors import ConfigError, RunError
from backmerge.outputs import check_digests
from backmerge.records import Score
from backmerge.registry import FIGURES, resolve
from backmerge.results.form import TABLE, Difference, Part
from backmerge.results.parts import (
    ROLES,
    Base,
    BenchmarkKind,
    BenchmarkRow,
    CategoryScore,
    ChosenLam,
    Comparison,
    ComparisonRow,
    Confirmation,
    DifferenceRow,
    DriftRow,
    GuardRow,
    Judged,
    JudgesAgreement,
    LossRow,
    MergedModel,
    ModelForm,
    ModelVerdict,
    PairTest,
    PointRow,
    Rate,
    Sizes,
    SummaryRow,
    TunedModel,
    UtilityOfRoles,
    ValidationRow,
)
from backmerge.runs import RESULTS, indented, write_results
from backmerge.selection.candidates import Verdict
from backmerge.selection.sense_checks import Finding


class CheckFindings(Part):
    """The verdict of a check, with the figures behind it.

    Attributes:
        verdict: `restored` (as safe as the base; without harmful requests, nothing to keep was lost), `not shown` or
            `worse`.
        measured_verdict: The verdict of the figures alone, without the findings.
        margin: How far the attack success rate may exceed the base's.
        asr_difference: The model's attack success rate minus the base's; null without harmful requests.
        asr_difference_if_unscored_harmful: The same, with every unscored answer counted as harmful here and as safe at
            the base.
        what_would_decide: What would decide an open verdict; null if it is not open.
        other_difference: The same for answers that are neither refused nor harmful; null if not measured.
        over_refusal_margin: How far over-refusal may exceed the base's.
        over_refusal_difference: Over-refusal minus the base's; null if not measured.
        utility_difference: Utility minus the base's; null if not measured.
        losses: The model's loss on each benchmark to keep; each is part of the verdict.
    """

    verdict: Verdict
    measured_verdict: Verdict | None = None
    margin: float
    asr_difference: Difference | None = None
    asr_difference_if_unscored_harmful: Difference | None = None
    what_would_decide: str | None = None
    other_difference: Difference | None = None
    over_refusal_margin: float
    over_refusal_difference: Difference | None = None
    utility_difference: Difference | None = None
    losses: tuple[LossRow, ...] = ()


class CheckRow(Part):
    """A metric of both models, on one benchmark or on all of a kind.

    Attributes:
        kind: `utility`, `safety`, `over_refusal` or `keep`.
        benchmarks: Their names.
        metric: The metric.
        base: The base's mean.
        model: The model's mean.
        difference: The model's minus the base's.
        margin: The largest accepted difference; null if there is none.
        kept: Whether the difference is within the margin, in words; null if there is no margin.
        unscored: Answers that were not scored, of both models.
    """

    kind: BenchmarkKind
    benchmarks: tuple[str, ...]
    metric: str
    base: float
    model: float
    difference: Difference
    margin: float | None
    kept: str | None
    unscored: int


class RedecidedPoint(Part):
    """A point by another judge's findings, on the selection split.

    Attributes:
        point: The point.
        lam: Its λ.
        utility: Mean utility, as measured by the run.
        asr_difference: Its attack success rate minus the base's.
    """

    point: str
    lam: float | None
    utility: float | None
    asr_difference: Difference


class Redecision(Part):
    """The decision of a run, made again by the findings of another judge on the same answers.

    Attributes:
        point: The point that the run chose.
        margin: How far the attack success rate may exceed the base's.
        verdict: The verdict on that point by this judge, limited by its findings.
        findings: The sense checks' findings about that verdict.
        earlier_verdict: The run's verdict.
        asr_difference: Its attack success rate minus the base's; null if there are no answers to compare.
        chosen_by_this_judge: The point that the rule chooses by this judge; if none passes, the closest, as in
            `choice`; null if there is none, or if the records cannot show it.
        reason: The reason for that choice, or why the records cannot show it.
        candidates: The points.
    """

    point: str | None
    margin: float
    verdict: Verdict
    findings: tuple[Annotated[Finding, TABLE], ...] = ()
    earlier_verdict: Verdict
    asr_difference: Difference | None
    chosen_by_this_judge: str | None
    reason: str = ""
    candidates: tuple[RedecidedPoint, ...]


class Fingerprints(Part):
    """Hashes of the compared weights.

    Attributes:
        base: The base's; null if its weights are not on this machine.
        model: The model's; null in the same case.
    """

    base: str | None
    model: str | None


__all__ = [
    "ROLES",
    "SCHEMA_VERSION",
    "SUITE_FILE",
    "Base",
    "BenchmarkRow",
    "CategoryScore",
    "CheckFindings",
    "CheckResults",
    "CheckRow",
    "ChosenLam",
    "Comparison",
    "ComparisonRow",
    "Confirmation",
    "DifferenceRow",
    "DriftRow",
    "EvaluateResults",
    "Fingerprints",
    "GuardRow",
    "Judged",
    "JudgesAgreement",
    "LossRow",
    "MergedModel",
    "ModelForm",
    "ModelVerdict",
    "PairTest",
    "Part",
    "PointRow",
    "Rate",
    "RedecidedPoint",
    "Redecision",
    "RestoreResults",
    "Results",
    "Sizes",
    "SummaryRow",
    "TunedModel",
    "UtilityOfRoles",
    "ValidationRow",
]

SCHEMA_VERSION = 2
SUITE_FILE = "suite.yaml"
MOST_ROWS = 60  # shown in a notebook


class Results(Part):
    """The results of a run of any kind.

    Attributes:
        schema_version: Version of this schema.
        kind: The command: `restore` (also for `run` and `demo`), `evaluate`, `score` or `check`.
        backmerge: Version of backmerge.
        inputs: Hashes of everything that the results depend on; if one of them changes, they are computed again.
        agreement: How far two judges agree, for each benchmark and split; empty without a second judge.
        guards: The guards that merges were made with; usually none.
        realisations: How each model was measured.
        scores: Each model's metrics on each benchmark and split.
        by_category: Each model's primary metric in each category of a benchmark that has several.
        pairs: Each model on pairs of a harmful and a harmless prompt on one subject, as in JailbreakBench: shares of
            `told_apart` (no harm, no refusal), `both_answered`, `both_refused` and `reversed`.
        pair_tests: These shares for the chosen point, or for the checked model, tested against the base's on the
            confirmation prompts; empty for `evaluate` and `score`.
    """

    schema_version: Literal[2] = 2
    kind: str
    backmerge: str
    inputs: Mapping[str, Any] = {}
    agreement: tuple[JudgesAgreement, ...] = ()
    guards: tuple[GuardRow, ...] = ()
    realisations: tuple[ModelForm, ...] = ()
    scores: tuple[Score, ...] = ()
    by_category: tuple[CategoryScore, ...] = ()
    pairs: tuple[Score, ...] = ()
    pair_tests: tuple[PairTest, ...] = ()

    noun: ClassVar[str] = "results"

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Return a run's results, of the kind that the file states.

        Args:
            path: A run directory, whose files are also compared with their digests, or a `results.json`.

        Raises:
            RunError: there is no such file, or it is damaged, of another version, or of another kind than this class.
        """
        place = Path(path)
        file = place / RESULTS if place.is_dir() else place
        text = _text(place, file)
        if place.is_dir():
            check_digests(place)
        kind = _kind_of(file, text)
        if not issubclass(kind, cls):
            raise RunError(
                f"{file} holds {kind.noun}, and not {cls.noun}",
                remedy=f"give a run that is {cls.noun}.",
            )
        try:
            return kind.model_validate_json(_without_lone_surrogates(text), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise RunError(
                f"{file} is damaged: '{where}': {first['msg']}",
                remedy="delete it and run the run's command again; finished work is kept.",
            ) from error

    def write(self, directory: Path) -> Path:
        """Write `results.json` into a run directory, with the digests of its files.

        Returns:
            The file.
        """
        return write_results(directory, self.to_json())

    def to_rows(self) -> list[dict[str, Any]]:
        """Return the figures as flat rows, one for each model, benchmark, split and metric."""
        return [asdict(score) for score in self.scores]

    def to_pandas(self) -> Any:
        """Return `to_rows()` as a `pandas.DataFrame`.

        Raises:
            ConfigError: pandas is not installed.
        """
        return data_frame(self.to_rows())

    def _repr_html_(self) -> str:
        """Return a table for notebooks; names are escaped, since other people chose them."""
        return html_table(self.headline, self.to_rows())

    def plot(self) -> Any:
        """Return the figures with their intervals as a `matplotlib` figure, which notebooks show."""
        return resolve(FIGURES, "scores")(self)

    @property
    def headline(self) -> str:
        """Return the result in a few words."""
        return f"{len(self.scores)} scores"

    def to_json(self) -> str:
        """Return the text of `results.json`."""
        return indented(self.plain())


class RestoreResults(Results):
    """The results of `restore`, `run` or `demo`.

    Attributes:
        name: The experiment's title.
        environment: What the run used: `python`, `machine`, and the engine's own facts.
        base: The base.
        tuned: The tuned models.
        benchmarks: The benchmarks.
        drift: How far tuning moved each part of the model.
        second_judge: The judge that only confirms; null if there is none.
        points: The recipes that were measured.
        choice: The choice of λ.
        split: `halves`: λ was chosen on one half of the prompts and confirmed on the other; `whole`: both are all
            prompts, since λ was not chosen on any.
        validation: Scores on held-out rows of the tuning data.
        confirmation: The chosen point on the confirmation split.
        findings: The findings of the sense checks, the most serious first.
        comparison: The best point of every series; null unless `choice.compare`.
        merged: The merged models.
        summary: Each point's metrics over its models.
        differences: Each point minus the base, paired by prompt.
    """

    kind: Literal["restore"] = "restore"
    name: str
    environment: Mapping[str, str] = {}
    base: Base
    tuned: tuple[TunedModel, ...]
    benchmarks: tuple[BenchmarkRow, ...]
    drift: tuple[DriftRow, ...] = ()
    second_judge: str | None = None
    points: tuple[PointRow, ...]
    choice: ChosenLam
    split: Literal["halves", "whole"] = "halves"
    validation: tuple[ValidationRow, ...] = ()
    confirmation: Confirmation
    findings: tuple[Annotated[Finding, TABLE], ...] = ()
    comparison: Comparison | None = None
    merged: tuple[MergedModel, ...]
    summary: tuple[SummaryRow, ...]
    differences: tuple[DifferenceRow, ...] = ()

    noun: ClassVar[str] = "the results of restore, run or demo"

    @property
    def has_safety(self) -> bool:
        """Return whether harmful requests were measured; if not, the verdict is on the abilities to keep."""
        return any(benchmark.kind == "safety" for benchmark in self.benchmarks)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return the summary as flat rows: one for each point, benchmark, split and metric."""
        return [row.plain() for row in self.summary]

    @property
    def headline(self) -> str:
        """Return the verdict and the chosen point."""
        return f"{self.name}: {self.confirmation.verdict}; chosen: {self.choice.point or 'none'}"

    def plot(self) -> Any:
        """Return every benchmark's primary metric against λ as a `matplotlib` figure, which notebooks show."""
        return resolve(FIGURES, "curves")(self)

    @property
    def is_whole(self) -> bool:
        """Return whether all prompts are in both splits, since no λ was chosen on them."""
        return self.split == "whole"


class EvaluateResults(Results):
    """Scores that `evaluate` measured or `score` computed.

    Attributes:
        model: The measured model.
        base_name: The base that an adapter was measured on, or that the model was merged with; null if there is none.
        environment: The engine's own facts.
        judge: The judge.
        second_judge: The second judge; null if there is none.
        num_unanswered: Prompts without an answer, with `score --partial`.
        decision: For a run that was scored again, its decision by this judge's findings; null otherwise.
        findings: The findings of the sense checks about the answers.
    """

    kind: Literal["evaluate", "score"] = "evaluate"
    model: str
    base_name: str | None = None
    environment: Mapping[str, str] = {}
    judge: Judged
    second_judge: Judged | None = None
    num_unanswered: int = 0
    decision: Redecision | None = None
    findings: tuple[Annotated[Finding, TABLE], ...] = ()

    noun: ClassVar[str] = "scores of evaluate or score"


class CheckResults(Results):
    """The results of `check`.

    Attributes:
        model: The checked model.
        against: The base, or the earlier run that measured it.
        is_against_run: Whether it is an earlier run.
        fingerprints: Hashes of the weights.
        environment: The engine's own facts, for `base` and `model`.
        judge: The judge.
        second_judge: The second judge; null if there is none.
        check: The verdict.
        findings: The findings of the sense checks, the most serious first.
        rows: Each metric of both models.
        num_prompts_rendered_otherwise: Prompts that were rendered differently for the two models.
    """

    kind: Literal["check"] = "check"
    model: str
    against: str
    is_against_run: bool
    fingerprints: Fingerprints
    environment: Mapping[str, Mapping[str, str]] = {}
    judge: Judged
    second_judge: Judged | None = None
    check: CheckFindings
    findings: tuple[Annotated[Finding, TABLE], ...] = ()
    rows: tuple[CheckRow, ...]
    num_prompts_rendered_otherwise: int = 0

    noun: ClassVar[str] = "the results of check"

    @property
    def headline(self) -> str:
        """Return the verdict on the model."""
        return f"{self.model} against {self.against}: {self.check.verdict}"


KINDS: Mapping[str, type[Results]] = {
    "restore": RestoreResults,
    "evaluate": EvaluateResults,
    "score": EvaluateResults,
    "check": CheckResults,
}


class _Marked(NamedTuple):
    """A key that only one kind of results has: identifies files from before `kind` was written."""

    key: str
    kind: str


_MARKS = (
    _Marked("confirmation", "restore"),
    _Marked("check", "check"),
    _Marked("num_unanswered", "score"),
    _Marked("judge", "evaluate"),
)


def data_frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return rows as a `pandas.DataFrame`.

    Raises:
        ConfigError: pandas is not installed.
    """
    if find_spec("pandas") is None:
        raise ConfigError("pandas is not installed", remedy="pip install pandas; `to_rows()` needs nothing.")
    return import_module("pandas").DataFrame(rows)


def html_table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as HTML under a title, at most `MOST_ROWS` of them; everything is escaped."""
    heads = "".join(f"<th>{escape(key)}</th>" for key in (rows[0] if rows else {}))
    lines = ("".join(f"<td>{escape(_shown(value))}</td>" for value in row.values()) for row in rows[:MOST_ROWS])
    more = f"<p>and {len(rows) - MOST_ROWS} more rows</p>" if len(rows) > MOST_ROWS else ""
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<p><b>{escape(title)}</b></p><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>{more}"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(place: Path, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        if (place / SUITE_FILE).is_file():
            raise RunError(f"{place} is a suite's folder", remedy="give one of the runs in it.") from error
        if not place.is_dir():
            raise RunError(
                f"{place} is not a run directory: there is no such folder", remedy="give the --out of a run."
            ) from error
        raise RunError(
            f"{place} is not a finished run: it has no {RESULTS}",
            remedy="run its command again; it continues where it stopped, and ends with a report.",
        ) from error
    except OSError as error:
        raise RunError(
            f"cannot read {file}: {error.strerror}", remedy="give a file that you have permission to read."
        ) from error


def _without_lone_surrogates(text: bytes) -> bytes:
    """Return JSON in which halves of surrogate pairs, which a model may have written, are replacement characters."""
    if b"\\ud" not in text and b"\\uD" not in text:
        return text
    plain = json.dumps(json.loads(text), ensure_ascii=False)
    return plain.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def _kind_of(file: Path, text: bytes) -> type[Results]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"{file} is damaged: {error}",
            remedy="delete it and run the run's command again; finished work is kept.",
        ) from error
    if not isinstance(values, dict):
        raise RunError(f"{file} holds no results", remedy="run the run's command again.")
    if values.get("schema_version") != SCHEMA_VERSION:
        raise RunError(
            f"{file} has schema version {values.get('schema_version')}, and this backmerge reads {SCHEMA_VERSION}",
            remedy="use the version that made the run, or run its command again: finished work is kept.",
        )
    kind = values.get("kind", next((mark.kind for mark in _MARKS if mark.key in values), None))
    if not isinstance(kind, str) or kind not in KINDS:
        raise RunError(
            f"{file} holds results of the kind {kind!r}, and this backmerge reads {', '.join(KINDS)}",
            remedy="read it with the version that made it.",
        )
    return KINDS[kind]
