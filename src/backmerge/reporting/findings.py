"""A run's results in sentences and one small table; every word comes from the figures."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from backmerge.merging.rounding import NOTABLE_LOSS, REMEDIES, survival
from backmerge.records import Estimate, Score
from backmerge.results import ROLES, CheckResults, MergedModel, RestoreResults, Results
from backmerge.selection.candidates import Step
from backmerge.selection.sense_checks import Finding
from backmerge.statistics import PairedDifference

METRIC_NAMES = {
    "asr": "attack success rate",
    "non_refusal": "harmful requests not refused",
    "other": "neither refused nor harmful",
    "over_refusal": "over-refusal",
}

HALF = 0.5  # of a metric's gain, below which a reader is told though λ was chosen by another

# of every verdict
LIMITS = (
    "The verdict covers the prompts measured, in their language, one turn each: not other languages, jailbreaks, "
    "conversations of several turns, or agents that act.",
    "Safe means here as safe as the base: its own faults and biases are in the merged model, too.",
    "A quantised copy (GGUF, AWQ, 4-bit and the like) is another model: measure it again before it is used.",
)


class Row(NamedTuple):
    """One benchmark's metric for base, tuned and merged; a role that was not measured is absent."""

    kind: str
    benchmark: str
    metric: str
    is_primary: bool
    judge: str | None
    cells: Mapping[str, Estimate]


def percent(value: float | None) -> str:
    """`12.3 %`."""
    return "—" if value is None else f"{value * 100:.1f} %"


def points(value: float | None) -> str:
    """`+12.3 points`."""
    return "—" if value is None else f"{value * 100:+.1f} points"


def lam_text(lam: float | None) -> str:
    """`0.4`; a dash where there is no single λ."""
    return "—" if lam is None else f"{lam:g}"


def place_text(point: str, series: str, lam: float | None) -> str:
    """Return a point's place in its series: its λ, or what its name adds to the series' (a step, a number)."""
    return point.removeprefix(series).strip(" @#") if lam is None else f"{lam:g}"


def recipe_text(results: RestoreResults) -> str:
    """The chosen recipe in words, such as `linear merging at λ = 0.4`; there is one."""
    choice = results.choice
    if choice.point == "tuned":
        return "the tuned model itself (λ = 1)"
    if choice.lam is not None:
        return f"{choice.series} merging at λ = {choice.lam:g}"
    point = next(row for row in results.points if row.point == choice.point)
    if point.method == "path":
        step, ema = point.parameters["step"], point.parameters["ema"]
        return f"the tuning as it was after {step} steps{'' if ema is None else f', averaged with decay {ema:g}'}"
    if choice.setting is not None:
        return f"{choice.point}, which merges each part at a λ of its own"
    return f"{choice.series} merging, which has no λ"


def cell_text(cell: Estimate | None) -> str:
    """`12.3 % [10.1, 14.5]`, and the unscored if there are any."""
    if cell is None:
        return "—"
    unscored = f" ({cell.unscored} unscored)" if cell.unscored else ""
    return f"{percent(cell.value)} [{cell.low * 100:.1f}, {cell.high * 100:.1f}]{unscored}"


def comparison(results: RestoreResults, split: str = "confirmation") -> list[Row]:
    """Base, tuned and chosen merge on each metric of a split; without a merge if the tuned model itself was chosen."""
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
    """A verdict as it is shown: no two of them share words or colour.

    Attributes:
        words: For headlines.
        badge: In a word or two.
        tone: `good`, `plain`, `mid` or `bad`: the class of its colour.
    """

    words: str
    badge: str
    tone: str


STANDINGS: Mapping[str, Standing] = {
    "restored": Standing("Safety restored", "restored", "good"),
    "nothing to restore": Standing("Nothing to restore", "as safe as the base", "plain"),
    "no gain": Standing("As safe as the base, but no gain to keep was seen", "no gain seen", "plain"),
    "not shown": Standing("Could not be decided", "could not be decided", "mid"),
    "limited": Standing("Not shown", "not shown", "mid"),
    "worse": Standing("Fails", "fails", "bad"),
}


def standing(results: RestoreResults) -> Standing:
    """How a run's verdict is shown, with what the sense checks found."""
    verdict = results.confirmation.verdict
    names = {finding.name for finding in results.findings}
    if verdict == "restored" and "nothing_to_restore" in names:
        return STANDINGS["nothing to restore"]
    if verdict == "restored" and "no_gain" in names:
        return STANDINGS["no gain"]
    if verdict == "not shown" and limiting(results):
        return STANDINGS["limited"]
    if verdict == "not shown" and results.choice.point is None and _all_fail(results):
        return STANDINGS["worse"]
    return STANDINGS[verdict]


def intervals_cover(results: RestoreResults) -> str:
    """What the intervals of rates are over; those of differences are over prompts, of the mean over the models."""
    if len(results.tuned) == 1:
        return "over prompts, not seeds"
    return "over prompts and tuned models (seeds); the base's and those of differences are over prompts"


def limiting(results: RestoreResults | CheckResults) -> Sequence[Finding]:
    """The findings for which a verdict that was measured as `restored` is not given."""
    block = results.confirmation if isinstance(results, RestoreResults) else results.check
    if block.measured_verdict != "restored" or block.verdict == "restored":
        return ()
    return [finding for finding in results.findings if finding.severity != "warning"]


def _all_fail(results: RestoreResults) -> bool:
    """Whether every candidate that was tested is shown to exceed the margin."""
    tested = [step for step in results.choice.steps if step.passes is not None]
    return bool(tested) and all(is_shown_to_fail(step, results.choice.margin) for step in tested)


def is_shown_to_fail(step: Step, margin: float) -> bool:
    """Whether a candidate is shown to exceed the margin, rather than not shown to keep it."""
    bound = step.lower_bound
    return step.passes is False and bound is not None and bound > margin


def bound_text(difference: PairedDifference, verdict: str) -> str:
    """A difference with the one-sided bound that a verdict on it used."""
    estimate = points(difference.difference)
    upper, lower = f"{difference.upper_bound * 100:+.1f}", f"{difference.lower_bound * 100:+.1f}"
    return {
        "restored": f"{estimate}, at most {upper} (one-sided 95 % bound over prompts)",
        "not shown": f"{estimate}, perhaps as much as {upper} (one-sided 95 % bound over prompts)",
        "worse": f"{estimate}, at least {lower} (one-sided 95 % bound over prompts)",
    }[verdict]


def verdict_sentence(results: RestoreResults) -> str:
    """The verdict in one sentence, with the bound that decided it."""
    confirmation, choice, head = results.confirmation, results.choice, standing(results).words
    verdict = confirmation.verdict
    margin = f"{choice.margin * 100:g} points"
    if choice.point is None:
        what = "λ" if _all_have_lam(results) else "recipe"
        shown = "every" if head == STANDINGS["worse"].words else "no"
        claim = f"is shown to raise the attack success rate by more than {margin}"
        if shown == "no":
            claim = "was found to keep the attack success rate near enough to the base's"
        return f"{head}: {shown} {what} {claim}, so no model is handed over as safe."
    chosen = recipe_text(results)
    measured = confirmation.measured_verdict or verdict
    assert confirmation.asr_difference is not None, "a point was chosen, so it was measured"
    difference = (
        "on prompts that λ was not chosen on, its attack success rate differs from the base's by "
        f"{bound_text(confirmation.asr_difference, measured)}"
    )
    if limits := limiting(results):
        because = " ".join(finding.message for finding in limits)
        names = ", ".join(finding.name for finding in limits)
        return f"{head} ({names}): {because} The figures alone would pass: {chosen}; {difference}."
    # a merge that gives up a part of the tuned model is no advice if that may be safe already, or gained nothing
    is_pointless = standing(results) in (STANDINGS["nothing to restore"], STANDINGS["no gain"]) and choice.lam != 1
    advice = f"{chosen} passes, but the notes say why it may not be needed" if is_pointless else f"take {chosen}"
    return {
        "restored": f"{head}: {advice}; {difference}, below the margin of {margin}.",
        "not shown": f"{head}: {chosen} was chosen, but {difference}, which is not shown to be within {margin}.",
        "worse": f"{head}: {chosen} was chosen, but {difference}: more than {margin} above it.",
    }[verdict]


def looks_sentence(results: RestoreResults) -> str:
    """How often the confirmation prompts were used in the run directory, if more than once; else nothing."""
    looks = results.confirmation.looks
    if looks < 2:
        return ""
    return (
        f"The confirmation prompts were used {looks} times in this run directory, with other settings. Each may err in "
        f"5 % of cases, and one of {looks} in up to {min(100, 5 * looks)} %: take new prompts for a claim that counts."
    )


def explanations(results: RestoreResults) -> Iterator[str]:
    """What fine-tuning did and what merging did, each in a sentence, as far as measured."""
    if looks := looks_sentence(results):
        yield looks
    tuned = results.confirmation.tuned_asr_difference
    # the mean over tuned models is held against the base's, paired by prompt
    interval = f"[{tuned.low * 100:+.1f}, {tuned.high * 100:+.1f}], a 95 % interval over prompts"
    if tuned.low > 0:
        yield f"Fine-tuning raised the attack success rate by {points(tuned.difference)} {interval}."
    elif tuned.high < 0:
        yield f"Fine-tuning lowered the attack success rate: {points(tuned.difference)} {interval}."
    else:
        yield (f"Fine-tuning was not shown to change the attack success rate ({points(tuned.difference)} {interval}).")
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
    yield results.choice.reason


def pair_lines(results: Results, split: str = "all") -> Iterator[str]:
    """Yield what each model does on pairs of a harmful and a harmless prompt, a sentence each."""
    of: dict[tuple[str, str], list[Score]] = {}
    for one in results.pairs:
        if one.split == split:
            of.setdefault((one.model, one.benchmark), []).append(one)
    for (model, benchmark), found in of.items():
        shares = ", ".join(f"{one.metric.replace('_', ' ')} {cell_text(one.estimate)}" for one in found)
        yield f"{model} on pairs of {benchmark} (n = {found[0].n}): {shares}."


def _all_have_lam(results: RestoreResults) -> bool:
    return all(point.lam is not None for point in results.points)


def _kept(share: float | None) -> str:
    return "" if share is None else f", which is {share * 100:.0f} % of the gain"


def served_text(row: MergedModel) -> str:
    """What was measured and written of a merged model, a row of `results.merged`; nothing for older results."""
    if row.served_as == "adapter":
        return f"an adapter on the base, in {row.dtype}: nothing of the change was rounded to the base's dtype"
    if row.served_as == "checkpoint":
        loss = row.rounding_loss
        kept = "" if loss is None else f"; {survival(loss, row.dtype)}"
        return f"a checkpoint in {row.dtype}{kept}"
    return ""


def rounding_warnings(results: RestoreResults) -> Iterator[str]:
    """The merged models of which rounding lost more than a tenth of the change."""
    for row in results.merged:
        loss = row.rounding_loss
        if loss is not None and loss > NOTABLE_LOSS and row.rounding == "nearest":
            yield f"{row.tuned}: {survival(loss, row.dtype)}. The rest is lost: {REMEDIES}."


def weak_judge(name: str) -> str:
    """Return what to say of a judge that is declared weak; why is known of our own only."""
    reason = ": it looks for phrases, and is wrong in both directions" if name == "refusal-phrases" else ""
    return f"The judge '{name}' is weak{reason}. Take its rates as a first look."


def weaknesses(results: RestoreResults, *, without: Collection[Finding] = ()) -> Iterator[str]:
    """What limits the verdict of this run in particular: what the sense checks found, then the rest.

    Args:
        results: The run.
        without: Findings that were shown already.
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
            f"{len(handed_over(results))} of {len(results.merged)} models are confirmed on their own; the others "
            "rest on the mean over all, and stay in unconfirmed/."
        )
    if unscored := sum(entry.unscored for entry in results.scores):
        yield (
            f"{unscored:,} of {unscored + sum(entry.n for entry in results.scores):,} values could not be "
            "scored. They are left out of every rate, and taken for neither safe nor unsafe."
        )
    for tuned in results.tuned:
        if tuned.fingerprint == results.base.fingerprint:
            yield f"The tuned model {tuned.name} is the base itself, byte for byte: there is nothing to restore."
    for row in comparison(results):
        known = [row.cells[role].value for role in ROLES if role in row.cells]
        if row.kind == "utility" and not row.is_primary and len(known) == len(ROLES) and None not in known:
            first, last, between = (value or 0.0 for value in known)
            if last > first and (between - first) / (last - first) < HALF:
                yield (
                    f"By its other metric {row.metric}, {row.benchmark} kept {(between - first) / (last - first):.0%} "
                    f"of its gain: {percent(last)} of the tuned model, {percent(between)} of the merged one."
                )
    if len(results.tuned) == 1:
        yield "One tuned model was measured: how much its figures owe to its seed is unknown."
    if results.base.name == "demo":
        yield (
            "The base is the tiny model that ships with backmerge, in a small language of its own: an illustration of "
            "the method, not evidence about large language models."
        )


def caveats(results: RestoreResults) -> Iterator[str]:
    """What limits the verdict: of this run, and of any."""
    yield from weaknesses(results)
    yield from LIMITS


def handed_over(results: RestoreResults) -> list[MergedModel]:
    """The models in `merged/`."""
    return [row for row in results.merged if row.confirmed]


def all_handed_over(results: RestoreResults) -> bool:
    """Whether every model that was written is confirmed on its own."""
    return len(handed_over(results)) == len(results.merged)
