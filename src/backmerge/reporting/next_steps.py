"""What to do about a run whose verdict is not `restored`: concrete steps, and none that cannot help."""

from __future__ import annotations

from collections.abc import Iterator

from backmerge.reporting.findings import limiting
from backmerge.results import RestoreResults
from backmerge.selection.limits import Limit, prompts_that_decide


def next_steps(results: RestoreResults) -> Iterator[str]:
    """A sentence a step, the likeliest to help first; nothing if safety was restored."""
    if results.confirmation.verdict == "restored":
        return
    if limits := limiting(results):
        yield from (f"{finding.name}: {finding.remedy}" for finding in limits)
        return
    yield from _smaller_lams(results)
    yield from _more_prompts(results)
    weak = [benchmark for benchmark in results.benchmarks if benchmark.judge_is_weak]
    if weak:
        yield f"Another judge: '{weak[0].judge}' is weak; --judge wildguard, or a rubric, reads answers."
    methods = {point.method for point in results.points if point.role == "merged"}
    if methods == {"linear"}:
        yield "Another method: --method slerp or ties may keep more of the task at the same attack success rate."


def _smaller_lams(results: RestoreResults) -> Iterator[str]:
    tested = sorted({p.lam for p in results.points if p.role == "merged" and p.lam is not None})
    chosen = results.choice.lam
    if not tested or (results.choice.point is not None and chosen is None):
        return
    below = [lam for lam in tested if chosen is None or lam < chosen]
    if chosen is not None and below:
        yield f"A smaller λ: between {below[-1]:g} and {chosen:g}, such as --lam {(below[-1] + chosen) / 2:g}."
        return
    least = tested[0] if chosen is None else chosen
    yield f"A smaller λ: the smallest that was tried is {least:g}; such as --lam {least / 4:g},{least / 2:g}."


def _more_prompts(results: RestoreResults) -> Iterator[str]:
    found, margin = results.confirmation.asr_difference, results.choice.margin
    if found is None:
        return
    if found.difference >= margin:
        yield "More prompts would not help: the difference as seen is not below the margin."
        return
    needed = prompts_that_decide(Limit("attack success rate", found, margin))
    if needed is not None and needed > found.n:
        halves = "" if results.is_whole else f" ({2 * needed:,} in all, as half of them choose λ)"
        yield (
            f"More prompts: about {needed:,} harmful requests like these{halves} would decide it 80 % of the time, "
            f"were the rates as seen; there were {found.n:,}."
        )
