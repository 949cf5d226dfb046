"""Find training examples whose prompts are also in a benchmark: even a benign one distorts the measurement."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from backmerge.benchmarks.protocol import Benchmark
from backmerge.benchmarks.split import NEAR_DUPLICATE, content_words
from backmerge.checkpoints.reader import Checkpoint, read_json
from backmerge.finetuning.datasets import TrainingData, load_training_data
from backmerge.finetuning.encoding import cutoff_for, leaves_no_answer
from backmerge.finetuning.settings import FinetuneSettings
from backmerge.generation.chat import load_tokenizer
from backmerge.progress import count_text, say
from backmerge.records import Example
from backmerge.registry import NOTHING_ALLOWED, Permissions

MIN_SHARED = 3  # common words of near-duplicates; one word of two is a Jaccard of 0.5, but means nothing
MIN_CONTAINED = 5  # this many content words of a prompt are not all in another text by chance


class Overlap(NamedTuple):
    """An example, and the most similar prompt of a benchmark.

    Attributes:
        example: Its id.
        benchmark: The benchmark's name.
        prompt: The id of the benchmark's prompt; never its text, which may be harmful.
        similarity: 1 if one of the user's turns contains the prompt, else the Jaccard similarity of content words, in
            [0, 1].
        is_exact: Whether the turn equals the prompt, apart from white space and letter case.
    """

    example: str
    benchmark: str
    prompt: str
    similarity: float
    is_exact: bool


def overlaps(examples: Sequence[Example], benchmark_name: str, prompts: Sequence[Example]) -> list[Overlap]:
    """Return the examples with a prompt of the benchmark in a user's turn, each once, with the most similar prompt.

    That is the case if the turn equals the prompt, apart from white space and letter case; or if their content words
    (in the sense of the benchmarks' splitter) have a Jaccard similarity of at least 0.5, with three words or more in
    common, or are equal; or if the turn, which may be long, contains the prompt: the prompt's words in their order, or,
    for prompts with at least five content words, all of these anywhere.

    False alarms, measured: none among the 33,443 prompts of Flan CoT and the 112 of OpenFunctions against AdvBench
    (520)
    and XSTest (450).

    Args:
        examples: The training examples.
        benchmark_name: The name in the result.
        prompts: The benchmark's examples.
    """
    index = _Index(prompts)
    found = []
    for example in examples:
        turns = [message.content for message in example.messages if message.role == "user"]
        nearest = max((match for turn in turns for match in index.matches(turn)), default=None)
        if nearest is not None:
            is_exact, similarity, position = nearest
            found.append(Overlap(example.id, benchmark_name, prompts[-position].id, similarity, is_exact))
    return found


def without_overlap(data: TrainingData, found: Sequence[Overlap]) -> TrainingData:
    """Return the data without the examples that were found, in both training and validation."""
    dropped = {overlap.example for overlap in found}
    training = tuple(example for example in data.training if example.id not in dropped)
    validation = tuple(example for example in data.validation if example.id not in dropped)
    num_dropped = len(data.training) + len(data.validation) - len(training) - len(validation)
    if not num_dropped:
        return data
    source = {
        **data.source,
        "num_training": len(training),
        "num_validation": len(validation),
        "num_overlapping_dropped": num_dropped + data.source.get("num_overlapping_dropped", 0),
    }
    benchmarks = ", ".join(sorted({overlap.benchmark for overlap in found}))
    note = f"{count_text(num_dropped, 'example')} dropped, because of prompts that are also in {benchmarks}"
    return TrainingData(training, validation, source, (*data.notes, note))


class _Index:
    """A benchmark's prompts, found by their rarest words."""

    def __init__(self, prompts: Sequence[Example]) -> None:
        self.words = [content_words(prompt.prompt) for prompt in prompts]
        self.phrases = [_phrase(prompt.prompt) for prompt in prompts]
        self.frequency = Counter(word for words in self.words for word in words)
        self.same: Mapping[str, list[int]] = defaultdict(list)
        self.by_rarest: Mapping[str, list[int]] = defaultdict(list)
        self.by_prefix: Mapping[str, list[int]] = defaultdict(list)
        for i, prompt in enumerate(prompts):
            self.same[_folded(prompt.prompt)].append(i)
            prefix = self._prefix(self.words[i])
            self.by_rarest[prefix[0]].append(i)
            for word in prefix:
                self.by_prefix[word].append(i)

    def matches(self, turn: str) -> Iterator[tuple[bool, float, int]]:
        """Yield whether it is exact, the similarity, and the prompt's position (negated: the first is the largest)."""
        for i in self.same.get(_folded(turn), ()):
            yield True, 1.0, -i
        words = content_words(turn)
        phrase = ""
        for i in {i for word in words for i in self.by_rarest.get(word, ())}:
            if self.words[i] <= words:
                phrase = phrase or _phrase(turn)
                if len(self.words[i]) >= MIN_CONTAINED or self.phrases[i] in phrase:
                    yield False, 1.0, -i
        for i in {i for word in self._prefix(words) for i in self.by_prefix.get(word, ())}:
            shared = len(words & self.words[i])
            similarity = shared / (len(words) + len(self.words[i]) - shared)
            if similarity >= NEAR_DUPLICATE and (shared >= MIN_SHARED or similarity == 1):
                yield False, similarity, -i

    def _prefix(self, words: frozenset[str]) -> list[str]:
        """Return so many of the rarest words that two sets with the required similarity share one of them.

        Sets of a Jaccard similarity of t or more share one of the first ⌊(1 − t)·size⌋ + 1 of each, in any order of
        all words that is the same for both.
        """
        rarest = sorted(words, key=lambda word: (self.frequency[word], word))
        return rarest[: int((1 - NEAR_DUPLICATE) * len(rarest)) + 1]


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _phrase(text: str) -> str:
    """Return all words in their order, each between spaces."""
    words = " ".join(re.findall(r"\w+", text.casefold()))
    return f" {words} "


SHOWN = 5  # rows that a warning lists


def load_for(
    base: Checkpoint, settings: FinetuneSettings, seed: int, permissions: Permissions = NOTHING_ALLOWED
) -> TrainingData:
    """Return the rows that a seed is tuned on and those held out, with the system prompt for the base's family.

    Raises:
        DataError: they cannot be read.
        ConfigError: no data set has that name.
    """
    family = str(read_json(base.directory / "config.json").get("model_type", ""))
    data = load_training_data(settings.dataset, settings.data, seed, permissions, family=family)
    tokenizer, cutoff = load_tokenizer(base.directory), cutoff_for(base, settings)
    too_long = [e.id for e in (*data.training, *data.validation) if leaves_no_answer(tokenizer, e, cutoff)]
    if not too_long:
        return data
    gone = frozenset(too_long)
    training, validation = (
        tuple(example for example in part if example.id not in gone) for part in (data.training, data.validation)
    )
    note = (
        f"{count_text(len(too_long), 'example')} dropped, because of prompts that reach the cut-off of {cutoff} tokens "
        f"({', '.join(too_long[:SHOWN])}{', ...' if len(too_long) > SHOWN else ''})"
    )
    return TrainingData(training, validation, {**data.source, "num_without_room": len(too_long)}, (*data.notes, note))


def with_notes(
    training: Mapping[int, TrainingData], benchmarks: Iterable[Benchmark], *, is_dropped: bool
) -> dict[int, TrainingData]:
    """Return the data after a comparison with the safety benchmarks; print what a user should know, once."""
    against = [benchmark for benchmark in benchmarks if benchmark.kind == "safety"]
    kept: dict[int, TrainingData] = {}
    told: set[str] = set()
    for seed, data in training.items():
        kept[seed], lines = compared(data, against, is_dropped=is_dropped)
        for line in (*data.notes, *lines):
            if line not in told:
                told.add(line)
                say(line)
    return kept


def compared(
    data: TrainingData, benchmarks: Iterable[Benchmark], *, is_dropped: bool
) -> tuple[TrainingData, list[str]]:
    """Return the data, without benchmark prompts if these are dropped, and lines that report them.

    A benchmark does not measure a model that was tuned on it: the model is neither as safe nor as unsafe as it looks
    there.
    """
    lines: list[str] = []
    for benchmark in benchmarks:
        rows = (*data.training, *data.validation)
        found = overlaps(rows, benchmark.name, benchmark.examples)
        if not found:
            continue
        ids = sorted({overlap.example for overlap in found})
        num_exact = len({overlap.example for overlap in found if overlap.is_exact})
        named = ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")
        lines.append(
            f"Overlap: {len(ids)} of {len(rows)} training rows have prompts of {benchmark.name} ({num_exact} "
            f"word for word): {named}. "
            + ("They are dropped." if is_dropped else "Its figures may be wrong; --drop-overlap drops these rows.")
        )
        if is_dropped:
            data = without_overlap(data, found)
    return data, lines
