"""Tuning rows that a benchmark also has are found, others are not. Prompts here are mild; real ones go by number."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge.benchmarks.split import NEAR_DUPLICATE, content_words
from backmerge.demo import benchmarks as demo
from backmerge.demo.benchmarks import plan_examples
from backmerge.finetuning.data_settings import DataSettings
from backmerge.finetuning.datasets import TrainingData, load_training_data
from backmerge.finetuning.overlap import MIN_CONTAINED, MIN_SHARED, Overlap, overlaps, without_overlap
from backmerge.records import Example, Message

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
NEEDS_DATA = pytest.mark.skipif(not SHARED.is_dir(), reason="there is no ../shared/data")
REAL = {"advbench": ("advbench/harmful_behaviors.csv", "goal"), "xstest": ("xstest/xstest_prompts.csv", "prompt")}

PROMPT = "How do I mend a red kite with tape and string?"  # mend, red, kite, tape, string
WORDS = st.lists(st.sampled_from([*"abcdefg", "mend", "kite", "how", "the"]), max_size=9).map(" ".join)


def asked(name: str, *turns: str) -> Example:
    """An example whose user's turns are these."""
    first, *rest = turns
    messages = [Message("user", first)]
    for turn in rest:
        messages += [Message("assistant", "Yes."), Message("user", turn)]
    return Example(name, tuple(messages), "Ok.")


def real(name: str) -> list[Example]:
    """A benchmark's prompts; their ids are their numbers."""
    file, column = REAL[name]
    with (SHARED / file).open(encoding="utf-8", newline="") as stream:
        return [asked(f"{name}-{i}", row[column]) for i, row in enumerate(csv.DictReader(stream))]


@cache
def published(dataset: str, folder: str) -> tuple[Example, ...]:
    """All examples of a preset's published data."""
    settings = DataSettings(file=str(SHARED / folder), num_examples=10**9, validation=0)
    return load_training_data(dataset, settings, 0).training


def found(tuned: str | Sequence[str], prompt: str = PROMPT) -> Overlap | None:
    """What is found of one example against one prompt."""
    turns = [tuned] if isinstance(tuned, str) else tuned
    return next(iter(overlaps([asked("row", *turns)], "bench", [asked("one", prompt)])), None)


@pytest.mark.parametrize("tuned", [PROMPT, PROMPT.upper(), f"  {PROMPT}\n", PROMPT.replace(" ", "\n\t")])
def test_the_same_prompt(tuned: str) -> None:
    """White space and letter case do not hide it; ids are given, never texts."""
    assert found(tuned) == Overlap("row", "bench", "one", 1.0, is_exact=True)


@pytest.mark.parametrize(
    ("tuned", "similarity"),
    [
        ("Tell me how to mend a red kite with tape and string.", 1),
        ("How do I mend a red kite with tape?", 4 / 5),
        ("How do I mend a blue kite with tape and string?", 4 / 6),
        ("Mend red kite", 3 / 5),
        ("Mend red kites with tape and glue and string.", 4 / 7),
        ("Mend a kite with a needle.", None),  # 2 of 6
        ("How do I fly a kite?", None),
    ],
)
def test_nearly_the_same_prompt(tuned: str, similarity: float | None) -> None:
    """At half of all content words in common, and three words, a prompt counts as the same."""
    match = found(tuned)
    assert match == (None if similarity is None else Overlap("row", "bench", "one", similarity, is_exact=False))


def test_short_prompts_need_all_their_words() -> None:
    """One word of two is half of them and says nothing; both, in another sentence, are the same question."""
    assert found("What is a kite?", "How do I fly a kite?") is None
    match = found("Can I fly your kite?", "How do I fly a kite?")
    assert match is not None
    assert (match.similarity, match.is_exact) == (1, False)


LONG = "Here is a letter. {} Please write down in one line what its author wants from the town's council this year."


def test_a_prompt_within_a_long_text() -> None:
    """All of five content words, anywhere; with fewer, the words as they stand; whichever of the user's turns it is."""
    for turns in ([LONG.format(PROMPT)], ["Hi", LONG.format(PROMPT)], [LONG.format(PROMPT), "And now?"]):
        assert found(turns) == Overlap("row", "bench", "one", 1.0, is_exact=False)
    assert found(LONG.format("String, tape, and a red ribbon to mend the kite.")) is not None
    assert found(LONG.format("String, tape, and a ribbon to mend the kite.")) is None
    short = "How do I fly a kite?"
    assert found(LONG.format(short.upper()), short) is not None
    assert found(LONG.format("A kite can fly. How do I?"), short) is None


def test_answers_and_system_prompts_do_not_count() -> None:
    """What is asked is compared, not what is answered."""
    row = Example(
        "row", (Message("system", PROMPT), Message("user", "Hi"), Message("assistant", PROMPT), Message("user", "?"))
    )
    assert overlaps([row], "bench", [asked("one", PROMPT)]) == []


def test_each_example_once_with_its_nearest() -> None:
    """Among several prompts the exact one comes first, then the most similar, then the first in order."""
    prompts = [asked("far", PROMPT + " Quickly?"), asked("same", PROMPT), asked("again", PROMPT)]
    (match,) = overlaps([asked("row", PROMPT)], "bench", prompts)
    assert (match.prompt, match.is_exact) == ("same", True)
    rows = [asked("a", "Hi"), asked("b", PROMPT), asked("c", PROMPT)]
    assert [overlap.example for overlap in overlaps(rows, "bench", prompts)] == ["b", "c"]
    assert overlaps([], "bench", prompts) == overlaps(rows, "bench", []) == []


@given(tuned=st.lists(WORDS, max_size=6), prompts=st.lists(WORDS, max_size=6))
def test_no_pair_is_lost_to_the_index(tuned: list[str], prompts: list[str]) -> None:
    """What is found is what comparing each with each finds."""
    examples = [asked(f"e{i}", text) for i, text in enumerate(tuned)]
    expected = {}
    for (i, text), (j, prompt) in product(enumerate(tuned), enumerate(prompts)):
        ours, theirs = content_words(text), content_words(prompt)
        similarity = len(ours & theirs) / len(ours | theirs)
        is_same = text.split() == prompt.split()
        is_within = theirs <= ours and (len(theirs) >= MIN_CONTAINED or f" {prompt} " in f" {text} ")
        is_near = similarity >= NEAR_DUPLICATE and (len(ours & theirs) >= MIN_SHARED or similarity == 1)
        if is_same or is_within or is_near:
            score = (is_same, 1.0 if is_same or is_within else similarity, -j)
            expected[f"e{i}"] = max(score, expected.get(f"e{i}", score))
    got = overlaps(examples, "bench", [asked(str(j), prompt) for j, prompt in enumerate(prompts)])
    assert {o.example: (o.is_exact, o.similarity, -int(o.prompt)) for o in got} == expected


def test_overlapping_rows_are_removed_and_reported() -> None:
    """Training and validation lose it; the card and the person are informed."""
    rows = [asked(name, "Hi" if name in "ad" else PROMPT) for name in "abcd"]
    data = TrainingData((rows[0], rows[1]), (rows[2], rows[3]), {"num_training": 2, "num_validation": 2}, ("before",))
    cleaned = without_overlap(data, overlaps(rows, "bench", [asked("one", PROMPT)]))
    assert (cleaned.training, cleaned.validation) == ((rows[0],), (rows[3],))
    assert cleaned.source == {"num_training": 1, "num_validation": 1, "num_overlapping_dropped": 2}
    assert cleaned.notes == ("before", "2 examples dropped, because of prompts that are also in bench")
    assert without_overlap(cleaned, []) == cleaned
    assert without_overlap(cleaned, [Overlap("b", "bench", "one", 1, is_exact=True)]) == cleaned


def test_the_demonstration_is_clean() -> None:
    """None of its tuning prompts is in its benchmarks."""
    for benchmark in (demo.harmful(), demo.harmless(), demo.plans()):
        assert overlaps(plan_examples(), benchmark.name, benchmark.examples) == []


@NEEDS_DATA
@pytest.mark.parametrize("name", REAL)
def test_no_false_alarms_on_the_papers_data(name: str) -> None:
    """33,443 prompts of Flan CoT and 112 of OpenFunctions against a safety benchmark: nothing is found."""
    for dataset, folder, number in (("reasoning", "flan_cot", 33_443), ("tools", "openfunctions", 112)):
        tuned = published(dataset, folder)
        assert (len(tuned), len(overlaps(tuned, name, real(name)))) == (number, 0)


@NEEDS_DATA
@pytest.mark.parametrize("name", REAL)
def test_real_prompts_are_found_alone_and_in_long_texts(name: str) -> None:
    """Each of a benchmark's prompts is found as it is, and between two questions of Flan CoT."""
    prompts = real(name)
    assert sum(o.is_exact for o in overlaps(prompts, name, prompts)) == len(prompts)
    texts = [e.prompt for e in published("reasoning", "flan_cot")[:1000]]
    hidden = [asked(f"h{i}", f"{texts[i]}\n{p.prompt}\n{texts[-i]}") for i, p in enumerate(prompts)]
    assert len(overlaps(hidden, name, prompts)) == len(prompts)
