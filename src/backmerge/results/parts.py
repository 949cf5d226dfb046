"""Define the parts of the results of all kinds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from backmerge.records import Estimate, Score
from backmerge.results.form import TABLE, Difference, Level, Part
from backmerge.selection.candidates import Step, Verdict

Role = Literal["base", "tuned", "merged"]
BenchmarkKind = Literal["utility", "safety", "over_refusal", "keep"]
ROLES: tuple[Role, ...] = ("base", "tuned", "merged")


class Judged(Part):
    """A judge.

    Attributes:
        name: Its name.
        is_weak: Whether it is only for a first look.
    """

    name: str
    is_weak: bool


class Rate(Part):
    """A share of answers.

    Attributes:
        value: The share; null if there are no answers.
        low: Lower end of its 95 % interval.
        high: Upper end.
        n: Answers.
    """

    value: float | None
    low: float
    high: float
    n: int


class JudgesAgreement(Part):
    """How far two judges agree on all models' answers to one benchmark.

    Attributes:
        model: The only model, in files of earlier versions; otherwise null.
        num_models: Models whose answers are counted.
        benchmark: The benchmark.
        split: The split.
        finding: The compared finding: `harmful` or `refusal`.
        table: Counts, with the first judge's verdicts as rows and the second's as columns, each as yes, no, unscored.
        kappa: Cohen's κ; null if it is not defined.
        low: Lower end of its 95 % interval.
        high: Upper end.
        observed: Share of the answers on which they agree.
        first: The first judge's rate.
        second: The second judge's rate.
        n: Answers that both scored.
        unscored: Answers that at least one of them did not score.
        differ_on: Answers on which they differ, each as the model and the prompt's id.
    """

    model: str | None = None
    num_models: int = 1
    benchmark: str
    split: str
    finding: Literal["harmful", "refusal"]
    table: tuple[tuple[int, ...], ...]
    kappa: float | None
    low: float
    high: float
    observed: Rate
    first: Rate
    second: Rate
    n: int
    unscored: int
    differ_on: tuple[str, ...]


class GuardRow(Part):
    """A guard: prompts on which merges are made to act like the base.

    Attributes:
        role: The name under which methods use them.
        guard: Its name, also in a point's parameters.
        model: Fingerprint of the model whose inputs were gathered.
        description: Its prompts, described in words.
        statistics: The file of the model's inputs, relative to the run directory or as a path.
        fingerprint: Hash of that file.
        source: Its full settings, since two files may have the same short name; empty in files of earlier versions.
    """

    role: str = ""
    guard: str
    model: str = ""
    description: str
    statistics: str
    fingerprint: str
    source: str = ""


class ModelForm(Part):
    """How a model was measured on a split.

    Attributes:
        model: As in `scores`.
        split: The split.
        served_as: What a user loads: `adapter` or `checkpoint`; `server` for a model on a server; `earlier` for answers
            of an earlier run.
        dtype: The dtype of the adapter's factors or the checkpoint's tensors; null if unknown.
        reached_as: How the engine loaded it: `base`, `live`, `adapter` or `checkpoint`; null if unknown.
        computed_in: The dtype of the engine's computation; null if unknown.
    """

    model: str
    split: str
    served_as: str
    dtype: str | None
    reached_as: str | None
    computed_in: str | None


@dataclass(frozen=True)
class CategoryScore(Score):
    """A score on the prompts of one category, for a benchmark that has several.

    Attributes:
        category: The category.
    """

    category: str = ""


class Base(Part):
    """The base.

    Attributes:
        name: As in the settings.
        fingerprint: Hash of its weights and of its prompt format.
        license: From its model card; null if it states none.
        license_name: The name of a licence that the hub does not know (`other`).
        license_link: The address of that licence.
    """

    name: str
    fingerprint: str
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


class TunedModel(Part):
    """A tuned model.

    Attributes:
        name: Its name in this run.
        kind: `adapter` or `checkpoint`.
        fingerprint: Hash of its weights.
    """

    name: str
    kind: Literal["adapter", "checkpoint"]
    fingerprint: str


class Sizes(Part):
    """How many prompts a benchmark has.

    Attributes:
        selection: In the selection split.
        confirmation: In the confirmation split.
    """

    selection: int
    confirmation: int

    def of(self, split: str) -> int:
        """Return the number of prompts in a split."""
        return self.selection if split == "selection" else self.confirmation


class BenchmarkRow(Part):
    """A benchmark.

    Attributes:
        name: Its name.
        kind: `utility`, `safety` or `over_refusal`.
        metric: Its primary metric.
        sizes: Its prompts.
        judge: The name of its judge; null for utility.
        judge_is_weak: Whether that judge is only for a first look.
    """

    name: str
    kind: BenchmarkKind
    metric: str
    sizes: Sizes
    judge: str | None
    judge_is_weak: bool


class PointRow(Part):
    """A recipe that was measured, base and tuned model included.

    Attributes:
        point: Its name, such as `linear@0.4`.
        role: `base`, `tuned` or `merged`.
        series: The name of all points that differ only in λ, such as `linear`.
        lam: λ; null if the method has none, or if parts of the model have different ones.
        setting: λ as the recipe takes it: a number, a list over layers, a table by module; null if the method has none.
        method: The merge method; `path` for snapshots of the tuning; null for base and tuned.
        parameters: The method's other parameters.
        tuned: `each`: a merge for each tuned model; `all`: one merge of all of them.
    """

    point: str
    role: Role
    series: str
    lam: float | None
    setting: Any = None
    method: str | None = None
    parameters: Mapping[str, Any] = {}
    tuned: Literal["each", "all"] = "each"


class ChosenLam(Part):
    """The choice of λ, made on the selection split or the held-out rows.

    Attributes:
        rule: The rule's name.
        margin: How far the attack success rate may exceed the base's.
        keep_margin: The largest accepted loss on each benchmark to keep; null if there is none.
        point: The chosen point; null if none passed.
        series: Its series; null in the same case.
        lam: Its λ; null in the same case, or if there is no single one.
        setting: Its λ as the recipe takes it.
        reason: The reason for the choice.
        steps: The result of each candidate, in the order tested.
    """

    rule: str
    margin: float
    keep_margin: float | None = None
    point: str | None
    series: str | None
    lam: float | None
    setting: Any = None
    reason: str = ""
    steps: tuple[Annotated[Step, TABLE], ...] = ()


class LossRow(Part):
    """The loss of a point or model on a benchmark to keep.

    Attributes:
        benchmark: Its name.
        against: The reference: `base` or `tuned`.
        margin: The loss must be below this.
        is_kept: Whether its one-sided 95 % bound is below the margin.
        loss: The reference's value minus the point's, paired by prompt.
    """

    benchmark: str
    against: str
    margin: float
    is_kept: bool
    loss: Difference


class ModelVerdict(Part):
    """The verdict on one merged model.

    Attributes:
        tuned: The tuned model that it comes from, or `all`.
        verdict: `restored`, `not shown` or `worse`.
        asr_difference: Its attack success rate minus the base's; null without harmful requests.
        asr_difference_if_unscored_harmful: The same, with every unscored answer counted as harmful here and as safe at
            the base.
        asr_on: The benchmark that both differences are on, if each must meet the margin: the one that decides; null if
            all count together.
        losses: Its loss on each benchmark to keep; each is part of the verdict.
    """

    tuned: str
    verdict: Verdict
    asr_difference: Difference | None = None
    asr_difference_if_unscored_harmful: Difference | None = None
    asr_on: str | None = None
    losses: tuple[LossRow, ...] = ()


class UtilityOfRoles(Part):
    """Mean utility on the confirmation split.

    Attributes:
        base: The base's.
        tuned: The tuned models'.
        merged: The chosen point's.
    """

    base: float
    tuned: float
    merged: float


class Confirmation(Part):
    """The chosen point on the confirmation split.

    Attributes:
        verdict: `restored`, `not shown` or `worse`: on safety; without harmful requests, on the abilities to keep.
        measured_verdict: The verdict of the figures alone, without the findings.
        tuned_asr_difference: The tuned models' attack success rate minus the base's, over all safety benchmarks; null
            if there are none.
        tuned_losses: The tuned models' loss on each benchmark to keep, against the base.
        asr_difference: The chosen point's attack success rate minus the base's; null if none was chosen.
        asr_difference_if_unscored_harmful: The same, with every unscored answer counted as harmful here and as safe at
            the base; null if none was chosen.
        asr_on: The benchmark that both differences are on, if each must meet the margin (`choice.pooled: false`): the
            one that decides; null if all count together.
        models: The verdict on each merged model.
        utility: Mean utility; null if no point was chosen.
        kept_gain: Share of the tuned models' gain that the chosen point keeps; null if there was none.
        losses: The chosen point's loss on each benchmark to keep; empty if there are none.
        looks: The number of confirmations on these prompts in this run directory, including this one: of the best point
            of every compared series, and with other settings.
    """

    verdict: Verdict
    measured_verdict: Verdict | None = None
    tuned_asr_difference: Difference | None = None
    tuned_losses: tuple[LossRow, ...] = ()
    asr_difference: Difference | None = None
    asr_difference_if_unscored_harmful: Difference | None = None
    asr_on: str | None = None
    models: tuple[ModelVerdict, ...] = ()
    utility: UtilityOfRoles | None = None
    kept_gain: float | None = None
    losses: tuple[LossRow, ...] = ()
    looks: int = 1


class ComparisonRow(Part):
    """The best point of a series, on the confirmation split.

    Attributes:
        series: Its name.
        point: Its best point by the rule; null if none passed.
        lam: That point's λ.
        setting: That λ as the recipe takes it.
        reason: The reason for that point.
        num_models: The number of its models.
        utility: Mean over utility benchmarks.
        asr: Mean over safety benchmarks.
        over_refusal: Mean over over-refusal benchmarks.
        asr_difference: Attack success rate minus the base's; as in `confirmation`.
        losses: Its loss on each benchmark to keep; each is part of the verdict.
        utility_difference: Utility minus the reference's, paired by prompt.
        p_adjusted: Two-sided p for that difference, adjusted for the number of series by Holm's method.
        verdict: As in `confirmation`.
    """

    series: str
    point: str | None
    lam: float | None
    setting: Any = None
    reason: str
    num_models: int = 0
    utility: Level | None = None
    asr: Level | None = None
    over_refusal: Level | None = None
    asr_difference: Difference | None = None
    losses: tuple[LossRow, ...] = ()
    utility_difference: Difference | None = None
    p_adjusted: float | None = None
    verdict: Verdict = "not shown"


class Comparison(Part):
    """The best point of every series, on the confirmation split.

    Attributes:
        reference: The series that the others are compared with.
        rows: The series.
    """

    reference: str
    rows: tuple[ComparisonRow, ...]


class MergedModel(Part):
    """A merged model on the disk.

    Attributes:
        tuned: The tuned model that it comes from, or `all`.
        point: Its point.
        directory: Its folder, relative to the run directory.
        confirmed: Whether both its own verdict and that on the mean are `restored`.
        served_as: The form that was measured and written: `adapter` or `checkpoint`.
        dtype: The dtype of the adapter's factors or the checkpoint's tensors; empty if not recorded.
        rounding: `nearest` or `stochastic`.
        rounding_loss: Share of the change that rounding lost, estimated from 1 % of it; null for an adapter.
    """

    tuned: str
    point: str
    directory: str
    confirmed: bool
    served_as: Literal["adapter", "checkpoint"] | None = None
    dtype: str = ""
    rounding: str = "nearest"
    rounding_loss: float | None = None


class SummaryRow(Part):
    """A point's metric over its models.

    Attributes:
        point: The point.
        role: The point's role.
        series: The point's series.
        lam: The point's λ.
        benchmark: The benchmark.
        split: `selection` or `confirmation`.
        metric: The metric.
        mean: Mean over the models; null if nothing was scored.
        spread: Standard deviation over the models; null for one model.
        low: Lower end of the 95 % interval: over prompts or, with several models, over models, whichever is lower.
        high: Upper end, likewise.
        lowest: The lowest of the models.
        highest: The highest of the models.
        covers: What the interval covers: `prompts`, or `prompts and seeds` of several models.
        num_models: The number of models.
        n: Prompts that were scored, for each model.
        unscored: Answers that were not scored, over all models.
    """

    point: str
    role: Role
    series: str
    lam: float | None
    benchmark: str
    split: str
    metric: str
    mean: float | None
    spread: float | None
    low: float
    high: float
    lowest: float | None = None
    highest: float | None = None
    covers: str = ""
    num_models: int
    n: int
    unscored: int

    @property
    def estimate(self) -> Estimate:
        """Return the mean with its interval."""
        return Estimate(
            self.mean,
            self.low,
            self.high,
            self.n,
            unscored=self.unscored,
            spread=self.spread,
            num_models=self.num_models,
        )


class DifferenceRow(Part):
    """A point minus the base on a benchmark's primary metric, paired by prompt.

    Attributes:
        point: The point.
        against: `base`.
        benchmark: The benchmark.
        split: The split.
        metric: The metric.
        covers: `prompts`: the mean over the models is compared, prompt by prompt.
        difference: The first minus the second, from -1 to 1.
        low: Lower end of the 95 % interval.
        high: Upper end.
        lower_bound: One-sided lower 95 % bound.
        upper_bound: One-sided upper 95 % bound, which is compared with a margin.
        n: The number of prompts.
        n_effective: The number of independent prompts, with near-duplicates counted as one.
    """

    point: str
    against: str
    benchmark: str
    split: str
    metric: str
    covers: str = "prompts"
    difference: float
    low: float
    high: float
    lower_bound: float
    upper_bound: float
    n: int
    n_effective: float


class PairTest(Part):
    """A share of pairs of prompts at a point or model, tested against the base's on the same pairs.

    Attributes:
        point: The point, or `model` for a check.
        benchmark: The benchmarks that form the pairs, the harmful one first.
        split: The split.
        metric: `told_apart`, `both_answered`, `both_refused` or `reversed`.
        base: The base's share, in [0, 1].
        tuned: The tuned models' share; null for a check.
        value: The point's share.
        difference: The point's share minus the base's.
        p: Two-sided p for that difference, by flipping signs over clusters of prompts.
        p_adjusted: The same, adjusted for the number of shares tested by Holm's method.
    """

    point: str
    benchmark: str
    split: str
    metric: str
    base: float
    tuned: float | None = None
    value: float
    difference: Difference
    p: float
    p_adjusted: float


class ValidationRow(Part):
    """A point's score on rows that the tuning held out; only under rule `paper`.

    Attributes:
        point: The point.
        metric: `log_likelihood`, `accuracy` or `bertscore_f1`; higher is better.
        score: Mean over tuned models and rows.
        n: The number of rows, over all tuned models.
        note: Anything special about the rows; usually empty.
    """

    point: str
    metric: str
    score: float
    n: int
    note: str = ""


class DriftRow(Part):
    """How far tuning moved a part of the model.

    Attributes:
        tuned: The tuned model.
        stack: The layers' prefix, such as `model.layers`; null outside layers.
        layer: The layer's number; null outside layers.
        module: The module, such as `self_attn.q_proj`.
        relative_change: Norm of the change divided by the norm of the base's weights; null if there is no such ratio.
    """

    tuned: str
    stack: str | None
    layer: int | None
    module: str
    relative_change: float | None
