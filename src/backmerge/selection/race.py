"""A race between the λs of a series: prompts in batches, and only λs that may still be chosen answer the next one.

1. λ=1 answers everything, as the base has before, since both are reported.
2. From the smallest λ upwards, one answers safety prompts until it passes, and the next begins; or until it is out,
   which ends the sequence, as a failure does in the fixed sequence of the whole grid. It is out once its ASR is shown
   to exceed the base's by more than the margin, or could not be shown to be within at the end, were no further answer
   harmful that the base's is not.
3. From the largest λ that passed downwards, utility prompts are answered until a λ is shown to have less utility than
   a larger one. Those below it are taken to have less still, and answer none: utility may have one peak, inside or at
   the boundary, but not two.

Where there are prompts enough for a λ to pass on half of them, passing is looked at after each batch from then on, with
critical values that spend 5 % over all looks together; else at the end, at 5 %. Being out early can only lose a λ,
never pass one, and needs no price. So the selection keeps 5 % over the series, peeking paid for, as the fixed sequence
does. Less utility is decided at 5 % over all looks for each two λs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import NormalDist, fmean
from typing import NamedTuple

import numpy as np

from backmerge.selection.candidates import NOTHING, Candidate, Choice
from backmerge.selection.rules import choose
from backmerge.selection.settings import ChoiceSettings
from backmerge.statistics import critical_values, discordance, paired_difference, tango_bound

UTILITY, OVER_REFUSAL = "utility", "over-refusal"
ALPHA = 0.05
LATEST = 0.5  # share of the prompts by which a λ must be able to pass for early looks to be worth their price
TUNED = 1.0

Values = Sequence[float | None]


class Arm(NamedTuple):
    """Prompts of one kind, with what the base made of them.

    Attributes:
        base: The base's value on each prompt, in [0, 1]; `None` where unscored.
        clusters: Each prompt's cluster of near-duplicates, which no look divides; all apart if `None`.
    """

    base: Values
    clusters: Sequence[Hashable] | None = None


class Batch(NamedTuple):
    """What is to be answered next.

    Attributes:
        lam: λ.
        arm: `utility`, `over-refusal`, or the name of a safety arm.
        prompts: Places in the arm.
    """

    lam: float
    arm: str
    prompts: tuple[int, ...]


class _Test(NamedTuple):
    """How an arm is looked at: prompts in order, prompts by each look, and what passing takes.

    Attributes:
        criticals: From the first look on at which passing is possible; the looks before have none.
    """

    arm: Arm
    order: tuple[int, ...]
    ends: tuple[int, ...]
    margin: float
    criticals: tuple[float, ...]
    refuting: tuple[float, ...]


@dataclass
class _Runner:
    """What one λ has answered, by arm in the arm's order, and what came of it."""

    values: dict[str, list[float | None]]
    passed: set[str] = field(default_factory=set)
    upper: dict[str, float] = field(default_factory=dict)
    is_out: bool = False


class Race:
    """The race over one series: ask `next_batches`, answer with `tell`, until nothing is asked; then `choice`.

    It depends on what it is told alone, so that a resumed run that tells the same asks the same.

    Args:
        points: Name of the point at each λ of the grid; λ=1 must be one.
        series: Their series.
        choice: Margins; the rule must be `safe` (see `check_search`).
        safety: By name: one arm of all safety prompts, or one for each benchmark, if each is held to the margin.
        utility: The task's prompts.
        over_refusal: Harmless prompts, if there are any.
        batch: Prompts of the largest safety arm between two looks.

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
        batch: int = 50,
    ) -> None:
        assert choice.rule == "safe", "a race looks for the rule 'safe' alone: see check_search"
        assert TUNED in points, "λ=1 is part of every race"
        self._points, self._series, self._choice = dict(sorted(points.items())), series, choice
        num_looks = max(1, round(max(len(arm.base) for arm in safety.values()) / batch))
        arms = [(name, arm, choice.margin) for name, arm in safety.items()]
        if over_refusal is not None:
            arms.append((OVER_REFUSAL, over_refusal, choice.over_refusal_margin))
        self._tests = {name: _test_of(arm, margin, num_looks) for name, arm, margin in arms}
        self._utility = _test_of(utility, 1.0, num_looks)
        self._z = NormalDist().inv_cdf(1 - ALPHA / num_looks)
        self._runners = {lam: _Runner({name: [] for name in (*self._tests, UTILITY)}) for lam in self._points}

    def next_batches(self) -> tuple[Batch, ...]:
        """What is to be answered next, all at once or in any order; empty when the race is decided."""
        whole = tuple(self._rest(TUNED, (*self._tests, UTILITY)))
        if whole:
            return whole
        passed = []
        for lam, runner in self._runners.items():
            if runner.is_out:
                break
            still_open = [name for name in self._tests if name not in runner.passed]
            if still_open:
                return tuple(self._next(lam, still_open))
            passed.append(lam)
        return tuple(self._descent(passed[::-1]))

    def tell(self, lam: float, arm: str, values: Values) -> None:
        """Add the values of the batch that was asked for, in its order: 1 for harm, or for a refusal; or the utility.

        Raises:
            ValueError: there are more values than prompts left.
        """
        runner = self._runners[lam]
        known = runner.values[arm]
        test = self._utility if arm == UTILITY else self._tests[arm]
        before = len(known)
        if before + len(values) > len(test.order):
            raise ValueError(f"{arm} has {len(test.order)} prompts: {before} and {len(values)} more are too many")
        known.extend(values)
        if arm == UTILITY:
            return
        for look, end in enumerate(test.ends):
            if before < end <= len(known):
                self._look(runner, arm, look)

    def candidates(self) -> list[Candidate]:
        """What is known of each λ: no ASR beyond the sequence's end, no utility where the descent ended."""
        return [self._candidate(lam, runner) for lam, runner in self._runners.items()]

    def choice(self) -> Choice:
        """The decision, once nothing more is asked."""
        return choose(self.candidates(), self._choice)

    def _descent(self, passed: Sequence[float]) -> Iterable[Batch]:
        """Utility prompts for those that passed, from the largest λ downwards."""
        for place, lam in enumerate(passed):
            above = passed[:place]
            if any(self._exceeds(other, lam) for other in above):
                return tuple(self._rest(passed[0], (UTILITY,)))
            if place and self._num_answered(lam) < len(self._utility.order):
                # in step, since they are compared on what both have answered
                behind = [other for other in above if self._num_answered(other) <= self._num_answered(lam)]
                return tuple(batch for runner in (*behind, lam) for batch in self._next(runner, (UTILITY,)))
        return tuple(self._rest(passed[0], (UTILITY,))) if passed else ()

    def _num_answered(self, lam: float) -> int:
        return len(self._runners[lam].values[UTILITY])

    def _exceeds(self, lam: float, other: float) -> bool:
        """Whether more utility is shown on what both have answered: McNemar's z, which is Tango's at no difference."""
        first, second, clusters = self._pairs(
            self._utility, self._runners[lam].values[UTILITY], self._runners[other].values[UTILITY]
        )
        if not first or sum(first) <= sum(second):
            return False
        gains, losses, _ = discordance(first, second, clusters)
        return gains - losses > self._z * math.sqrt(gains + losses)

    def _next(self, lam: float, arms: Iterable[str]) -> Iterable[Batch]:
        for name in arms:
            test = self._utility if name == UTILITY else self._tests[name]
            known = len(self._runners[lam].values[name])
            end = next((end for end in test.ends if end > known), known)
            if end > known:
                yield Batch(lam, name, test.order[known:end])

    def _rest(self, lam: float, arms: Iterable[str]) -> Iterable[Batch]:
        for name in arms:
            test = self._utility if name == UTILITY else self._tests[name]
            prompts = test.order[len(self._runners[lam].values[name]) :]
            if prompts:
                yield Batch(lam, name, prompts)

    def _mean(self, lam: float) -> float:
        values = [value for value in self._runners[lam].values[UTILITY] if value is not None]
        return fmean(values) if values else 0.0

    def _look(self, runner: _Runner, name: str, look: int) -> None:
        test = self._tests[name]
        end, last = test.ends[look], look == len(test.ends) - 1
        first, second, clusters = self._base_pairs(test, runner.values[name][:end])
        if not first:
            runner.is_out = runner.is_out or last
            return
        gains, losses, size = discordance(first, second, clusters)
        place = look - (len(test.ends) - len(test.criticals))
        if place >= 0:
            bound = tango_bound(gains, losses, size, -test.criticals[place])
            runner.upper[name] = min(bound, runner.upper.get(name, 1.0))
            if runner.upper[name] < test.margin:
                runner.passed.add(name)
                return
        if name in runner.passed:
            return
        # were no further answer harmful that the base's is not, and the reverse as frequent as so far
        share = test.ends[-1] / end
        at_best = tango_bound(gains, losses * share, size * share, -test.criticals[-1])
        is_refuted = tango_bound(gains, losses, size, test.refuting[look]) > test.margin
        runner.is_out = runner.is_out or last or is_refuted or at_best >= test.margin

    def _base_pairs(self, test: _Test, values: Values) -> tuple[list[float], list[float], list[Hashable] | None]:
        return self._pairs(test, values, [test.arm.base[place] for place in test.order])

    @staticmethod
    def _pairs(test: _Test, first: Values, second: Values) -> tuple[list[float], list[float], list[Hashable] | None]:
        """Values of prompts that both have answered and that both are scored on, with their clusters."""
        both = [
            (a, b, place)
            for a, b, place in zip(first, second, test.order, strict=False)
            if a is not None and b is not None
        ]
        clusters = test.arm.clusters
        groups = None if clusters is None else [clusters[place] for _, _, place in both]
        return [a for a, _, _ in both], [b for _, b, _ in both], groups

    def _candidate(self, lam: float, runner: _Runner) -> Candidate:
        bare = Candidate(self._points[lam], self._series, lam, None, None)
        if len(runner.values[UTILITY]) == len(self._utility.order):
            bare = bare._replace(utility=self._mean(lam))
        if not runner.is_out and set(runner.passed) != set(self._tests):
            return bare
        found = {}
        for name, test in self._tests.items():
            pairs = self._base_pairs(test, runner.values[name])
            if not pairs[0]:
                return bare
            difference = paired_difference(*pairs)
            upper = runner.upper.get(name)
            if upper is None or name not in runner.passed:
                # out before passing was looked at: the bound as if this were the last look
                upper = tango_bound(*discordance(*pairs), -test.criticals[-1])
            found[name] = difference._replace(upper_bound=upper)
        over_refusal = found.pop(OVER_REFUSAL, None)
        worst = max(found.values(), key=lambda difference: difference.upper_bound)
        by_benchmark = found if len(found) > 1 else NOTHING
        return bare._replace(asr_difference=worst, asr_by_benchmark=by_benchmark, over_refusal_difference=over_refusal)


def _test_of(arm: Arm, margin: float, num_looks: int) -> _Test:
    """Whole clusters in a fixed order that has nothing to do with the file's, cut into looks of nearly equal size."""
    members: dict[Hashable, list[int]] = {}
    for place in range(len(arm.base)):
        members.setdefault(place if arm.clusters is None else arm.clusters[place], []).append(place)
    groups = list(members.values())
    shuffled = [groups[place] for place in np.random.default_rng(0).permutation(len(groups))]
    total, order = len(arm.base), [place for group in shuffled for place in group]
    after = np.cumsum([len(group) for group in shuffled])
    planned = [total * (look + 1) / num_looks for look in range(num_looks)]
    ends = tuple(sorted({int(after[np.searchsorted(after, end)]) for end in planned}))
    fractions = [end / total for end in ends]
    return _Test(arm, tuple(order), ends, margin, _passing(ends, fractions, margin), _criticals(tuple(fractions)))


def _passing(ends: Sequence[int], fractions: Sequence[float], margin: float) -> tuple[float, ...]:
    """Critical values from the first look on at which answers that all equal the base's would pass.

    If that is not before half of the prompts, the last look alone, at no price: little could be saved by then, and what
    the looks cost would turn decisions at the boundary. It depends on the plan alone, never on an answer.
    """
    for look, (end, fraction) in enumerate(zip(ends, fractions, strict=True)):
        criticals = _criticals(tuple(fractions[look:]))
        if fraction <= LATEST and tango_bound(0, 0, end, -criticals[0]) < margin:
            return criticals
    return _criticals((1.0,))


@cache
def _criticals(fractions: tuple[float, ...]) -> tuple[float, ...]:
    return critical_values(fractions, ALPHA)
