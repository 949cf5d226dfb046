"""Two halves of a benchmark: one to choose λ on, one to report on, with no near-duplicates across them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

from backmerge.records import Example
from backmerge.runs import key_of

Split = Literal["selection", "confirmation"]
SPLITS: tuple[Split, Split] = ("selection", "confirmation")

# AdvBench's 520 prompts fall into 363 clusters at this similarity
NEAR_DUPLICATE = 0.5

STOP_WORDS = frozenset({
    "a", "an", "and", "are", "as", "at", "be", "by", "can", "could", "do", "does", "for", "from", "give", "how", "i",
    "in", "into", "is", "it", "its", "me", "my", "of", "on", "or", "please", "should", "so", "such", "tell", "that",
    "the", "them", "this", "to", "us", "use", "using", "was", "we", "what", "when", "where", "which", "who", "will",
    "with", "would", "you", "your",
})  # fmt: skip


def content_words(text: str) -> frozenset[str]:
    """Lower-case words that carry meaning; where there is none, all words, and the text itself where it has no words.

    Never empty, so that two equal prompts are always found to be alike.
    """
    words = frozenset(re.findall(r"\w+", text.casefold()))
    return (words - STOP_WORDS) or words or frozenset([text.strip()])


def clusters_of(examples: Sequence[Example]) -> list[str]:
    """Each example's cluster: its own if it names one, else its group of near-duplicate prompts.

    Two prompts are near-duplicates if their sets of content words have a Jaccard similarity of at least 0.5;
    groups are the connected components. A group is named by the smallest of its examples' ids.
    """
    parents = list(range(len(examples)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    unnamed = [i for i, example in enumerate(examples) if example.cluster is None]
    words = {i: content_words(examples[i].prompt) for i in unnamed}
    frequency = Counter(word for i in unnamed for word in words[i])
    holders: dict[str, list[int]] = defaultdict(list)
    for i in unnamed:
        # prefix filtering: two sets of Jaccard ≥ t share a word among the rarest ⌊(1 − t)·size⌋ + 1 of each
        rarest = sorted(words[i], key=lambda word: (frequency[word], word))
        prefix = rarest[: int((1 - NEAR_DUPLICATE) * len(rarest)) + 1]
        for j in {j for word in prefix for j in holders[word]}:
            shared = len(words[i] & words[j])
            if shared >= NEAR_DUPLICATE * (len(words[i]) + len(words[j]) - shared):
                parents[root(i)] = root(j)
        for word in prefix:
            holders[word].append(i)
    names: dict[int, str] = {}
    for i in unnamed:
        names[root(i)] = min(names.get(root(i), examples[i].id), examples[i].id)
    return [names[root(i)] if example.cluster is None else example.cluster for i, example in enumerate(examples)]


def split_examples(examples: Sequence[Example]) -> dict[Split, list[Example]]:
    """Cut a benchmark in two halves, whole clusters on one side, categories in equal parts.

    Within each category, clusters go in the order of a hash of their first prompt to the smaller half, so that the
    cut depends on the prompts alone. A cluster's category is that of its first prompt, in the order of their texts;
    categories that cannot be halved are dealt out so that the two halves are of one size.
    """
    members: dict[str, list[Example]] = defaultdict(list)
    for example, cluster in zip(examples, clusters_of(examples), strict=True):
        members[cluster].append(example)
    strata: dict[str, list[list[Example]]] = defaultdict(list)
    for group in members.values():
        group.sort(key=lambda example: (example.prompt, example.category or "", example.id))
        strata[group[0].category or ""].append(group)
    sides: dict[str, Split] = {}
    totals = dict.fromkeys(SPLITS, 0)
    for category in sorted(strata):
        sizes = dict.fromkeys(SPLITS, 0)
        for group in sorted(strata[category], key=lambda g: (key_of(g[0].prompt), g[0].id)):
            side = min(SPLITS, key=lambda split: (sizes[split], totals[split]))
            sizes[side] += len(group)
            totals[side] += len(group)
            sides.update((example.id, side) for example in group)
    return {split: [example for example in examples if sides[example.id] == split] for split in SPLITS}
