"""Split all benchmarks into halves: one to choose λ on, one to report on, with no near-duplicates across them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal, NamedTuple

from backmerge.records import Example, Message
from backmerge.runs import key_of

Split = Literal["selection", "confirmation"]
SPLITS: tuple[Split, Split] = ("selection", "confirmation")

# at this similarity AdvBench's 520 prompts form 363 clusters
NEAR_DUPLICATE = 0.5
# A word in more than this share of a file's prompts is part of its template ("Classify this review as ..."). It says
# nothing about two prompts; in a small file it may be the subject.
TEMPLATE_SHARE = 0.5
LEAST_FOR_TEMPLATE = 20  # prompts

STOP_WORDS = frozenset({
    "a", "an", "and", "are", "as", "at", "be", "by", "can", "could", "do", "does", "for", "from", "give", "how", "i",
    "in", "into", "is", "it", "its", "me", "my", "of", "on", "or", "please", "should", "so", "such", "tell", "that",
    "the", "them", "this", "to", "us", "use", "using", "was", "we", "what", "when", "where", "which", "who", "will",
    "with", "would", "you", "your",
})  # fmt: skip


def content_words(text: str) -> frozenset[str]:
    """Return lower-case words that carry meaning; without any, all words, and without words the text itself.

    Never empty, so that two equal prompts always count as similar.
    """
    words = frozenset(re.findall(r"\w+", text.casefold()))
    return (words - STOP_WORDS) or words or frozenset([text.strip()])


def wording_of(example: Example) -> tuple[tuple[str, ...], ...]:
    """Return the prompt without letter case, spaces and punctuation: examples with the same result ask the same."""
    return tuple(
        (message.role, *(re.findall(r"\w+", message.content.casefold()) or [message.content.strip()]))
        for message in example.messages
    )


class Source(NamedTuple):
    """A benchmark's prompts, to be split together with those of other benchmarks.

    Attributes:
        name: The benchmark's name.
        kind: `utility`, `safety` or `over_refusal`.
        examples: Its prompts.
    """

    name: str
    kind: str
    examples: Sequence[Example]


class _Groups:
    """Disjoint sets of places, joined pair by pair."""

    def __init__(self, size: int) -> None:
        self._parents = list(range(size))

    def root(self, i: int) -> int:
        while self._parents[i] != i:
            self._parents[i] = self._parents[self._parents[i]]
            i = self._parents[i]
        return i

    def join(self, i: int, j: int) -> None:
        self._parents[self.root(i)] = self.root(j)

    def join_alike(self, keys: Iterable[object]) -> None:
        """Join all places that have the same key."""
        first: dict[object, int] = {}
        for i, key in enumerate(keys):
            self.join(i, first.setdefault(key, i))


def pooled_id(benchmark: str, example: Example) -> str:
    """Return an example's id among those of several benchmarks."""
    return f"{benchmark}/{example.id}"


def pooled(benchmark: str, examples: Sequence[Example]) -> list[Example]:
    """Return examples for use among those of other benchmarks: ids, categories and clusters include its name."""
    return [
        replace(
            example,
            id=pooled_id(benchmark, example),
            category=f"{benchmark}/{example.category or ''}",
            cluster=None if example.cluster is None else f"{benchmark}/{example.cluster}",
        )
        for example in examples
    ]


def clusters_over(benchmarks: Mapping[str, Sequence[Example]]) -> dict[str, str]:
    """Return each example's cluster among the prompts of several benchmarks of a kind, by its pooled id."""
    examples = [example for name, of in benchmarks.items() for example in pooled(name, of)]
    files = [name for name, of in benchmarks.items() for _ in of]
    return dict(zip((example.id for example in examples), clusters_of(examples, files), strict=True))


def clusters_of(examples: Sequence[Example], files: Sequence[str] | None = None) -> list[str]:
    """Return each example's cluster: examples of one named cluster, and near-duplicates, are joined.

    Two prompts are near-duplicates if their sets of content words, without those of their files' templates, have a
    Jaccard similarity of at least 0.5; clusters are the connected components. Within a file, names count more than
    words: two examples that both name a cluster are joined only if the names, or the prompts, are equal. Between files
    names mean nothing, and words decide.

    Args:
        examples: Examples of one file or of several.
        files: Each example's file; one for all if not given.

    Returns:
        The smallest name among the cluster's examples; if it has no name, the smallest of its ids.
    """
    asked = tuple((example.id, example.cluster, example.messages) for example in examples)
    return list(_clusters(asked, None if files is None else tuple(files)))


@lru_cache(maxsize=64)  # each set of prompts is used for every model, metric and difference
def _clusters(
    asked: tuple[tuple[str, str | None, tuple[Message, ...]], ...], files: tuple[str, ...] | None
) -> tuple[str, ...]:
    examples = [Example(name, messages, cluster=cluster) for name, cluster, messages in asked]
    groups = _Groups(len(examples))
    groups.join_alike(i if one.cluster is None else one.cluster for i, one in enumerate(examples))
    groups.join_alike(wording_of(one) for one in examples)
    sources = files if files is not None else [""] * len(examples)
    is_named = [example.cluster is not None for example in examples]
    has_names_alone = all(is_named) and len(set(sources)) <= 1
    words = [] if has_names_alone else _words_of_their_own(examples, sources)
    frequency = Counter(word for of in words for word in of)
    holders: dict[str, list[int]] = defaultdict(list)
    for i, own in enumerate(words):
        # prefix filtering: two sets of Jaccard ≥ t share a word among the rarest ⌊(1 − t)·size⌋ + 1 of each
        rarest = sorted(own, key=lambda word: (frequency[word], word))
        prefix = rarest[: int((1 - NEAR_DUPLICATE) * len(rarest)) + 1]
        for j in {j for word in prefix for j in holders[word]}:
            if is_named[i] and is_named[j] and sources[i] == sources[j]:
                continue
            shared = len(own & words[j])
            if shared >= NEAR_DUPLICATE * (len(own) + len(words[j]) - shared):
                groups.join(i, j)
        for word in prefix:
            holders[word].append(i)
    names: dict[int, tuple[bool, str]] = {}
    for i, example in enumerate(examples):
        name = (example.cluster is None, example.id if example.cluster is None else example.cluster)
        names[groups.root(i)] = min(names.get(groups.root(i), name), name)
    return tuple(names[groups.root(i)][1] for i in range(len(examples)))


def _words_of_their_own(examples: Sequence[Example], sources: Sequence[str]) -> list[frozenset[str]]:
    """Return each prompt's content words that are not in most prompts of its file; all words if none is left."""
    words = [content_words(example.prompt) for example in examples]
    in_file = Counter(sources)
    holders = Counter((source, word) for source, of in zip(sources, words, strict=True) for word in of)
    template = {
        (source, word)
        for (source, word), number in holders.items()
        if in_file[source] >= LEAST_FOR_TEMPLATE and number > TEMPLATE_SHARE * in_file[source]
    }
    return [
        frozenset(word for word in of if (source, word) not in template) or of
        for source, of in zip(sources, words, strict=True)
    ]


def split_examples(examples: Sequence[Example]) -> dict[Split, list[Example]]:
    """Split one benchmark into two halves; see `split_benchmarks`."""
    return split_benchmarks([Source("", "", examples)])[""]


def split_benchmarks(sources: Sequence[Source]) -> dict[str, dict[Split, list[Example]]]:
    """Split all benchmarks into two halves together: whole clusters on one side, categories in equal parts.

    Clusters are those of `clusters_of` within a kind. Prompts of two kinds with the same words are on one side as well,
    and so is a pair. Within each category, clusters go in the order of a hash of their first prompt to the smaller
    half, so that the split depends only on the prompts. A cluster's category is that of its first prompt, in the order
    of their texts; categories that cannot be halved are distributed so that the two halves of each kind have the same
    size.

    Returns:
        Each benchmark's two halves, in the order of its examples.
    """
    examples = [example for source in sources for example in pooled(source.name, source.examples)]
    kinds = [source.kind for source in sources for _ in source.examples]
    of_kind: dict[str, dict[str, Sequence[Example]]] = defaultdict(dict)
    for source in sources:
        of_kind[source.kind][source.name] = source.examples
    clusters = {kind: clusters_over(benchmarks) for kind, benchmarks in of_kind.items()}
    groups = _Groups(len(examples))
    groups.join_alike((kind, clusters[kind][one.id]) for kind, one in zip(kinds, examples, strict=True))
    groups.join_alike(wording_of(one) for one in examples)
    groups.join_alike(i if one.pair is None else one.pair for i, one in enumerate(examples))
    members: dict[int, list[int]] = defaultdict(list)
    for i in range(len(examples)):
        members[groups.root(i)].append(i)
    strata: dict[str, list[list[int]]] = defaultdict(list)
    for group in members.values():
        group.sort(key=lambda i: (examples[i].prompt, examples[i].category or "", examples[i].id))
        strata[examples[group[0]].category or ""].append(group)
    sides: dict[str, Split] = {}
    totals = {(kind, split): 0 for kind in kinds for split in SPLITS}
    for category in sorted(strata):
        sizes = dict.fromkeys(SPLITS, 0)
        for group in sorted(strata[category], key=lambda g: (key_of(examples[g[0]].prompt), examples[g[0]].id)):
            in_group = sorted({kinds[i] for i in group})
            side = min(SPLITS, key=lambda split: (sizes[split], sum(totals[kind, split] for kind in in_group)))
            sizes[side] += len(group)
            for i in group:
                totals[kinds[i], side] += 1
                sides[examples[i].id] = side
    return {
        source.name: {
            split: [one for one in source.examples if sides[pooled_id(source.name, one)] == split] for split in SPLITS
        }
        for source in sources
    }


class Calibration(NamedTuple):
    """Prompts that a merge is made with, and the prompts left to measure.

    Attributes:
        prompts: The guard's prompts, in its order.
        left: By benchmark, the examples that are not near-duplicates of these.
    """

    prompts: list[Example]
    left: dict[str, list[Example]]


def calibration_of(guard: Source, measured: Sequence[Source], num_prompts: int) -> Calibration:
    """Split prompts to make a merge with off from those that λ is chosen and confirmed on, in whole clusters.

    Clusters are those of `clusters_of` over the guard and the measured benchmarks of its kind, or of every kind if it
    has none; prompts of other kinds with the same words are in the cluster as well. Clusters without a measured prompt
    come first; of those with one at most a quarter is used, and is then not measured. In either part clusters go in the
    order of a hash of their first prompt; each gives one prompt, and more only if there are too few clusters.

    Args:
        guard: The source of the prompts; may be one of the measured benchmarks. Its kind may be empty.
        measured: The benchmarks.
        num_prompts: Largest number of prompts.
    """
    sources = [guard._replace(name=f"guard:{guard.name}"), *measured]
    examples = [example for source in sources for example in pooled(source.name, source.examples)]
    alike = {source.name: source.examples for source in sources if not guard.kind or source.kind == guard.kind}
    clusters = clusters_over(alike)
    groups = _Groups(len(examples))
    groups.join_alike(clusters.get(one.id, (i, one.id)) for i, one in enumerate(examples))
    groups.join_alike(wording_of(one) for one in examples)
    groups.join_alike(i if one.pair is None else one.pair for i, one in enumerate(examples))
    num_guard = len(guard.examples)
    members: dict[int, list[int]] = defaultdict(list)
    for i in range(num_guard):
        members[groups.root(i)].append(i)
    is_measured = {groups.root(i) for i in range(num_guard, len(examples))}

    def order(root: int) -> tuple[str, str]:
        first = examples[members[root][0]]
        return key_of(first.prompt), first.id

    shared = sorted((root for root in members if root in is_measured), key=order)
    free = sorted((root for root in members if root not in is_measured), key=order)
    taken: list[int] = []
    for root in [*free, *shared[: -(-len(shared) // 4)]]:
        if len(taken) < num_prompts:
            taken.append(root)
    rest = (i for root in taken for i in members[root][1:])
    chosen = [members[root][0] for root in taken]
    chosen += [i for i, _ in zip(rest, range(num_prompts - len(chosen)), strict=False)]
    lost = {groups.root(i) for i in chosen}
    ids = {examples[i].id for i in range(num_guard, len(examples)) if groups.root(i) in lost}
    return Calibration(
        [guard.examples[i] for i in sorted(chosen)],
        {source.name: [e for e in source.examples if pooled_id(source.name, e) not in ids] for source in measured},
    )


def are_apart(halves: Mapping[str, Mapping[Split, Sequence[Example]]], calibration: Iterable[Example] = ()) -> bool:
    """Return whether no wording, and no named cluster of a benchmark, is in both halves of a split.

    The wording of a calibration prompt must not be in either half.
    """
    seen = {
        split: {
            key
            for name, of in halves.items()
            for one in of[split]
            for key in (wording_of(one), (name, one.cluster or one.id))
        }
        for split in SPLITS
    }
    is_calibrated_apart = {wording_of(one) for one in calibration}.isdisjoint(seen["selection"] | seen["confirmation"])
    return seen["selection"].isdisjoint(seen["confirmation"]) and is_calibrated_apart


def limited(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """Return at most `limit` examples, drawn by a hash of their ids and kept in order."""
    if limit is None or len(examples) <= limit:
        return list(examples)
    drawn = sorted(examples, key=lambda example: key_of(example.id))[:limit]
    kept = {example.id for example in drawn}
    return [example for example in examples if example.id in kept]
