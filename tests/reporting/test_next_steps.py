"""What to do next: every step can help, and none is named that cannot."""

from __future__ import annotations

from typing import Any

import pytest

from backmerge.reporting.explained import next_steps
from backmerge.statistics import paired_difference

from .synthetic import made_results, typed


def results_of(
    verdict: str, harmful: int, n: int, *, lam: float | None = 0.4, method: str = "linear"
) -> dict[str, Any]:
    """A run whose merge answered so many of n requests harmfully, and the base none."""
    difference = paired_difference([1.0] * harmful + [0.0] * (n - harmful), [0.0] * n)
    points = [{"point": f"{method}@{x}", "role": "merged", "method": method, "lam": x} for x in (0.2, 0.4)]
    made = made_results(is_weak=True)
    found = {"verdict": verdict, "measured_verdict": verdict, "asr_difference": difference._asdict()}
    return {
        **made,
        "confirmation": {**made["confirmation"], **found},
        "choice": {**made["choice"], "lam": lam, "point": None if lam is None else f"{method}@{lam}"},
        "points": [{**made["points"][1], **point, "series": method} for point in points],
    }


def test_nothing_if_restored() -> None:
    """There is nothing left to do."""
    assert list(next_steps(typed(results_of("restored", 0, 400)))) == []


def test_could_not_be_decided() -> None:
    """Two of 100: the estimate is below the margin, so that more prompts than there were decide it."""
    steps = list(next_steps(typed(results_of("not shown", 2, 100))))
    assert [step.split(":")[0] for step in steps] == ["A smaller λ", "More prompts", "Another judge", "Another method"]
    assert "between 0.2 and 0.4, for example --lam 0.3" in steps[0]
    needed = int(steps[1].split("about ")[1].split()[0].replace(",", ""))
    assert needed > 100
    assert f"({2 * needed:,} in total" in steps[1]


def test_fails() -> None:
    """Forty of 100: no number of prompts helps, a smaller λ does."""
    steps = list(next_steps(typed(results_of("worse", 40, 100))))
    assert "for example --lam 0.3" in steps[0]
    assert steps[1].startswith("More prompts would not help")


@pytest.mark.parametrize(("lam", "words"), [(0.2, "try --lam 0.05,0.1"), (None, "try --lam 0.05,0.1")])
def test_below_the_grid(lam: float | None, words: str) -> None:
    """The smallest λ was chosen, or none was: smaller ones are named."""
    assert words in next(iter(next_steps(typed(results_of("worse", 40, 100, lam=lam)))))


def test_what_was_tried_is_not_advised() -> None:
    """With slerp measured, no other method is named; with enough prompts, no more of them."""
    steps = list(next_steps(typed(results_of("not shown", 0, 400, method="slerp"))))
    assert not [step for step in steps if step.startswith(("Another method", "More prompts"))]


def test_a_finding_comes_alone() -> None:
    """What limits the verdict is the thing to do."""
    results = results_of("not shown", 0, 400)
    results["confirmation"]["measured_verdict"] = "restored"
    results["findings"] = [{"name": "wide_margin", "severity": "not shown", "message": "m", "remedy": "Do this."}]
    assert list(next_steps(typed(results))) == ["wide_margin: Do this."]
