"""Effective sizes: the level of the decision that rests on them, where members of clusters agree."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from backmerge.statistics import discordance, effective_size, tango_score
from backmerge.statistics.clusters import cluster_sums

# sizes of the clusters of near-duplicates in the two halves of AdvBench, largest first
SELECTION = [19, 8, 4, 4, *[3] * 5, *[2] * 18, *[1] * 159]
CONFIRMATION = [31, 11, 9, 9, 7, 6, 6, 6, *[3] * 4, *[2] * 13, *[1] * 152]
FEW_LARGE = [*[10] * 10, *[1] * 200]


@given(values=st.lists(st.floats(-1, 1), min_size=1, max_size=40), data=st.data())
def test_sums_are_those_of_a_loop(values: list[float], data: st.DataObject) -> None:
    """Sums, squares and sizes by cluster, in the order in which clusters first occur."""
    clusters = [data.draw(st.sampled_from("abcd")) for _ in values]
    found = cluster_sums(values, clusters)
    for place, name in enumerate(dict.fromkeys(clusters)):
        members = [value for value, cluster in zip(values, clusters, strict=True) if cluster == name]
        assert found.sizes[place] == len(members)
        assert found.sums[place] == pytest.approx(sum(members))
        assert found.squares[place] == pytest.approx(sum(value * value for value in members))
    assert np.array_equal(cluster_sums(values, None).sums, values)


def test_every_value_needs_a_cluster() -> None:
    """Lists of other lengths are refused."""
    with pytest.raises(ValueError, match="2 values, 1 clusters"):
        effective_size([0.0, 1.0], ["a"])


@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=20), data=st.data())
def test_agreement_is_felt_even_where_the_sample_does_not_show_it(sizes: list[int], data: st.DataObject) -> None:
    """With members that agree one of the two design effects is Kish's, so that the size stays below twice Kish's."""
    answers = [data.draw(st.booleans()) for _ in sizes]
    values = [float(answer) for answer, size in zip(answers, sizes, strict=True) for _ in range(size)]
    clusters = [place for place, size in enumerate(sizes) for _ in range(size)]
    kish = sum(sizes) ** 2 / sum(size * size for size in sizes)
    if 0 < sum(values) < len(values):
        # the harmonic mean of Kish's and of the number of clusters, at most
        assert effective_size(values, clusters) <= 2 / (1 / kish + 1 / len(sizes)) + 1e-9


@pytest.mark.parametrize("sizes", [SELECTION, CONFIRMATION, FEW_LARGE], ids=["selection", "confirmation", "few large"])
@pytest.mark.parametrize(("losses", "margin"), [(0.0, 0.03), (0.01, 0.03), (0.01, 0.1)])
def test_the_decision_keeps_its_level_where_members_agree(sizes: list[int], losses: float, margin: float) -> None:
    """A model that is worse by the margin itself passes 5.5 % of the time at most, within 3 sigma of 3,000 draws.

    Members of a cluster always agree, and sizes differ. With the design effect that the sample shows taken alone, 6
    to 16 % passed; where a base's own harm adds to the variance, even more do with all prompts taken for independent.
    """
    rng = np.random.default_rng(7)
    clusters = np.repeat(np.arange(len(sizes)), sizes).tolist()
    passed = passed_naively = 0
    draws, z = 3000, stats.norm.ppf(0.95)
    for uniform in rng.random((draws, len(sizes))):
        gains = np.repeat(uniform < losses + margin, sizes).astype(float)
        worse = np.repeat(uniform > 1 - losses, sizes).astype(float)
        found = discordance(gains.tolist(), worse.tolist(), clusters)
        passed += tango_score(np.float64(found.gains), np.float64(found.losses), found.n, margin) < -z
        passed_naively += tango_score(gains.sum(), worse.sum(), len(gains), margin) < -z
    sigma = (0.055 * 0.945 / draws) ** 0.5
    assert passed / draws <= 0.055 + 3 * sigma
    if losses:
        assert passed_naively / draws > 0.055 + 3 * sigma


def test_it_is_not_useless_where_members_differ() -> None:
    """Independent answers within AdvBench's clusters are worth more than 80 % of the number of clusters, on average."""
    rng = np.random.default_rng(8)
    clusters = np.repeat(np.arange(len(SELECTION)), SELECTION).tolist()
    sizes = [effective_size((rng.random(len(clusters)) < 0.1).astype(float).tolist(), clusters) for _ in range(200)]
    assert np.mean(sizes) > 0.8 * len(SELECTION)
