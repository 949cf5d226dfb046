"""Measure what tuning did to a tensor or to all of them, and whether two models are a parent and its child."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from backmerge.checkpoints.reader import Weights

# two models trained separately have a cosine near 0 and, at equal norms, a relative norm of √2; fine-tuning keeps
# cosines above 0.99 and relative norms at a few percent. The limits lie between, so that long further training is not
# flagged
USUAL_COSINE = 0.99
LEAST_COSINE = 0.9
MOST_RELATIVE_NORM = 0.5
LEAST_COVERED = 0.5


@dataclass(frozen=True)
class Change:
    """The effect of tuning on one tensor, or on several taken as one vector.

    Sums are over all elements; from a sample they are estimates. Tensors that an adapter does not touch are not read:
    they count as elements and add nothing to the sums.

    Attributes:
        elements: Number of elements.
        unchanged: Share of elements with the same bits as the base's, in [0, 1].
        base_square: Σ base².
        tuned_square: Σ tuned².
        delta_square: Σ (tuned - base)².
        product: Σ base·tuned.
        slerp_square: ‖SLERP - Linear‖² at λ = 0.5, of each tensor separately.
        lost_squares: ‖round(merged) - merged‖² of Linear, by λ.
        effective_rank: (Σσ²)² / Σσ⁴ of the singular values of a matrix' delta: r if there are r equal ones. None if the
            tensor is no matrix or did not change, and from a sample.
        rank_error: One standard error of the effective rank; 0 if it is exact.
    """

    elements: int
    unchanged: float = 1.0
    base_square: float = 0.0
    tuned_square: float = 0.0
    delta_square: float = 0.0
    product: float = 0.0
    slerp_square: float = 0.0
    lost_squares: Mapping[float, float] | None = None
    effective_rank: float | None = None
    rank_error: float | None = None

    @property
    def is_unchanged(self) -> bool:
        """Return whether every element that was checked has the base's bits."""
        return self.unchanged == 1

    @property
    def is_finite(self) -> bool:
        """Return whether neither side holds NaN or infinity."""
        return math.isfinite(self.base_square + self.tuned_square)

    @property
    def relative_norm(self) -> float:
        """‖tuned - base‖ / ‖base‖; infinite if the base is zero and the tuned model is not."""
        return _ratio(self.delta_square, self.base_square)

    @property
    def cosine(self) -> float | None:
        """Cosine of base and tuned as vectors, in [-1, 1]; None if one of them is zero."""
        if self.is_unchanged:
            return 1.0
        lengths = math.sqrt(self.base_square) * math.sqrt(self.tuned_square)
        return max(-1.0, min(1.0, self.product / lengths)) if lengths > 0 else None

    @property
    def slerp_gap(self) -> float:
        """‖SLERP - Linear‖ / ‖tuned - base‖ at λ = 0.5."""
        return _ratio(self.slerp_square, self.delta_square)

    @property
    def rounding_costs(self) -> dict[float, float | None]:
        """‖round(merged) - merged‖ / ‖λ·(tuned - base)‖ by λ; None if nothing changes.

        0 if all of the change is kept, 1 if the error is as large as the change.
        """
        costs: dict[float, float | None] = {}
        for lam, lost in (self.lost_squares or {}).items():
            meant = lam * lam * self.delta_square
            costs[lam] = math.sqrt(lost / meant) if meant > 0 else None
        return costs


class Relation(NamedTuple):
    """How two models are related, by a survey of their weights.

    Attributes:
        verdict: `same`: bit for bit; `child`: as far apart as fine-tuning puts them; `doubtful`: farther.
        reasons: Sentences; the first explains the verdict.
    """

    verdict: Literal["same", "child", "doubtful"]
    reasons: tuple[str, ...]


def covered_share(base: Weights, tuned: Weights, measured: Iterable[str]) -> float:
    """Return the number of measured elements of the base as a share of the larger model's."""
    total = max(sum(info.num_elements for info in side.infos.values()) for side in (base, tuned))
    return sum(base.infos[name].num_elements for name in measured) / total if total else 1.0


def combined(changes: Iterable[Change]) -> Change:
    """Return several tensors as one vector, without those that are not finite; ranks do not add up and are not set."""
    finite = [change for change in changes if change.is_finite]
    total = sum(change.elements for change in finite)
    lams = dict.fromkeys(lam for change in finite for lam in change.lost_squares or ())
    return Change(
        elements=total,
        unchanged=sum(change.unchanged * change.elements for change in finite) / total if total else 1.0,
        base_square=math.fsum(change.base_square for change in finite),
        tuned_square=math.fsum(change.tuned_square for change in finite),
        delta_square=math.fsum(change.delta_square for change in finite),
        product=math.fsum(change.product for change in finite),
        slerp_square=math.fsum(change.slerp_square for change in finite),
        lost_squares={lam: math.fsum((change.lost_squares or {}).get(lam, 0.0) for change in finite) for lam in lams},
    )


def relation(changes: Mapping[str, Change], *, covered: float = 1.0) -> Relation:
    """Return whether the tuned model is a child of this base, judged by the weights alone.

    The verdict is `doubtful` below a cosine of 0.9 or above a relative norm of 0.5, over all elements that were read.
    Two models that were trained separately have a cosine near 0 and a relative norm near √2, even with the same shape
    and data; fine-tuned ones stay above 0.99.

    Args:
        changes: The survey's result, by tensor.
        covered: The result of `covered_share` for the two.
    """
    whole = combined(changes.values())
    broken = sorted(name for name, change in changes.items() if not change.is_finite)
    notes = [f"{_named(broken)}: NaN or infinity; not counted"] if broken else []
    if covered < 1:
        notes.append(f"only {100 * covered:.3g} % of the elements have a counterpart of the same shape")
    if covered < LEAST_COVERED or whole.elements == 0:
        return Relation("doubtful", ("the two have too few tensors in common: not parent and child", *notes))
    if whole.is_unchanged:
        is_same = covered == 1 and not broken
        what = "every element equals the base's" if is_same else "all elements that could be compared equal the base's"
        return Relation("same" if is_same else "child", (what, *notes))
    cosine, norm = whole.cosine or 0.0, whole.relative_norm
    numbers = f"cosine {cosine:.5f}, relative norm {100 * norm:.3g} %"
    if cosine < LEAST_COSINE or norm > MOST_RELATIVE_NORM:
        limit = (
            f"models trained separately have a cosine near 0, fine-tuned ones above 0.99 (limit {LEAST_COSINE})"
            if cosine < LEAST_COSINE
            else f"fine-tuning changes weights by a few percent of their norm (limit {100 * MOST_RELATIVE_NORM:.0f} %)"
        )
        return Relation("doubtful", (f"{numbers}: not parent and child", limit, *notes))
    strange = sorted(
        name
        for name, change in changes.items()
        if change.is_finite and change.cosine is not None and change.cosine < LEAST_COSINE
    )
    if strange:
        notes.append(f"{_named(strange)}: a cosine below {LEAST_COSINE}, as if trained from scratch")
    usual = cosine >= USUAL_COSINE
    kind = "a usual distance for fine-tuning" if usual else "far for fine-tuning, but within its limits"
    return Relation("child", (f"{numbers}: {kind}", *notes))


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"'{name}'" for name in names[:3]) + more


def _ratio(square: float, of: float) -> float:
    if of > 0:
        return math.sqrt(square / of)
    return math.inf if square > 0 else 0.0 if square == 0 else math.nan
