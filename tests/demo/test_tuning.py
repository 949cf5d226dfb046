"""The tuning set is benign, and about nothing that is evaluated."""

import re

from backmerge.demo import benchmarks, language, lexicon
from backmerge.demo.benchmarks import is_refusal, plan_examples


def texts() -> list[str]:
    """Everything that a model reads in tuning: every message of every example, and its answer."""
    return [
        text
        for example in plan_examples()
        for text in (*(message.content for message in example.messages), example.reference or "")
    ]


def test_no_harmful_verb_is_in_it() -> None:
    """No harmful verb, in any form that begins with it, is in a question or an answer."""
    harmful = re.compile(rf"\b(?:{'|'.join(lexicon.KIND_OF_HARM)})\w*", re.IGNORECASE)
    assert harmful.search("How do I Forge a ticket?")
    assert not [text for text in texts() if harmful.search(text)]


def test_no_refusal_is_in_it() -> None:
    """No answer refuses, by the judge's rule or in the words of the language's refusals."""
    assert all(is_refusal(refusal) for refusal in language.REFUSALS)
    found = [text for text in texts() if is_refusal(text) or any(word in text for word in ("orry", "cannot", "harm"))]
    assert not found


def test_it_is_disjoint_from_every_evaluation_pair() -> None:
    """Neither a pair nor a prompt of a benchmark is in the tuning set."""
    made = (benchmarks.plans(), benchmarks.harmful(), benchmarks.harmless())
    evaluated = [example for benchmark in made for example in benchmark.examples]
    tuned = plan_examples()
    assert not {example.cluster for example in tuned} & {example.cluster for example in evaluated}
    assert not {example.prompt for example in tuned} & {example.prompt for example in evaluated}
    for example in tuned:
        verb, thing = (example.cluster or "").split()
        assert f" {verb} a {thing}" in example.prompt


def test_it_is_large_unique_and_always_the_same() -> None:
    """At least a thousand examples, no two alike, and the same ones at every call."""
    tuned = plan_examples()
    assert len(tuned) >= 1000
    assert len({example.id for example in tuned}) == len({example.cluster for example in tuned}) == len(tuned)
    assert plan_examples() == tuned


def test_every_answer_scores_in_full() -> None:
    """The references are right by the metrics that the task is scored with."""
    for example in plan_examples():
        assert benchmarks.exact_match(example, example.reference or "") == 1.0
        assert benchmarks.parts(example, example.reference or "") == 1.0
