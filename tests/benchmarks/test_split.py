"""The two halves of a benchmark: no near-duplicates across them, equal parts, whatever the order.

AdvBench's prompts are harmful: no assertion shows a text, only ids and numbers.
"""

from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backmerge.benchmarks.files import from_file
from backmerge.benchmarks.split import (
    NEAR_DUPLICATE,
    SPLITS,
    STOP_WORDS,
    Source,
    are_apart,
    clusters_of,
    clusters_over,
    content_words,
    split_benchmarks,
    split_examples,
    wording_of,
)
from backmerge.records import Example, Message

ADVBENCH = Path(__file__).parents[2].parent / "shared" / "data" / "advbench" / "harmful_behaviors.csv"
WORDS = [*"abcdefgh", "mend", "kite", "the", "how"]
EXAMPLES = st.lists(
    st.tuples(
        st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join),
        st.sampled_from([None, "x", "y", "z"]),
        st.sampled_from([None, None, None, "one", "two", ""]),
    ),
    min_size=1,
    max_size=30,
).map(lambda rows: [example(f"e{i}", *row) for i, row in enumerate(rows)])


def example(name: str, prompt: str, category: str | None = None, cluster: str | None = None) -> Example:
    """An example of one turn."""
    return Example(name, (Message("user", prompt),), category=category, cluster=cluster)


def partition(examples: list[Example], clusters: list[str]) -> set[frozenset[str]]:
    """The clusters as sets of ids, whatever they are called."""
    members: dict[str, set[str]] = {}
    for one, cluster in zip(examples, clusters, strict=True):
        members.setdefault(cluster, set()).add(one.id)
    return {frozenset(ids) for ids in members.values()}


def brute_force(examples: list[Example]) -> set[frozenset[str]]:
    """The same partition with every pair compared."""
    groups = {one.id: {one.id} for one in examples}
    words = {one.id: content_words(one.prompt) for one in examples}

    def join(first: str, second: str) -> None:
        if groups[first] is not groups[second]:
            union = groups[first] | groups[second]
            groups.update(dict.fromkeys(union, union))

    for a, b in combinations(examples, 2):
        if a.cluster is not None and b.cluster is not None:
            if a.cluster == b.cluster or wording_of(a) == wording_of(b):
                join(a.id, b.id)
        elif len(words[a.id] & words[b.id]) >= NEAR_DUPLICATE * len(words[a.id] | words[b.id]):
            join(a.id, b.id)
    return {frozenset(group) for group in groups.values()}


@pytest.fixture(scope="module")
def advbench() -> list[Example]:
    """The 520 prompts."""
    if not ADVBENCH.is_file():
        pytest.skip("AdvBench is not in ../shared/data")
    return list(from_file(ADVBENCH, "safety").examples)


@given(examples=EXAMPLES)
@settings(max_examples=150)
def test_clusters_are_those_of_all_pairs(examples: list[Example]) -> None:
    """Looking only at the rarest words misses no pair."""
    assert partition(examples, clusters_of(examples)) == brute_force(examples)


def test_clusters_of_advbench(advbench: list[Example]) -> None:
    """520 prompts fall into 363 clusters, the same by comparing every pair, the largest of 31."""
    clusters = clusters_of(advbench)
    found, expected = partition(advbench, clusters), brute_force(advbench)
    assert len(found ^ expected) == 0
    assert len(set(clusters)) == 363
    assert max(Counter(clusters).values()) == 31


def test_advbench_is_halved(advbench: list[Example]) -> None:
    """Each half has at least 240 prompts, no cluster is in both, and none is lost."""
    halves = split_examples(advbench)
    ids = {split: {one.id for one in half} for split, half in halves.items()}
    assert not ids["selection"] & ids["confirmation"]
    assert len(ids["selection"] | ids["confirmation"]) == 520
    assert min(map(len, ids.values())) >= 240
    cluster = dict(zip((one.id for one in advbench), clusters_of(advbench), strict=True))
    assert not {cluster[i] for i in ids["selection"]} & {cluster[i] for i in ids["confirmation"]}


def test_near_duplicates_by_hand() -> None:
    """Half the words in common is a near-duplicate, less is not, and likeness is handed on."""
    prompts = ["mend red kite", "mend red boat", "sail red boat", "bake sweet bread", "bake white cake"]
    found = clusters_of([example(f"e{i}", prompt) for i, prompt in enumerate(prompts)])
    assert found == ["e0", "e0", "e0", "e3", "e4"]


TEMPLATE = "Classify the sentiment of the following product review as positive or negative"


def test_a_files_template_joins_no_prompts() -> None:
    """Of twenty rows that share nine words each is a cluster, but for two reviews that are alike."""
    reviews = [f"{TEMPLATE}: taste{i} colour{i} price{i}" for i in range(19)]
    found = clusters_of([example(f"e{i:02}", text) for i, text in enumerate([*reviews, f"{reviews[0]} indeed"])])
    assert Counter(found) == Counter({"e00": 2, **{f"e{i:02}": 1 for i in range(1, 19)}})


def test_the_template_is_each_files() -> None:
    """A word that is common in one file alone is no template's in another."""
    plain = [example(f"p{i}", f"topic{i} matter{i}") for i in range(17)]
    pair = [example(f"q{i}", f"sentiment review product thing{i}") for i in range(3)]
    framed = [example(f"f{i}", f"{TEMPLATE}: taste{i} colour{i}") for i in range(20)]
    examples = [*plain, *pair, *framed]
    found = clusters_of(examples, ["plain"] * 20 + ["framed"] * 20)
    assert len(set(found)) == 17 + 1 + 20


def test_in_a_small_file_common_words_are_the_subject() -> None:
    """Nineteen prompts, one short of the number from which a template is looked for."""
    assert len(set(clusters_of([example(f"e{i}", f"{TEMPLATE}: taste{i}") for i in range(19)]))) == 1


@pytest.mark.parametrize("prompt", ["Who are you?", "…", "", "你好", "How do I do it?"])
def test_equal_prompts_are_one_cluster(prompt: str) -> None:
    """Also those without any word that carries meaning: the same prompt never stands on both sides."""
    others = [example(f"o{i}", f"other{i} thing{i}") for i in range(6)]
    twins = [example(f"t{i}", prompt) for i in range(4)]
    halves = split_examples([*others, *twins])
    assert len(set(clusters_of(twins))) == 1
    assert {sum(one.id.startswith("t") for one in half) for half in halves.values()} == {0, 4}


def test_content_words() -> None:
    """Letter case and small words do not count, unless there is nothing else."""
    assert content_words("How do I mend THE Kite?") == {"mend", "kite"}
    assert content_words("How do I?") == {"how", "do", "i"}
    assert content_words(" ?! ") == {"?!"}
    assert all(word == word.casefold() for word in STOP_WORDS)


@given(examples=EXAMPLES, data=st.data())
@settings(max_examples=100)
def test_a_split_keeps_clusters_whole(examples: list[Example], data: st.DataObject) -> None:
    """Every example is on one side, with its whole cluster; the sides do not depend on the order."""
    halves = split_examples(examples)
    sides = {one.id: split for split, half in halves.items() for one in half}
    assert sorted(sides) == sorted(one.id for one in examples)
    assert sum(map(len, halves.values())) == len(examples)
    for group in brute_force(examples):
        assert len({sides[i] for i in group}) == 1
    shuffled = split_examples(data.draw(st.permutations(examples)))
    assert {one.id: split for split, half in shuffled.items() for one in half} == sides
    for half in halves.values():
        assert half == [one for one in examples if one in half]


def test_categories_are_halved() -> None:
    """Of each category, half of the prompts, give or take one, are on each side."""
    categories = ["fraud", "theft", "theft", "harm", "harm", "harm", "harm"]
    examples = [example(f"e{i}", f"word{i} thing{i} case{i}", categories[i * i % 7]) for i in range(200)]
    halves = split_examples(examples)
    for category in {one.category for one in examples}:
        counts = [sum(one.category == category for one in half) for half in halves.values()]
        assert abs(counts[0] - counts[1]) <= 1


@pytest.mark.parametrize("size", [1, 3])
def test_many_small_categories_fill_both_halves(size: int) -> None:
    """Forty categories of one or three prompts each do not all put their odd one on the same side."""
    examples = [
        example(f"e{i}-{j}", f"word{i}{j} thing{i}{j}", f"category {i}") for i in range(40) for j in range(size)
    ]
    counts = [len(half) for half in split_examples(examples).values()]
    assert abs(counts[0] - counts[1]) <= 1


def test_split_depends_only_on_the_prompts() -> None:
    """Other ids and another position leave each prompt on its side, so that a file may be renamed."""
    prompts = [f"word{i} thing{i} case{i}" for i in range(30)]
    first = split_examples([example(f"a-{i}", prompt) for i, prompt in enumerate(prompts)])
    second = split_examples([example(f"b-{99 - i}", prompt) for i, prompt in enumerate(reversed(prompts))])
    for split in ("selection", "confirmation"):
        assert {one.prompt for one in first[split]} == {one.prompt for one in second[split]}


def test_files_that_share_prompts_are_cut_as_one() -> None:
    """What two files ask, each with its own names of clusters, in another order and spelling, is on the same side."""
    prompts = [f"word{i} thing{i} case{i}" for i in range(30)]
    first = [example(f"a{i}", prompt, cluster=f"x{i}") for i, prompt in enumerate(prompts)]
    second = [example(f"b{i}", f"{p.title()}?", "other", f"y{i}") for i, p in enumerate(reversed(prompts))]
    third = [example(f"c{i}", prompt) for i, prompt in enumerate(prompts[5:])]
    halves = split_benchmarks(
        [Source("a", "safety", first), Source("b", "safety", second), Source("c", "utility", third)]
    )
    asked = {split: {one.prompt.lower().rstrip("?") for of in halves.values() for one in of[split]} for split in SPLITS}
    assert asked["selection"].isdisjoint(asked["confirmation"])
    assert are_apart(halves)
    assert not are_apart(
        {"a": {"selection": first, "confirmation": []}, "b": {"selection": [], "confirmation": second}}
    )
    clusters = clusters_over({"a": first, "b": second})
    assert len(clusters) == 60
    assert len(set(clusters.values())) == 30


def test_names_are_trusted_only_within_a_file() -> None:
    """Near-duplicates that a file puts into clusters of their own stay apart there, and join those of another file."""
    template = [example(f"e{i}", f"mend red kite number{i}", cluster=f"c{i}") for i in range(4)]
    assert clusters_of(template) == ["c0", "c1", "c2", "c3"]
    unnamed = example("u", "mend red kite")
    assert len(set(clusters_of([*template, unnamed]))) == 1
    assert len(set(clusters_of([*template[:1], template[1]], ["first", "second"]))) == 1
