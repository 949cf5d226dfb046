"""Intervals and tests: against scipy, against exact enumeration, and by the coverage and level that they promise."""

import itertools
import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from backmerge.statistics import (
    effective_size,
    paired_difference,
    sign_flip_p,
    t_interval,
    tango_bound,
    wilson,
)

Z = {0.9: NormalDist().inv_cdf(0.95), 0.95: NormalDist().inv_cdf(0.975)}
RATES = st.lists(st.floats(0, 1), min_size=1, max_size=40)


@given(n=st.integers(1, 1000), share=st.floats(0, 1), confidence=st.sampled_from([0.9, 0.95, 0.99]))
def test_wilson_is_scipys(n: int, share: float, confidence: float) -> None:
    """For whole numbers it equals `binomtest(...).proportion_ci(method="wilson")`, but for float64's own rounding."""
    successes = round(share * n)
    ours = wilson(successes, n, confidence=confidence)
    theirs = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@given(n=st.one_of(st.just(0.0), st.floats(0.01, 500)), share=st.floats(0, 1))
def test_wilson_holds_its_rate(n: float, share: float) -> None:
    """The interval lies in [0, 1] and holds the rate, for any effective size; with none it says nothing."""
    low, high = wilson(share * n, n)
    assert 0 <= low <= high <= 1
    if n > 0:
        assert low - 1e-12 <= share * n / n <= high + 1e-12
    else:
        assert (low, high) == (0, 1)
    assert wilson(0, 10).low == 0
    assert wilson(10, 10).high == 1


@pytest.mark.parametrize("n", [100, 330, 520])
def test_wilson_interval_covers_its_nominal_share(n: int) -> None:
    """Exact coverage over rates from 1 to 50 %: 95 % on average within a point, and nowhere below 92 %."""
    ends = np.array([wilson(x, n) for x in range(n + 1)])
    rates = np.linspace(0.01, 0.5, 491)
    masses = stats.binom.pmf(np.arange(n + 1)[None, :], n, rates[:, None])
    covered = (ends[None, :, 0] <= rates[:, None]) & (rates[:, None] <= ends[None, :, 1])
    coverage = (masses * covered).sum(axis=1)
    assert 0.94 <= coverage.mean() <= 0.96
    assert coverage.min() >= 0.92
    # the guard sees a bad interval: Wald's, from the same data, falls far below
    rate = np.arange(n + 1) / n
    half = Z[0.95] * np.sqrt(rate * (1 - rate) / n)
    wald = (np.abs(rates[:, None] - rate[None, :]) <= half[None, :]) * masses
    assert wald.sum(axis=1).min() < 0.9


@given(values=st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_t_interval_is_scipys(values: list[float]) -> None:
    """Student's interval of scipy, cut to [0, 1]."""
    ours = t_interval(values)
    if stdev(values) < 1e-9:
        assert ours == pytest.approx((fmean(values), fmean(values)), abs=1e-7)
        return
    theirs = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert ours == pytest.approx(np.clip(theirs, 0, 1), abs=1e-9)


def test_one_value_has_no_spread() -> None:
    """An interval over one seed is refused rather than made up."""
    with pytest.raises(ValueError, match="two values"):
        t_interval([0.5])


def constrained_score(gains: float, losses: float, n: float, delta: float) -> float:
    """Tango's statistic from its definition: the multinomial likelihood at this Δ is maximised by search."""

    def log_likelihood(q: float) -> float:
        cells = ((gains, q + delta), (losses, q), (n - gains - losses, 1 - 2 * q - delta))
        return sum(count * math.log(max(share, 1e-300)) for count, share in cells if count > 0)

    low, high = max(0.0, -delta), (1 - delta) / 2
    found = optimize.minimize_scalar(
        lambda q: -log_likelihood(q), bounds=(low, high), method="bounded", options={"xatol": 1e-13}
    )
    # a search by sections does not try the very ends
    q = max((low, high, float(found.x)), key=log_likelihood)
    variance = n * (2 * q + delta - delta * delta)
    return (gains - losses - n * delta) / math.sqrt(variance)


@pytest.mark.parametrize(
    ("gains", "losses", "n"),
    [(0, 0, 100), (0, 0, 500), (1, 0, 44), (0, 1, 44), (12, 4, 60), (9, 9, 500), (15, 0, 500), (0, 30, 260)],
)
@pytest.mark.parametrize("z", [*Z.values(), *(-z for z in Z.values())])
def test_tango_inverts_the_score_test(gains: int, losses: int, n: int, z: float) -> None:
    """At the bound the statistic is z, with the nuisance rate found by search instead of Tango's closed form."""
    bound = tango_bound(gains, losses, n, z)
    # the search knows q within about 1e-8, and z moves by up to some hundreds with q
    assert constrained_score(gains, losses, n, bound) == pytest.approx(z, abs=2e-3)


@pytest.mark.parametrize("n", [44, 245, 500])
def test_tango_without_discordant_pairs(n: int) -> None:
    """With no pair discordant the bounds are ±z²/(n + z²), by hand: the statistic is −nΔ / sqrt(nΔ(1 − Δ))."""
    for z in Z.values():
        assert tango_bound(0, 0, n, -z) == pytest.approx(z * z / (n + z * z), abs=1e-9)
        assert tango_bound(0, 0, n, z) == pytest.approx(-z * z / (n + z * z), abs=1e-9)


def test_tango_at_the_ends() -> None:
    """All pairs discordant one way: the far bound is the end itself, the near one (n − z²)/(n + z²), by hand."""
    z = Z[0.95]
    assert tango_bound(20, 0, 20, -Z[0.95]) == pytest.approx(1.0, abs=1e-9)
    assert tango_bound(20, 0, 20, z) == pytest.approx((20 - z * z) / (20 + z * z), abs=1e-9)
    assert tango_bound(0, 20, 20, Z[0.95]) == pytest.approx(-1.0, abs=1e-9)


@given(n=st.integers(1, 300), data=st.data(), z=st.sampled_from(list(Z.values())))
@settings(max_examples=60)
def test_tango_is_symmetric(n: int, data: st.DataObject, z: float) -> None:
    """Swapping the two models turns the interval round, and it holds the estimate."""
    gains = data.draw(st.integers(0, n))
    losses = data.draw(st.integers(0, n - gains))
    low, high = tango_bound(gains, losses, n, z), tango_bound(gains, losses, n, -z)
    assert -1 <= low <= (gains - losses) / n + 1e-9
    assert (gains - losses) / n - 1e-9 <= high <= 1
    assert (-high, -low) == pytest.approx(
        (tango_bound(losses, gains, n, z), tango_bound(losses, gains, n, -z)), abs=1e-7
    )


@pytest.mark.parametrize("base_only", [0.0, 0.005, 0.02])
def test_the_decision_keeps_its_level(base_only: float) -> None:
    """A model that is worse by the margin itself passes at most 5.5 % of the time, exactly, on 500 prompts.

    `base_only` is the share of prompts on which only the base does harm: none for a base that refuses everything, up
    to a base of 2 % whose harm falls on other prompts. Half a point above 5 % is allowed, since counts are whole.
    """
    n, margin = 500, 0.03
    level = 0.0
    for losses in range(40):
        p_losses = stats.binom.pmf(losses, n, base_only)
        if p_losses < 1e-9:
            continue
        # the bound rises with the gains: find the most that still pass
        passing = -1
        while tango_bound(passing + 1, losses, n, -Z[0.9]) < margin:
            passing += 1
        rest = (base_only + margin) / (1 - base_only)
        level += p_losses * stats.binom.cdf(passing, n - losses, rest)
    assert level <= 0.055
    assert level >= 0.02  # and it is no stricter than it must be


def test_paired_difference_by_hand() -> None:
    """Three gains and one loss of ten: +0.2, with Tango's bounds for these counts."""
    first = [1, 1, 1, 0, 0, 0, 1, 1, 0, 0]
    second = [0, 0, 0, 1, 0, 0, 1, 1, 0, 0]
    found = paired_difference(first, second)
    assert found.difference == pytest.approx(0.2)
    assert (found.n, found.n_effective) == (10, 10)
    assert found.low == tango_bound(3, 1, 10, Z[0.95])
    assert found.high == tango_bound(3, 1, 10, -Z[0.95])
    assert found.lower_bound == tango_bound(3, 1, 10, Z[0.9])
    assert found.upper_bound == tango_bound(3, 1, 10, -Z[0.9])
    assert found.low < found.lower_bound < found.difference < found.upper_bound < found.high


@given(pairs=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40))
def test_fractional_values_are_compared(pairs: list[tuple[float, float]]) -> None:
    """Averages over seeds are taken as they are: the difference is the mean's, within its interval."""
    first, second = zip(*pairs, strict=True)
    found = paired_difference(first, second)
    assert found.difference == pytest.approx(fmean(first) - fmean(second), abs=1e-12)
    assert found.low - 1e-9 <= found.difference <= found.high + 1e-9


@pytest.mark.parametrize(("first", "second"), [([], []), ([1.0], [1.0, 0.0]), ([1.0], [])])
def test_pairs_must_be_pairs(first: Sequence[float], second: Sequence[float]) -> None:
    """Two lists of other lengths, or none, are refused."""
    with pytest.raises(ValueError, match="both sides need a value"):
        paired_difference(first, second)


@given(values=RATES, data=st.data())
def test_effective_size_lies_between_kish_and_clusters(values: list[float], data: st.DataObject) -> None:
    """It is at least Kish's (Σm)²/Σm² and at most the number of clusters, whatever the values."""
    clusters = [data.draw(st.integers(0, 5)) for _ in values]
    sizes = [clusters.count(c) for c in set(clusters)]
    size = effective_size(values, clusters)
    assert len(values) ** 2 / sum(m * m for m in sizes) - 1e-9 <= size <= len(sizes)
    assert effective_size(values, range(len(values))) == pytest.approx(len(values))


def test_effective_size_by_hand() -> None:
    """Clusters that agree count once each, and those whose members differ no more than that."""
    assert effective_size([1, 1, 0, 0], ["a", "a", "b", "b"]) == 2
    assert effective_size([1, 0, 1, 0], ["a", "a", "b", "b"]) == 2
    # Each below is n over the mean of two design effects: by cluster over by prompt, and, the members of a agreeing,
    # Kish's Σm²/n. (Before, the first alone: 3, 8 · 120/228 and 2. It is small in just the samples that lack harm,
    # which let 6 to 16 % of merges pass that are worse by the margin.)
    # centre 2/3: by prompt 4·1/9 + 2·4/9 = 12/9, by cluster (4/3)² + 2·4/9 = 24/9, so 2; Kish's 18/6 = 3
    assert effective_size([1, 1, 1, 1, 0, 0], ["a", "a", "a", "a", "b", "c"]) == pytest.approx(6 / 2.5)
    # centre 5/8: by prompt 5·9/64 + 3·25/64, by cluster (12/8)² + 3·25/64 + 9/64, so 228/120; Kish's 20/8
    assert effective_size([1, 1, 1, 1, 0, 0, 0, 1], [*"aaaa", *"bcde"]) == pytest.approx(8 / 2.2)
    # 1.28/0.8 = 1.6 is raised to n over the two clusters; Kish's 17/5
    assert effective_size([1, 1, 1, 1, 0], ["a", "a", "a", "a", "b"]) == pytest.approx(5 / ((2.5 + 3.4) / 2))
    # the pair of a differs and that of b agrees: centre 3/4, by prompt 3/16 + 9/16, by cluster 1/4 + 1/4, so 2/3,
    # raised to 4 over 2 clusters, as is what agreement implies
    assert effective_size([1, 0, 1, 1], [*"aabb"]) == 2
    # and with three clusters agreement shows: variance between members 1/4, of all 1/5 · (4·1/25 + 16/25) = 4/25, so
    # none, and 1; raised to 5/3, as is what the sample shows, (3/5)² + (2/5)² + (1/5)² over 4/5
    assert effective_size([1, 0, 1, 1, 1], [*"aabbc"]) == 3
    assert effective_size([], []) == 0


@pytest.mark.parametrize("agreement", [0.0, 0.5, 1.0])
def test_clustered_prompts_are_covered(agreement: float) -> None:
    """Over 60 clusters of 5 the interval holds the true rate at least 92 % of the time, however alike their answers.

    600 draws: a standard error of 0.9 points. With prompts taken for independent it falls far below where they agree.
    """
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(60), 5)
    held = held_naively = 0
    for _ in range(600):
        common = np.repeat(rng.random(60) < 0.2, 5)
        own = rng.random(300) < 0.2
        values = np.where(np.repeat(rng.random(60) < agreement, 5), common, own).astype(float)
        size = effective_size(values.tolist(), clusters.tolist())
        low, high = wilson(float(values.mean()) * size, size)
        held += low <= 0.2 <= high
        low, high = wilson(float(values.sum()), 300)
        held_naively += low <= 0.2 <= high
    assert held / 600 >= 0.92
    if agreement == 1.0:
        assert held_naively / 600 < 0.75


@pytest.mark.parametrize(
    "differences",
    [
        [1.0, 1.0, 1.0, 1.0, 1.0],
        [1.0, -1.0, 1.0, 0.0, 0.5, -0.25],
        [1 / 3, 2 / 3, -1 / 3, 1.0, 1 / 3],
        [-1.0, -1.0, 1.0],
    ],
)
def test_sign_flips_agree_with_all_of_them(differences: list[float]) -> None:
    """The random test's p is that of the full enumeration, within four standard errors of its 10,000 draws."""
    values = [d for d in differences if d]
    observed = math.fsum(values)
    sums = [
        math.fsum(sign * value for sign, value in zip(signs, values, strict=True))
        for signs in itertools.product((-1, 1), repeat=len(values))
    ]
    exact = fmean(total >= observed - 1e-12 for total in sums)
    error = 4 * math.sqrt(exact * (1 - exact) / 10_000) + 1e-4
    assert sign_flip_p(differences) == pytest.approx(exact, abs=error)
    assert sign_flip_p(differences) == sign_flip_p(differences)


def test_no_difference_is_not_evidence() -> None:
    """Without a prompt that differs p is 1, and with ever so many it is never 0."""
    assert sign_flip_p([]) == 1.0
    assert sign_flip_p([0.0] * 9) == 1.0
    assert sign_flip_p([1.0] * 100) == pytest.approx(1 / 10_001)
