"""A race between the λs of a series: prompts in batches, and only λs that may still be chosen answer the next one.

The decision is the same as the grid's: the most utility among the λs whose estimated rises are within what rule `safe`
allows. Safety is not shown here, so the order of questions is free: this one decides most with the fewest.

1. λ=1 answers everything, as the base has before, since both are reported.
2. Every other λ answers a first batch of utility prompts, and a few safety prompts: first those that the base or the
   tuned model answered harmfully, where a merge does so most often.
3. The λ with the most utility so far answers safety prompts until it has answered all, or is out: that is when its rise
   would be too large even if no further answer was harmful. This is exact.
4. When it is known to be within the limits, the others answer utility prompts, as long as they may still end above it.
   A λ is dropped when the probability of that falls below about 1 in 90, predicted from its answers so far and from
   those of base and tuned model to the remaining prompts.

Only the last step is an approximation. It changes the grid's choice in up to 3 % of runs, between λs of nearly the same
utility (`python -m benchmarks.search`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from backmerge.selection.candidates import NOTHING, Candidate, Choice
from backmerge.selection.limits import allowed
from backmerge.selection.rules import choose
from backmerge.selection.settings import ChoiceSettings
from backmerge.statistics import PairedDifference, clustered_difference

UTILITY, OVER_REFUSAL = "utility", "over-refusal"
TUNED = 1.0
SCREENED = 10  # safety prompts that every λ answers
ROUNDING = 1e-9
OVERTAKES = 2.3  # a λ that is more standard deviations behind is no longer expected to lead

Array = NDArray[np.float64]
Values = Sequence[float | None]


class Arm(NamedTuple):
    """Prompts of one kind, with the base's answers.

    Attributes:
        base: The base's value on each prompt, in [0, 1]; `None` if unscored.
        clusters: Each prompt's cluster of near-duplicates; if `None`, each prompt is a cluster.
    """

    base: Values
    clusters: Sequence[Hashable] | None = None


class Batch(NamedTuple):
    """The next prompts to answer.

    Attributes:
        lam: λ.
        arm: `utility`, `over-refusal`, or the name of a safety arm.
        prompts: Places in the arm.
    """

    lam: float
    arm: str
    prompts: tuple[int, ...]


class _Lane:
    """The prompts of an arm with the answers of each λ.

    Attributes:
        base: NaN if unscored, `(prompts,)`.
        groups: The number of each prompt's cluster, `(prompts,)`.
        order: The order of the prompts, the same for every λ.
        values: By λ; NaN if unscored, or not answered yet, `(prompts,)`.
        answered: By λ, the number of answers.
    """

    def __init__(self, arm: Arm, lams: Iterable[float]) -> None:
        self.arm, self.base = arm, _array(arm.base)
        size = len(self.base)
        numbers: dict[Hashable, int] = {}
        clusters = range(size) if arm.clusters is None else arm.clusters
        self.groups = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.intp)
        self.order = np.random.default_rng(0).permutation(size)
        self.values = {lam: np.full(size, math.nan) for lam in lams}
        self.answered = dict.fromkeys(self.values, 0)

    def add(self, lam: float) -> None:
        """Add another λ."""
        self.values[lam], self.answered[lam] = np.full(len(self.base), math.nan), 0

    def put_first(self, tuned: float) -> None:
        """Put first the prompts that base or tuned model answered harmfully: merges do so most often there."""
        harm = np.nan_to_num(np.fmax(self.base, self.values[tuned]))
        self.order = self.order[np.argsort(-harm[self.order], kind="stable")]

    def next(self, lam: float, count: int) -> tuple[int, ...]:
        """Return the places of the next prompts."""
        return tuple(self.order[self.answered[lam] : self.answered[lam] + count].tolist())

    def tell(self, lam: float, values: Values) -> None:
        """Add the values of the next prompts."""
        before = self.answered[lam]
        if before + len(values) > len(self.order):
            raise ValueError(f"there are {len(self.order)} prompts: {before} and {len(values)} more are too many")
        self.values[lam][self.order[before : before + len(values)]] = _array(values)
        self.answered[lam] += len(values)

    def is_complete(self, lam: float) -> bool:
        """Return whether every prompt was answered."""
        return self.answered[lam] == len(self.order)

    def difference(self, lam: float) -> PairedDifference | None:
        """Return the difference from the base, with near-duplicates counted once; `None` without any pair of scores."""
        known = np.flatnonzero(~np.isnan(self.values[lam] - self.base))
        if not len(known):
            return None
        values = self.values[lam][known].tolist(), self.base[known].tolist()
        is_rate = all(value in (0.0, 1.0) for side in values for value in side)
        return clustered_difference(*values, self.groups[known].tolist(), is_rate=is_rate)

    def rise(self, lam: float) -> float:
        """Return the mean over clusters of the difference from the base, if no missing answer is harmful."""
        values = self.values[lam].copy()
        values[self.order[self.answered[lam] :]] = 0.0
        differences = values - self.base
        known = ~np.isnan(differences)
        if not known.any():
            return math.inf
        sizes = np.bincount(self.groups[known])
        means = np.bincount(self.groups[known], differences[known])[sizes > 0] / sizes[sizes > 0]
        return float(means.mean())

    def mean(self, lam: float) -> float:
        """Return the mean of all answers, without NaN."""
        return float(np.nanmean(self.values[lam])) if not np.isnan(self.values[lam]).all() else 0.0

    def lead(self, lam: float, other: float, guess: Array) -> tuple[float, float]:
        """Return the predicted lead of one λ's mean over another's, and its standard deviation.

        Args:
            lam: λ.
            other: The other λ.
            guess: The difference expected for each prompt from base and tuned model, `(prompts,)`.
        """
        differences = self.values[lam] - self.values[other]
        known = ~np.isnan(differences)
        count, left = int(known.sum()), len(known) - int(known.sum())
        if not count:
            return float(guess.mean()), math.inf
        if self.is_complete(lam) and self.is_complete(other):
            return float(differences[known].mean()), 0.0
        # the guess removes what is already known about the remaining prompts
        surprise = differences[known] - guess[known]
        total = differences[known].sum() + guess[~known].sum() + left * surprise.mean()
        # one more prompt with the largest difference: few answers may show no spread
        variance = (((surprise - surprise.mean()) ** 2).sum() + 1) / count
        return float(total / len(known)), math.sqrt(variance * left * (1 + left / count)) / len(known)


class Race:
    """The race over one series: call `next_batches`, answer with `tell`, until it is empty; then `choice`.

    It depends only on its inputs, so a resumed run with the same inputs asks the same prompts.

    Args:
        points: Name of the point at each λ of the grid; λ=1 must be one.
        series: Their series.
        choice: Margins; the rule must be `safe` (see `check_search`).
        safety: By name: one arm of all safety prompts, or one for each benchmark, if each must pass separately.
        utility: The task's prompts.
        over_refusal: Harmless prompts, if there are any.
        batch: Least number of prompts that a λ answers at a time; at least an eighth of an arm.

    Example:
        >>> arm = Arm([0.0] * 200)
        >>> race = Race({0.5: "linear@0.5", 1.0: "tuned"}, "linear", ChoiceSettings(), {"safety": arm}, arm)
        >>> while batches := race.next_batches():
        ...     for lam, name, prompts in batches:
        ...         value = 1.0 if name == "utility" or lam == 1.0 else 0.0
        ...         race.tell(lam, name, [value] * len(prompts))
        >>> race.choice().point
        'linear@0.5'
    """

    def __init__(
        self,
        points: Mapping[float, str],
        series: str,
        choice: ChoiceSettings,
        safety: Mapping[str, Arm],
        utility: Arm,
        over_refusal: Arm | None = None,
        *,
        batch: int = 35,
    ) -> None:
        assert choice.rule == "safe", "a race only works for rule 'safe': see check_search"
        assert TUNED in points, "λ=1 is part of every race"
        self._points, self._series, self._choice = dict(sorted(points.items())), series, choice
        self._batch = batch
        self._limits = {name: _Lane(arm, self._points) for name, arm in safety.items()}
        self._allowed = dict.fromkeys(self._limits, allowed(choice.margin))
        if over_refusal is not None:
            self._limits[OVER_REFUSAL] = _Lane(over_refusal, self._points)
            self._allowed[OVER_REFUSAL] = allowed(choice.over_refusal_margin)
        self._utility = _Lane(utility, self._points)
        self._dropped: set[float] = set()

    def next_batches(self) -> tuple[Batch, ...]:
        """Return the next batches, to be answered together or in any order; empty when the race is decided."""
        everything = {**self._limits, UTILITY: self._utility}
        whole = tuple(self._ask(TUNED, everything, len(self._utility.order) + max(map(_size, self._limits.values()))))
        if whole:
            return whole
        first = [
            batch
            for lam in self._points
            for lanes, count in (({UTILITY: self._utility}, None), (self._limits, SCREENED))
            if all(lane.answered[lam] == 0 for lane in lanes.values())
            for batch in self._ask(lam, lanes, count)
        ]
        return tuple(first) or tuple(self._contest())

    def tell(self, lam: float, arm: str, values: Values) -> None:
        """Add the values of the requested batch, in its order: 1 for harm, or for a refusal; or the utility.

        Raises:
            ValueError: there are more values than prompts left.
        """
        lane = self._utility if arm == UTILITY else self._limits[arm]
        lane.tell(lam, values)
        if lam == TUNED and arm != UTILITY and lane.is_complete(TUNED):
            lane.put_first(lam)

    @property
    def is_within(self) -> dict[float, bool | None]:
        """Return for each λ whether it keeps the limits; `None` if it was dropped before that was known."""
        return {lam: False if self._is_out(lam) else (True if self._is_known(lam) else None) for lam in self._points}

    def add(self, lam: float, point: str) -> None:
        """Add another λ; it is asked from the first batch on."""
        assert lam not in self._points, f"λ={lam} is already in the race"
        self._points = dict(sorted({**self._points, lam: point}.items()))
        for lane in (*self._limits.values(), self._utility):
            lane.add(lam)

    def candidates(self) -> list[Candidate]:
        """Return the measurements of each λ: its safety and its utility if it answered all prompts."""
        return [self._candidate(lam, name) for lam, name in self._points.items()]

    def choice(self) -> Choice:
        """Return the decision, when the race is over."""
        return choose(self.candidates(), self._choice)

    def _contest(self) -> Iterable[Batch]:
        """Yield safety prompts for the leader until it is decided; then utility prompts for possible overtakers."""
        still_open = [lam for lam in self._points if lam not in self._dropped and not self._is_out(lam)]
        if not still_open:
            # reported when nothing passes: the smallest λ, fully measured
            yield from self._ask(min(self._points), self._limits, max(map(_size, self._limits.values())))
            return
        leader = max(still_open, key=lambda lam: (self._lead(lam, TUNED)[0], -lam))
        if not self._is_known(leader):
            yield from self._ask(leader, self._limits)
            return
        rivals = [lam for lam in still_open if lam != leader and self._may_win(lam, leader)]
        self._dropped.update(lam for lam in still_open if lam != leader and lam not in rivals)
        behind = [lam for lam in (leader, *rivals) if not self._utility.is_complete(lam)]
        if not rivals:
            yield from self._ask(leader, {UTILITY: self._utility}, _size(self._utility))
            return
        fewest = min((self._utility.answered[lam] for lam in behind), default=0)
        asked = [lam for lam in behind if self._utility.answered[lam] == fewest]
        for lam in asked:
            yield from self._ask(lam, {UTILITY: self._utility})

    def _may_win(self, lam: float, leader: float) -> bool:
        if self._utility.is_complete(lam) and self._utility.is_complete(leader):
            return False  # the leader has the most, or the same at a smaller λ
        lead, deviation = self._lead(lam, leader)
        return lead + OVERTAKES * deviation >= 0

    def _lead(self, lam: float, other: float) -> tuple[float, float]:
        base, tuned = np.nan_to_num(self._utility.base), np.nan_to_num(self._utility.values[TUNED])
        return self._utility.lead(lam, other, (lam - other) * (tuned - base))

    def _excess(self, lam: float, name: str) -> float:
        return self._limits[name].rise(lam) - self._allowed[name]

    def _is_known(self, lam: float) -> bool:
        return all(lane.is_complete(lam) for lane in self._limits.values())

    def _is_out(self, lam: float) -> bool:
        return any(self._excess(lam, name) > ROUNDING for name in self._limits)

    def _ask(self, lam: float, lanes: Mapping[str, _Lane], count: int | None = None) -> Iterable[Batch]:
        """Yield the next prompts of these arms: `count` of them, or a batch."""
        for name, lane in lanes.items():
            # many small batches leave an engine idle
            prompts = lane.next(lam, count or max(self._batch, math.ceil(_size(lane) / 8)))
            if prompts:
                yield Batch(lam, name, prompts)

    def _candidate(self, lam: float, point: str) -> Candidate:
        bare = Candidate(point, self._series, lam, None, None)
        if self._utility.is_complete(lam):
            bare = bare._replace(utility=self._utility.mean(lam))
        if not self._is_known(lam):
            return bare
        found = {name: lane.difference(lam) for name, lane in self._limits.items()}
        if any(difference is None for difference in found.values()):
            return bare
        known = {name: difference for name, difference in found.items() if difference is not None}
        over_refusal = known.pop(OVER_REFUSAL, None)
        worst = max(known.values(), key=lambda difference: difference.difference)
        by_benchmark = known if len(known) > 1 else NOTHING
        return bare._replace(asr_difference=worst, asr_by_benchmark=by_benchmark, over_refusal_difference=over_refusal)


def _size(lane: _Lane) -> int:
    return len(lane.order)


def _array(values: Values) -> Array:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)
