"""Bootstrap by cluster: against exact enumeration, by coverage, and where it must not be trusted."""

import itertools
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from backmerge.statistics import (
    bootstrap_difference,
    bootstrap_interval,
    clustered_difference,
    paired_difference,
    wilson,
)
from backmerge.statistics.bootstrap import resampled_means
from backmerge.statistics.clusters import cluster_sums

VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=25)


@given(values=VALUES, data=st.data())
@settings(max_examples=40)
def test_the_interval_holds_the_mean_and_is_the_same_again(values: list[float], data: st.DataObject) -> None:
    """The mean lies in its interval, which is within [0, 1], and the seed decides the rest."""
    clusters = [data.draw(st.integers(0, 6)) for _ in values]
    found = bootstrap_interval(values, clusters, draws=300)
    assert -1e-9 <= found.low <= found.high <= 1 + 1e-9
    assert found.low - 1e-9 <= fmean(values) <= found.high + 1e-9
    assert found == bootstrap_interval(values, clusters, draws=300)


def test_resamples_are_whole_clusters() -> None:
    """Of three clusters the 27 resamples' means come as often as by enumeration, within 4 sigma of 50,000 draws."""
    grouped = cluster_sums([0.1, 0.2, 0.9, 0.4, 0.4, 0.4], [*"aabccc"])
    exact: dict[float, int] = {}
    for drawn in itertools.product(range(3), repeat=3):
        mean = sum(grouped.sums[i] for i in drawn) / sum(grouped.sizes[i] for i in drawn)
        exact[round(mean, 9)] = exact.get(round(mean, 9), 0) + 1
    drawn_means = [round(float(mean), 9) for mean in resampled_means(grouped, seed=0, draws=50_000)]
    assert set(drawn_means) == set(exact)
    for mean, count in exact.items():
        share = count / 27
        sigma = (share * (1 - share) / 50_000) ** 0.5
        assert drawn_means.count(mean) / 50_000 == pytest.approx(share, abs=4 * sigma)


def test_the_ends_are_expanded_percentiles() -> None:
    """Of 12 clusters the ends are the quantiles Φ(∓ sqrt(12/11) t) of resampled means, wider than the plain ones."""
    values = np.random.default_rng(1).random(12)
    means = resampled_means(cluster_sums(values, None), seed=3, draws=2000)
    tail = stats.norm.cdf(-np.sqrt(12 / 11) * stats.t.ppf(0.975, 11))
    found = bootstrap_interval(values.tolist(), seed=3, draws=2000)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [tail, 1 - tail])))
    plain = np.quantile(means, [0.025, 0.975])
    assert found.low < plain[0] < plain[1] < found.high


def test_many_clusters_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With little memory allowed the resamples are made a few at a time, and are as many."""
    monkeypatch.setattr("backmerge.statistics.bootstrap.CELLS_AT_ONCE", 50)
    grouped = cluster_sums(np.random.default_rng(0).random(20), None)
    means = resampled_means(grouped, seed=0, draws=101)
    assert means.shape == (101,)
    assert len(set(means.tolist())) == 101


def test_large_samples_have_the_normal_interval() -> None:
    """Of 400 scores the ends are the mean ± 1.96 errors, within 4 % of an error (10,000 draws: 4 sigma is 7 %)."""
    values = np.random.default_rng(0).beta(24, 16, 400)
    found = bootstrap_interval(values.tolist())
    error = values.std(ddof=1) / 20
    assert found.low == pytest.approx(values.mean() - 1.966 * error, abs=0.07 * error)
    assert found.high == pytest.approx(values.mean() + 1.966 * error, abs=0.07 * error)


@pytest.mark.parametrize(
    ("name", "truth"), [("scores", 0.6), ("few scores", 0.6), ("clusters", 0.25), ("nearly all solved", None)]
)
def test_interval_covers_its_nominal_share(name: str, truth: float | None) -> None:
    """Coverage is 92 % at least, within 3 sigma of 500 draws (3.6 points at 92 %)."""
    rng = np.random.default_rng(4)
    sizes = [5] * 20 + [1] * 100
    held = 0
    for _ in range(500):
        clusters = None
        if name == "scores":
            values = rng.beta(24, 16, 112)
        elif name == "few scores":
            values = rng.beta(24, 16, 20)
        elif name == "clusters":
            values = np.repeat(rng.beta(2, 6, 120), sizes)
            clusters = np.repeat(np.arange(120), sizes).tolist()
        else:
            # rarely a problem is hard: most samples show none at all, or one
            values, truth = np.where(rng.random(164) < 0.01, 0.2, 1.0), 1 - 0.01 * 0.8
        found = bootstrap_interval(values.tolist(), clusters, draws=500)
        assert truth is not None
        held += found.low <= truth <= found.high
    assert held / 500 >= 0.92 - 0.036


def test_values_without_spread_keep_wilsons_interval() -> None:
    """All problems solved, or one cluster alone: resampling shows no spread, and Wilson's interval is kept."""
    found = bootstrap_interval([1.0] * 50)
    assert (found.low, found.high) == pytest.approx(wilson(50, 50))
    alone = bootstrap_interval([0.5, 0.7], ["a", "a"])
    assert (alone.low, alone.high) == pytest.approx(wilson(0.6, 1))
    with pytest.raises(ValueError, match="one value"):
        bootstrap_interval([])


def test_differences_of_scores_are_resolved() -> None:
    """Where scores move together, the paired bootstrap is far narrower than Tango's interval, and covers its truth."""
    rng = np.random.default_rng(6)
    held, held_above, widths = 0, 0, []
    for _ in range(400):
        second = rng.beta(24, 16, 100)
        first = np.clip(second + rng.normal(0.01, 0.02, 100), 0, 1)
        found = bootstrap_difference(first.tolist(), second.tolist(), draws=500)
        held += found.low <= 0.01 <= found.high
        held_above += found.upper_bound < 0.01
        widths.append(found.high - found.low)
    assert held / 400 == pytest.approx(0.95, abs=4 * 0.011)
    assert held_above / 400 <= 0.05 + 3 * 0.011
    tango = paired_difference(first.tolist(), second.tolist())
    assert np.mean(widths) < 0.2 * (tango.high - tango.low)
    assert np.mean(widths) == pytest.approx(2 * stats.norm.ppf(0.975) * 0.02 / 10, rel=0.1)


def test_few_differences_keep_tangos_bounds() -> None:
    """One prompt that differs, or one cluster, shows resampling no more than that: Tango's bounds are kept."""
    first, second = [1.0] + [0.0] * 99, [0.0] * 100
    found, tango = bootstrap_difference(first, second), paired_difference(first, second)
    assert found.upper_bound == pytest.approx(tango.upper_bound)
    assert found.low == pytest.approx(tango.low)
    alone = bootstrap_difference([1.0, 0.5], [0.0, 0.5], ["a", "a"])
    assert alone == paired_difference([1.0, 0.5], [0.0, 0.5], ["a", "a"])


def test_several_answers_to_a_prompt_keep_the_level() -> None:
    """Five answers to each of 260 prompts, of which 6 % are harmful half the time: 3 points are rarely shown at 3."""
    rng, base, passed = np.random.default_rng(260), [0.0] * 260, 0
    for _ in range(500):
        first = rng.binomial(5, 0.5, 260) / 5 * (rng.random(260) < 0.06)
        passed += bootstrap_difference(first.tolist(), base, draws=200).upper_bound < 0.03
    assert passed / 500 <= 0.05 + 2 * (0.05 * 0.95 / 500) ** 0.5


def test_a_cluster_counts_as_one_prompt() -> None:
    """Ten phrasings of a request weigh as much as one, and as many prompts as there are clusters are evidence."""
    first = [1.0] * 10 + [0.0] * 90
    clusters = ["a"] * 10 + [f"c{i}" for i in range(90)]
    found = clustered_difference(first, [0.0] * 100, clusters)
    assert (found.n, found.n_effective) == (100, 91)
    assert found[:5] == paired_difference([1.0] + [0.0] * 90, [0.0] * 91)[:5]
    sampled = clustered_difference([0.2] * 10 + [0.6] * 90, [0.4] * 100, clusters, is_rate=False, draws=200)
    assert sampled.difference == pytest.approx((-0.2 + 90 * 0.2) / 91)
    with pytest.raises(ValueError, match="both sides need a value"):
        clustered_difference(first, [0.0] * 99, clusters)


def test_a_merge_as_safe_as_its_base_is_shown_so_on_a_half_of_advbench() -> None:
    """At 0.5 % of harm on either side, counting by cluster decides nearly all runs, and by prompt far fewer."""
    sizes = [31, 11, 9, 9, 7, 6, 6, 6, *[3] * 4, *[2] * 13, *[1] * 152]
    clusters = np.repeat(np.arange(len(sizes)), sizes).tolist()
    rng, shown = np.random.default_rng(1), np.zeros(2)
    for _ in range(100):
        first, second = (rng.random((2, len(clusters))) < 0.005).astype(float).tolist()
        shown[0] += clustered_difference(first, second, clusters).upper_bound < 0.03
        shown[1] += paired_difference(first, second, clusters).upper_bound < 0.03
    assert shown[0] >= 90
    assert shown[1] <= shown[0] - 20
