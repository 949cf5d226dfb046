"""The small tasks that stand in for the paper's: like demo-plans in all but the form of the answer."""

import pytest

from backmerge.demo import benchmarks, lexicon
from backmerge.demo.stand_ins import ADVICE, PROGRAMS, STEPS, Form
from backmerge.registry import BENCHMARKS, DATASETS, resolve

FORMS = {form.name: form for form in (STEPS, ADVICE, PROGRAMS)}


@pytest.mark.parametrize("name", FORMS)
def test_they_are_tuned_and_asked_on_the_pairs_of_plans(name: str) -> None:
    """As many examples on the same pairs, nothing harmful, and no pair in both."""
    examples, plans = resolve(DATASETS, name)(), benchmarks.plan_examples()
    benchmark = resolve(BENCHMARKS, name)()
    assert [example.cluster for example in examples] == [example.cluster for example in plans]
    assert [e.messages for e in benchmark.examples] == [e.messages for e in benchmarks.plans().examples]
    assert not {e.cluster for e in examples} & {e.cluster for e in benchmark.examples}
    assert not any(verb in (e.cluster or "").split() for e in examples for verb in lexicon.KIND_OF_HARM)
    assert len({e.id for e in (*examples, *benchmark.examples)}) == len(examples) + len(benchmark.examples)


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_answers_are_scored_by_their_parts(form: Form) -> None:
    """All of it is 1; nothing of it is 0; the first part alone is one of so many."""
    benchmark = resolve(BENCHMARKS, form.name)()
    assert benchmark.scorer is not None
    examples = benchmark.examples[:3]
    parts = [(example.reference or "").split(form.separator) for example in examples]
    whole, none, first = (
        benchmark.scorer(examples, [[text] for text in texts], lambda _: None)
        for texts in (
            [example.reference or "" for example in examples],
            ["Sorry, I cannot help with that."] * 3,
            [given[0] for given in parts],
        )
    )
    assert benchmark.scorer.metrics[0] == "parts"
    assert whole["parts"] == whole["exact_match"] == [1.0] * 3
    assert none["parts"] == none["exact_match"] == [0.0] * 3
    assert first["parts"] == pytest.approx([1 / len(given) for given in parts])
    assert first["exact_match"] == [0.0] * 3


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_an_answer_fits_its_limit(form: Form) -> None:
    """The longest answer ends within the benchmark's limit, by the embedded model's own tokens."""
    from backmerge.demo import model_directory
    from backmerge.generation.chat import load_tokenizer

    tokenizer = load_tokenizer(model_directory())
    benchmark = resolve(BENCHMARKS, form.name)()
    longest = max(len(tokenizer(example.reference)["input_ids"]) for example in benchmark.examples)
    assert longest < benchmark.max_new_tokens


def test_the_worked_examples_are_right() -> None:
    """What the docstrings show, by hand."""
    pair = lexicon.Pair("mend", "kite")
    for form in FORMS.values():
        shown = (form.answer.__doc__ or "").split('"')[1]
        assert shown == form.answer(pair)
