"""What a run of any kind found, typed: `results.json` is exactly one of these types, serialised.

    RestoreResults      `restore`, `run` and `demo`: the choice of λ and its confirmation
    EvaluateResults     `evaluate` and `score`: scores of one model or several
    CheckResults        `check`: whether a model is as safe as its base

`Results.read` returns the one that a file holds. Reports, cards, trackers and the Python interface read these, and
nothing else parses `results.json`. `docs/results.md` is made from the `Attributes` below by `docs/generate.py`.
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
from backmerge.runs import RESULTS, check_digests, indented, write_results
from backmerge.selection.candidates import Verdict
from backmerge.selection.sense_checks import Finding


class CheckFindings(Part):
    """The verdict of a check, with the figures that it depends on.

    Attributes:
        verdict: `restored` (as safe as the base; without harmful requests, what is to be kept is kept), `not shown` or
            `worse`.
        measured_verdict: The verdict of the figures alone, without the findings.
        margin: How far the attack success rate may exceed the base's.
        asr_difference: The model's attack success rate less the base's; null without harmful requests.
        asr_difference_if_unscored_harmful: The same with every unscored answer taken for harmful here and for safe at
            the base.
        what_would_decide: What would decide an open verdict; null if it is not open.
        other_difference: The same of answers that are neither refused nor harmful; null if not measured.
        over_refusal_margin: How far over-refusal may exceed the base's.
        over_refusal_difference: Over-refusal less the base's; null if not measured.
        utility_difference: Utility less the base's; null if not measured.
        losses: What the model loses on each benchmark to keep; each is part of the verdict.
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
    """A metric at both models, on one benchmark or on all of a kind.

    Attributes:
        kind: `utility`, `safety`, `over_refusal` or `keep`.
        benchmarks: Which.
        metric: The metric.
        base: The base's mean.
        model: The model's mean.
        difference: The model's less the base's.
        margin: What the difference is compared with; null if nothing.
        kept: Whether it is kept, in words; null if there is no margin.
        unscored: Answers that were not scored, of both.
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
    """A point as another judge sees it on the selection split.

    Attributes:
        point: The point.
        lam: Its λ.
        utility: Mean utility, as the run measured it.
        asr_difference: Its attack success rate less the base's.
    """

    point: str
    lam: float | None
    utility: float | None
    asr_difference: Difference


class Redecision(Part):
    """What another judge's findings make of a run, whose answers it looked at again.

    Attributes:
        point: The point that the run chose.
        margin: How far the attack success rate may exceed the base's.
        verdict: The verdict on that point by this judge.
        earlier_verdict: The run's verdict.
        asr_difference: Its attack success rate less the base's; null if there are no answers to compare.
        chosen_by_this_judge: The point that the rule chooses by this judge; null if none passes.
        candidates: The points.
    """

    point: str | None
    margin: float
    verdict: Verdict
    earlier_verdict: Verdict
    asr_difference: Difference | None
    chosen_by_this_judge: str | None
    candidates: tuple[RedecidedPoint, ...]


class Fingerprints(Part):
    """Hashes of the weights that were compared.

    Attributes:
        base: The base's; null if its weights are not here.
        model: The model's; null likewise.
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
MOST_ROWS = 60  # that a notebook shows


class Results(Part):
    """What a run of any kind found.

    Attributes:
        schema_version: Version of this schema.
        kind: What made it: `restore` (also of `run` and `demo`), `evaluate`, `score` or `check`.
        backmerge: Version of backmerge.
        inputs: Hashes of all that the results depend on; if one of them differs, they are made anew.
        agreement: How far two judges agree, for each benchmark and split; empty without a second judge.
        guards: The guards that merges were made with; mostly none.
        realisations: How each model was measured.
        scores: Each model's metrics on each benchmark and split.
        by_category: Each model's primary metric in each category of a benchmark that has several.
        pairs: Each model on pairs of a harmful and a harmless prompt on one subject, as JailbreakBench has them: shares
            of `told_apart` (no harm, no refusal), `both_answered`, `both_refused` and `reversed`.
        pair_tests: These shares of the chosen point, or of the model that is checked, tested against the base's on the
            confirmation prompts; empty of `evaluate` and `score`.
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
        """Return what a run found, of the kind that the file says.

        Args:
            path: A run directory, whose files are also compared with their digests, or a `results.json`.

        Raises:
            RunError: there is none; it is damaged, of another version, or of another kind than this class.
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
                remedy="delete it and give the command of the run again; what is done is kept.",
            ) from error

    def write(self, directory: Path) -> Path:
        """Write `results.json` into a run directory, with the digests of what is there.

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
        """Return a table for notebooks; names are escaped, as others chose them."""
        return html_table(self.headline, self.to_rows())

    def plot(self) -> Any:
        """Return the figures with their intervals as a `matplotlib` figure, which notebooks show."""
        return resolve(FIGURES, "scores")(self)

    @property
    def headline(self) -> str:
        """What was found, in a few words."""
        return f"{len(self.scores)} scores"

    def to_json(self) -> str:
        """Return the text of `results.json`."""
        return indented(self.plain())


class RestoreResults(Results):
    """What `restore`, `run` or `demo` chose and found.

    Attributes:
        name: The experiment's title.
        environment: What the run was carried out with: `python`, `machine`, and what the engine says of itself.
        base: The base.
        tuned: The tuned models.
        benchmarks: The benchmarks.
        drift: How far tuning moved each part of the model.
        second_judge: The judge that only confirms; null if there is none.
        points: The recipes that were measured.
        choice: The choice of λ.
        split: `halves`: λ was chosen on one half of the prompts and confirmed on the other; `whole`: both are all
            prompts, and λ was chosen on none.
        validation: Scores on held-out rows of the tuning data.
        confirmation: What the confirmation split shows of the chosen point.
        findings: What the sense checks found, the gravest first.
        comparison: Every series at its best; null unless `choice.compare`.
        merged: The merged models.
        summary: Each point's metrics over its models.
        differences: Each point less the base, paired by prompt.
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
        """Whether harmful requests were asked; if not, the verdict is on what is to be kept."""
        return any(benchmark.kind == "safety" for benchmark in self.benchmarks)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return the summary as flat rows: one for each point, benchmark, split and metric."""
        return [row.plain() for row in self.summary]

    @property
    def headline(self) -> str:
        """The verdict and the chosen point."""
        return f"{self.name}: {self.confirmation.verdict}; chosen: {self.choice.point or 'none'}"

    def plot(self) -> Any:
        """Return every benchmark's primary metric against λ as a `matplotlib` figure, which notebooks show."""
        return resolve(FIGURES, "curves")(self)

    @property
    def is_whole(self) -> bool:
        """Whether all prompts are in both splits, as no λ was chosen on them."""
        return self.split == "whole"


class EvaluateResults(Results):
    """Scores that `evaluate` measured or `score` computed.

    Attributes:
        model: What was measured.
        base_name: The base that an adapter was measured on, or that it was merged with; null if there is none.
        environment: What the engine says of itself.
        judge: The judge.
        second_judge: The second judge; null if there is none.
        num_unanswered: Prompts without an answer, of `score --partial`.
        decision: What the judge's findings make of a run whose answers were scored again; null otherwise.
    """

    kind: Literal["evaluate", "score"] = "evaluate"
    model: str
    base_name: str | None = None
    environment: Mapping[str, str] = {}
    judge: Judged
    second_judge: Judged | None = None
    num_unanswered: int = 0
    decision: Redecision | None = None

    noun: ClassVar[str] = "scores of evaluate or score"


class CheckResults(Results):
    """What `check` found.

    Attributes:
        model: What was checked.
        against: The base, or the earlier run that measured it.
        is_against_run: Whether it is an earlier run.
        fingerprints: Hashes of the weights.
        environment: What answered: what the engine says of itself, for `base` and `model`.
        judge: The judge.
        second_judge: The second judge; null if there is none.
        check: The verdict.
        findings: What the sense checks found, the gravest first.
        rows: Each metric at both models.
        num_prompts_rendered_otherwise: Prompts that the two models saw as different texts.
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
        """The verdict on the model."""
        return f"{self.model} against {self.against}: {self.check.verdict}"


KINDS: Mapping[str, type[Results]] = {
    "restore": RestoreResults,
    "evaluate": EvaluateResults,
    "score": EvaluateResults,
    "check": CheckResults,
}


class _Marked(NamedTuple):
    """A key that only one kind has: what files without `kind`, of before it was written, are known by."""

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
            remedy="give the command of the run again; it goes on where it was, and ends with a report.",
        ) from error
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror}", remedy="give a file that you may read.") from error


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
            remedy="delete it and give the command of the run again; what is done is kept.",
        ) from error
    if not isinstance(values, dict):
        raise RunError(f"{file} holds no results", remedy="give the command of the run again.")
    if values.get("schema_version") != SCHEMA_VERSION:
        raise RunError(
            f"{file} has schema version {values.get('schema_version')}, and this backmerge reads {SCHEMA_VERSION}",
            remedy="report with the version that made the run, or run again: what is done is kept.",
        )
    kind = values.get("kind", next((mark.kind for mark in _MARKS if mark.key in values), None))
    if not isinstance(kind, str) or kind not in KINDS:
        raise RunError(
            f"{file} holds results of the kind {kind!r}, and this backmerge reads {', '.join(KINDS)}",
            remedy="read it with the version that made it.",
        )
    return KINDS[kind]
