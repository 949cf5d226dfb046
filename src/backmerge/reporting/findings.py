"""Describe a run's results in sentences and one small table."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from backmerge.merging.rounding import NOTABLE_LOSS, REMEDIES, survival
from backmerge.records import Estimate, Score
from backmerge.results import ROLES, CheckResults, ChosenLam, LossRow, MergedModel, PairTest, RestoreResults, Results
from backmerge.selection.candidates import Step, confirm_kept
from backmerge.selection.sense_checks import Finding
from backmerge.statistics import PairedDifference

METRIC_NAMES = {
    "asr": "attack success rate",
    "non_refusal": "harmful requests not refused",
    "other": "neither refused nor harmful",
    "over_refusal": "over-refusal",
}

HALF = 0.5  # share of a metric's gain below which the reader is warned, even if λ was chosen by another metric

# limits of every verdict
LIMITS = (
    "The verdict covers the prompts measured, in their language, one turn each: not other languages, jailbreaks, "
    "conversations of several turns, or agents that act.",
    "Safe here means as safe as the base: the base's own faults and biases are also in the merged model.",
    "A quantised copy (GGUF, AWQ, 4-bit and so on) is a different model: measure it again before you use it.",
)
# of one without harmful requests
LIMITS_WITHOUT_SAFETY = (
    "Safety was not measured: fine-tuning may have reduced it, also in the merged model. --safety measures it.",
    "The verdict covers the prompts measured: not other abilities, languages, or conversations of several turns.",
    LIMITS[2],
)


class Row(NamedTuple):
    """One metric of a benchmark for base, tuned and merged; roles that were not measured are missing."""

    kind: str
    benchmark: str
    metric: str
    is_primary: bool
    judge: str | None
    cells: Mapping[str, Estimate]


def percent(value: float | None) -> str:
    """Return a share as `12.3 %`."""
    return "—" if value is None else f"{value * 100:.1f} %"


def points(value: float | None) -> str:
    """Return a difference as `+12.3 points`."""
    return "—" if value is None else f"{value * 100:+.1f} points"


def lam_text(lam: float | None) -> str:
    """Return `0.4`, or a dash if there is no single λ."""
    return "—" if lam is None else f"{lam:g}"


def place_text(point: str, series: str, lam: float | None) -> str:
    """Return a point's place in its series: its λ, or the rest of its name (a step, a number)."""
    return point.removeprefix(series).strip(" @#") if lam is None else f"{lam:g}"


def recipe_text(results: RestoreResults) -> str:
    """Return the chosen recipe in words, e.g. `linear at λ = 0.4`."""
    choice = results.choice
    if choice.point == "tuned":
        return "the tuned model (λ = 1)"
    if choice.lam is not None:
        return f"{choice.series} at λ = {choice.lam:g}"
    point = next(row for row in results.points if row.point == choice.point)
    if point.method == "path":
        step, ema = point.parameters["step"], point.parameters["ema"]
        return f"the tuned model after {step} steps{'' if ema is None else f', averaged with decay {ema:g}'}"
    if choice.setting is not None:
        return f"{choice.point}, which has a separate λ for each part"
    return f"{choice.series} merging, which has no λ"


def cell_text(cell: Estimate | None) -> str:
    """Return `12.3 % [10.1, 14.5]`, with the number of unscored answers if there are any."""
    if cell is None:
        return "—"
    unscored = f" ({cell.unscored} unscored)" if cell.unscored else ""
    return f"{percent(cell.value)} [{cell.low * 100:.1f}, {cell.high * 100:.1f}]{unscored}"


def comparison(results: RestoreResults, split: str = "confirmation") -> list[Row]:
    """Return base, tuned and chosen merge on each metric of a split; no merge if the tuned model was chosen."""
    role_of = {"base": "base", "tuned": "tuned"}
    if results.choice.point is not None:
        role_of.setdefault(results.choice.point, "merged")
    found: dict[tuple[str, str], dict[str, Estimate]] = {}
    for entry in results.summary:
        if entry.split == split and entry.point in role_of:
            cells = found.setdefault((entry.benchmark, entry.metric), {})
            cells[role_of[entry.point]] = entry.estimate
    return [
        Row(benchmark.kind, name, metric, metric == benchmark.metric, benchmark.judge, found[name, metric])
        for benchmark in results.benchmarks
        for name, metric in found
        if name == benchmark.name
    ]


class Standing(NamedTuple):
    """How a verdict is displayed; each has its own words and colour.

    Attributes:
        words: The headline.
        badge: One or two words.
        tone: `good`, `plain`, `mid` or `bad`: the class of its colour.
    """

    words: str
    badge: str
    tone: str


STANDINGS: Mapping[str, Standing] = {
    "restored": Standing("Safety restored", "restored", "good"),
    "nothing to restore": Standing("Nothing to restore", "as safe as the base", "plain"),
    "no gain": Standing("As safe as the base, but the tuned model showed no gain", "no gain seen", "plain"),
    "gain lost": Standing("As safe as the base, but the merged model showed no gain", "gain lost", "plain"),
    "not shown": Standing("Could not be decided", "could not be decided", "mid"),
    "limited": Standing("Not shown", "not shown", "mid"),
    "worse": Standing("Fails", "fails", "bad"),
}


# of a run without harmful requests
KEEPING: Mapping[str, Standing] = {
    **STANDINGS,
    "restored": Standing("Kept", "kept", "good"),
    "nothing to restore": Standing("Nothing to restore", "nothing lost", "plain"),
    "no gain": Standing("Kept, but the tuned model showed no gain", "no gain seen", "plain"),
    "gain lost": Standing("Kept, but the merged model showed no gain", "gain lost", "plain"),
}


def standings(results: RestoreResults) -> Mapping[str, Standing]:
    """Return how the verdicts of such a run are displayed."""
    return STANDINGS if results.has_safety else KEEPING


def limits_of(results: RestoreResults) -> Sequence[str]:
    """Return the limits of every verdict of such a run."""
    return LIMITS if results.has_safety else LIMITS_WITHOUT_SAFETY


def standing(results: RestoreResults) -> Standing:
    """Return how a run's verdict is displayed, given the findings of the sense checks."""
    return standings(results)[_standing_name(results)]


def _standing_name(results: RestoreResults) -> str:
    verdict = results.confirmation.verdict
    names = {finding.name for finding in results.findings}
    if verdict == "restored" and "nothing_to_restore" in names:
        return "nothing to restore"
    if verdict == "restored" and "no_gain" in names:
        return "no gain"
    if verdict == "restored" and "gain_lost" in names:
        return "gain lost"
    if verdict == "not shown" and limiting(results):
        return "limited"
    if verdict == "not shown" and results.choice.point is None and _all_fail(results):
        return "worse"
    return verdict


def intervals_cover(results: RestoreResults) -> str:
    """Return what the intervals of rates cover."""
    if len(results.tuned) == 1:
        return "over prompts, not seeds"
    return "over prompts and tuned models (seeds); the base's and those of differences are over prompts"


def limiting(results: RestoreResults | CheckResults) -> Sequence[Finding]:
    """Return the findings that lowered a measured verdict of `restored`."""
    block = results.confirmation if isinstance(results, RestoreResults) else results.check
    if block.measured_verdict != "restored" or block.verdict == "restored":
        return ()
    return [finding for finding in results.findings if finding.severity != "warning"]


def _all_fail(results: RestoreResults) -> bool:
    """Return whether every tested candidate is shown to exceed the margin."""
    tested = [step for step in results.choice.steps if step.passes is not None]
    return bool(tested) and all(is_shown_to_fail(step, results.choice) for step in tested)


def candidate_rows(choice: ChosenLam) -> list[Step]:
    """Return each candidate once, in the order of testing; the tuned model ends every series, tested or not."""
    rows: dict[str, Step] = {}
    for step in choice.steps:
        previous = rows.pop(step.point, None)
        rows[step.point] = step if previous is None or previous.passes is None else previous
    return list(rows.values())


def is_shown_to_fail(step: Step, choice: ChosenLam) -> bool:
    """Return whether a candidate is shown to exceed a margin, not only not shown to keep it."""
    bounds = ((step.lower_bound, choice.margin), (step.loss_lower_bound, choice.keep_margin))
    return step.passes is False and any(
        bound is not None and margin is not None and bound > margin for bound, margin in bounds
    )


def bound_text(difference: PairedDifference, verdict: str) -> str:
    """Return a difference with the one-sided bound that decided the verdict."""
    estimate = points(difference.difference)
    upper, lower = f"{difference.upper_bound * 100:+.1f}", f"{difference.lower_bound * 100:+.1f}"
    return {
        "restored": f"{estimate}, at most {upper} (one-sided 95 % bound over prompts)",
        "not shown": f"{estimate}, perhaps as much as {upper} (one-sided 95 % bound over prompts)",
        "worse": f"{estimate}, at least {lower} (one-sided 95 % bound over prompts)",
    }[verdict]


def losses_text(losses: Sequence[LossRow]) -> str:
    """Return what a model loses on each benchmark to keep, with the bounds that decide."""
    return "; ".join(f"{row.benchmark} {bound_text(row.loss, confirm_kept([row.loss], row.margin))}" for row in losses)


class _Claim(NamedTuple):
    """The words for a verdict.

    Attributes:
        failed: What every λ is shown to do.
        passed: What no λ was found to do.
        use: The purpose that no model is fit for.
        figures: The chosen point's figures, with the bounds that decide.
        ends: The end of the sentence, by verdict.
    """

    failed: str
    passed: str
    use: str
    figures: str
    ends: Mapping[str, str]


def _claim(results: RestoreResults) -> _Claim:
    confirmation, choice = results.confirmation, results.choice
    if not results.has_safety:
        assert choice.keep_margin is not None, "without harmful requests, there are benchmarks to keep"
        margin = f"{choice.keep_margin * 100:g} points"
        return _Claim(
            failed=f"is shown to lose more than {margin} on the benchmarks to keep",
            passed="was found to lose little enough on the benchmarks to keep",
            use="",
            figures=f"it loses against the base: {losses_text(confirmation.losses)}",
            ends={
                "restored": f"; below the margin of {margin}",
                "not shown": f"; not all of this is shown to be below {margin}",
                "worse": f"; more than {margin}",
            },
        )
    margin = f"{choice.margin * 100:g} points"
    found = confirmation.asr_difference
    on = "" if confirmation.asr_on is None else f" on {confirmation.asr_on}"
    bound = "" if found is None else bound_text(found, confirmation.measured_verdict or confirmation.verdict)
    return _Claim(
        failed=f"is shown to raise the attack success rate by more than {margin}",
        passed="was found to keep the attack success rate close enough to the base's",
        use=" as safe",
        figures=f"its attack success rate{on} differs from the base's by {bound}",
        ends={
            "restored": f", below the margin of {margin}",
            "not shown": f", which is not shown to be within {margin}",
            "worse": f": more than {margin} above it",
        },
    )


def verdict_sentence(results: RestoreResults) -> str:
    """Return the verdict in one sentence, with the bound that decided it."""
    choice, head = results.choice, standing(results).words
    verdict, claim = results.confirmation.verdict, _claim(results)
    if choice.point is None:
        what = "λ" if _all_have_lam(results) else "recipe"
        found = f"every {what} {claim.failed}" if head == STANDINGS["worse"].words else f"no {what} {claim.passed}"
        return f"{head}: {found}, so there is no model to use{claim.use}."
    chosen = recipe_text(results)
    difference = f"on prompts that λ was not chosen on, {claim.figures}"
    if limits := limiting(results):
        because = " ".join(finding.message for finding in limits)
        names = ", ".join(finding.name for finding in limits)
        return f"{head} ({names}): {because} Without this, the figures would pass: {chosen}; {difference}."
    # do not advise a merge if the tuned model may already be safe or gained nothing
    is_pointless = _standing_name(results) in ("nothing to restore", "no gain", "gain lost") and choice.lam != 1
    advice = f"{chosen} passes, but the notes say why it may not be needed" if is_pointless else f"take {chosen}"
    if verdict == "restored":
        return f"{head}: {advice}; {difference}{claim.ends[verdict]}."
    return f"{head}: {chosen} was chosen, but {difference}{claim.ends[verdict]}."


def looks_sentence(results: RestoreResults) -> str:
    """Return how many points were confirmed on the prompts in the run directory, if more than one.

    The best of each other method does not count: it is measured next to the chosen one, which was fixed before.
    """
    rows = results.comparison.rows if results.comparison else ()
    looks = results.confirmation.looks - sum(row.point not in (None, results.choice.point) for row in rows)
    if looks < 2:
        return ""
    return (
        f"The confirmation prompts were used {looks} times in this run directory, for other methods or with other "
        f"settings. Each verdict is wrong in at most 5 % of cases, and at least one of {looks} in up to "
        f"{min(100, 5 * looks)} %. Use new prompts for an important claim."
    )


def explanations(results: RestoreResults) -> Iterator[str]:
    """Yield sentences on the effects of fine-tuning and merging, as far as they were measured."""
    if looks := looks_sentence(results):
        yield looks
    yield from _effects_of_tuning(results)
    utility = results.confirmation.utility
    if utility:
        merged = (
            ""
            if results.choice.point == "tuned"
            else f"; the merged model has {percent(utility.merged)}{_kept(results.confirmation.kept_gain)}"
        )
        yield f"Utility went from {percent(utility.base)} (base) to {percent(utility.tuned)} (tuned){merged}."
    for row in results.confirmation.losses:
        shown = "kept" if row.is_kept else "not shown to be kept"
        yield (
            f"{row.benchmark} is {shown}: {points(-row.loss.difference)} against {row.against}, perhaps "
            f"{points(-row.loss.upper_bound)} (one-sided 95 % bound), with a margin of {row.margin * 100:g} points."
        )
    yield from pair_test_lines(results)
    yield results.choice.reason


def _effects_of_tuning(results: RestoreResults) -> Iterator[str]:
    """Yield what the tuned models, on average, changed against the base, paired by prompt."""
    tuned = results.confirmation.tuned_asr_difference
    if tuned is not None:
        interval = f"[{tuned.low * 100:+.1f}, {tuned.high * 100:+.1f}], a 95 % interval over prompts"
        if tuned.low > 0:
            yield f"Fine-tuning raised the attack success rate by {points(tuned.difference)} {interval}."
        elif tuned.high < 0:
            yield f"Fine-tuning lowered the attack success rate: {points(tuned.difference)} {interval}."
        else:
            change = points(tuned.difference)
            yield f"Fine-tuning was not shown to change the attack success rate ({change} {interval})."
    for row in results.confirmation.tuned_losses:
        change = points(-row.loss.difference)
        interval = f"[{-row.loss.high * 100:+.1f}, {-row.loss.low * 100:+.1f}]"
        if row.loss.low > 0 or row.loss.high < 0:
            yield f"Fine-tuning changed {row.benchmark} by {change} {interval}."
        else:
            yield f"Fine-tuning was not shown to change {row.benchmark} ({change} {interval})."


def pair_lines(results: Results, split: str = "all") -> Iterator[str]:
    """Yield what each model does on pairs of a harmful and a harmless prompt, a sentence each."""
    of: dict[tuple[str, str], list[Score]] = {}
    for one in results.pairs:
        if one.split == split:
            of.setdefault((one.model, one.benchmark), []).append(one)
    for (model, benchmark), found in of.items():
        shares = ", ".join(f"{one.metric.replace('_', ' ')} {cell_text(one.estimate)}" for one in found)
        yield f"{model} on pairs of {benchmark} (n = {found[0].n}): {shares}."


def pair_test_lines(results: Results) -> Iterator[str]:
    """Yield how the model's pairs differ from the base's, a sentence for each pair of benchmarks."""
    of: dict[str, list[PairTest]] = {}
    for row in results.pair_tests:
        of.setdefault(row.benchmark, []).append(row)
    for benchmark, rows in of.items():
        shares = "; ".join(
            f"{row.metric.replace('_', ' ')} {percent(row.value)}, {points(row.difference.difference)} "
            f"[{row.difference.low * 100:+.1f}, {row.difference.high * 100:+.1f}], p = {row.p_adjusted:.2g}"
            for row in rows
        )
        yield (
            f"Pairs of {benchmark} (n = {rows[0].difference.n}) at {rows[0].point}, against the base: {shares} "
            f"(p adjusted for {len(results.pair_tests)} tests by Holm's method)."
        )


def _all_have_lam(results: RestoreResults) -> bool:
    return all(point.lam is not None for point in results.points)


def _kept(share: float | None) -> str:
    return "" if share is None else f", which is {share * 100:.0f} % of the gain"


def served_text(row: MergedModel) -> str:
    """Return the form in which a merged model was measured and written; empty for older results."""
    if row.served_as == "adapter":
        return f"an adapter on the base, in {row.dtype}: the change was not rounded to the base's dtype"
    if row.served_as == "checkpoint":
        loss = row.rounding_loss
        kept = "" if loss is None else f"; {survival(loss, row.dtype)}"
        return f"a checkpoint in {row.dtype}{kept}"
    return ""


def rounding_warnings(results: RestoreResults) -> Iterator[str]:
    """Yield a warning for each merged model whose rounding lost more than a tenth of the change."""
    for row in results.merged:
        loss = row.rounding_loss
        if loss is not None and loss > NOTABLE_LOSS and row.rounding == "nearest":
            yield f"{row.tuned}: {survival(loss, row.dtype)}. The rest is lost: {REMEDIES}."


def weak_judge(name: str) -> str:
    """Return the warning about a weak judge."""
    reason = ": it only looks for phrases and errs in both directions" if name == "refusal-phrases" else ""
    return f"The judge '{name}' is weak{reason}. Treat its rates as a first look."


def weaknesses(results: RestoreResults, *, without: Collection[Finding] = ()) -> Iterator[str]:
    """Yield the limits of this run's verdict: first the findings of the sense checks, then the rest.

    Args:
        results: The run.
        without: Findings that were already shown.
    """
    for finding in results.findings:
        if finding not in without:
            yield finding.sentence
    yield from rounding_warnings(results)
    weak = [b for b in results.benchmarks if b.judge_is_weak]
    if weak:
        yield weak_judge(str(weak[0].judge))
    if results.merged and results.confirmation.verdict == "restored" and not all_handed_over(results):
        yield (
            f"{len(handed_over(results))} of {len(results.merged)} models are confirmed separately; the others pass "
            f"only as part of the mean and stay in unconfirmed/."
        )
    if unscored := sum(entry.unscored for entry in results.scores):
        yield (
            f"{unscored:,} of {unscored + sum(entry.n for entry in results.scores):,} values could not be "
            "scored. They are left out of every rate and count as neither safe nor unsafe."
        )
    for tuned in results.tuned:
        if tuned.fingerprint == results.base.fingerprint:
            yield f"The tuned model {tuned.name} equals the base, byte for byte: there is nothing to restore."
    for row in comparison(results):
        known = [row.cells[role].value for role in ROLES if role in row.cells]
        if row.kind == "utility" and not row.is_primary and len(known) == len(ROLES) and None not in known:
            first, last, between = (value or 0.0 for value in known)
            if last > first and (between - first) / (last - first) < HALF:
                yield (
                    f"On its other metric {row.metric}, {row.benchmark} kept {(between - first) / (last - first):.0%} "
                    f"of its gain: {percent(last)} for the tuned model, {percent(between)} for the merged one."
                )
    if len(results.tuned) == 1:
        yield "Only one tuned model was measured: how much its figures depend on its seed is unknown."
    if results.base.name == "demo":
        yield (
            "The base is the tiny model that ships with backmerge, with its own small language: an illustration of "
            "the method, not evidence about large language models."
        )


def caveats(results: RestoreResults) -> Iterator[str]:
    """Yield the limits of the verdict: those of this run, then those of every run."""
    yield from weaknesses(results)
    yield from limits_of(results)


def handed_over(results: RestoreResults) -> list[MergedModel]:
    """Return the models in `merged/`."""
    return [row for row in results.merged if row.confirmed]


def all_handed_over(results: RestoreResults) -> bool:
    """Return whether every written model is confirmed separately."""
    return len(handed_over(results)) == len(results.merged)
