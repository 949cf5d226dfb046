"""The metric of each data set, and the likelihood of held-out answers: training's own tokens, whatever the template."""

from __future__ import annotations

from typing import Any

import pytest

from backmerge.benchmarks.matching import is_final_answer
from backmerge.demo import model_directory
from backmerge.finetuning.datasets import Task
from backmerge.finetuning.encoding import IGNORED, encode
from backmerge.finetuning.validation import (
    MEASURES,
    AnswerLikelihood,
    Encoder,
    Measure,
    measure_of,
    validation_benchmark,
)
from backmerge.generation.chat import load_tokenizer
from backmerge.generation.likelihood import row_of
from backmerge.generation.protocol import LogLikelihood
from backmerge.records import Example, Message
from backmerge.registry import DATASETS, resolve
from generation.templates import FAMILIES

TOKENIZERS = {**{name: family.tokenizer for name, family in FAMILIES.items()}, "demo": None}
CONVERSATIONS = {
    "one turn": Example("a", (Message("user", "Hi"),), "Ho ho."),
    "under a system prompt": Example("b", (Message("system", "Be brief."), Message("user", "Hi")), "Ho."),
    "several turns": Example(
        "c", (Message("user", "Hi"), Message("assistant", "Ho"), Message("user", "So?")), "Yes.\nIndeed."
    ),
}


def tokenizer_of(name: str) -> Any:
    """The family's, or the embedded model's."""
    make = TOKENIZERS[name]
    return load_tokenizer(model_directory()) if make is None else make()


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("family", TOKENIZERS)
def test_the_tokens_are_those_that_training_learns(family: str, kind: str) -> None:
    """Of every turn, cut wherever training cuts: the same ids before and within, and no other token counted."""
    tokenizer, example = tokenizer_of(family), CONVERSATIONS[kind]
    whole = encode(tokenizer, example, 1024)
    first = next(place for place, label in enumerate(whole.labels) if label != IGNORED)
    for cutoff in range(first + 1, len(whole.input_ids) + 2):
        encoded = encode(tokenizer, example, cutoff)
        likelihood = AnswerLikelihood(tokenizer, [example], cutoff)
        rows = [row_of(tokenizer, *pair, None) for pair in likelihood.pairs(tokenizer, [example])]
        assert all(ids == encoded.input_ids[: len(ids)] for ids, _ in rows)
        # each token's likelihood is its place: a sum tells which tokens it is of
        found = [LogLikelihood(sum(range(len(ids) - count, len(ids))), count, False) for ids, count in rows]
        learned = [place for place, label in enumerate(encoded.labels) if label != IGNORED]
        assert likelihood.score([example], found)["log_likelihood"] == [pytest.approx(sum(learned) / len(learned))]


def test_answers_are_cut_within_a_text_as_long_as_a_model_holds() -> None:
    """An answer longer than the cut-off is not a fault: its beginning is scored."""
    tokenizer = load_tokenizer(model_directory())
    example = Example("long", (Message("user", "How do I mend a kite?"),), "go(shed); " * 200)
    likelihood = AnswerLikelihood(tokenizer, [example], 64)
    longest = max(len(row_of(tokenizer, *pair, None)[0]) for pair in likelihood.pairs(tokenizer, [example]))
    assert longest == 64


def test_an_answer_that_fits_is_whole_though_its_tokens_forget_letter_case() -> None:
    """Where tokens do not spell their text, one that is not cut is taken as it stands."""
    from tokenizers import normalizers

    tokenizer = FAMILIES["qwen-2.5"].tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    example = CONVERSATIONS["one turn"]
    assert AnswerLikelihood(tokenizer, [example], 1024).pairs(tokenizer, [example])[0][1] == "Ho ho.<|im_end|>\n"


def test_generated_answers_do_not_affect_likelihoods() -> None:
    """As a scorer it leaves all unscored, and its identity tells where examples are cut."""
    example = CONVERSATIONS["one turn"]
    one, other = (AnswerLikelihood(None, [example], cutoff) for cutoff in (64, 128))
    assert one([example], [["Ho ho."]], lambda _: None) == {"log_likelihood": [None]}
    assert one.identity != other.identity


def test_every_task_has_its_metric() -> None:
    """A preset that is added to the table of data sets is given one here."""
    assert set(MEASURES) == {name for name in DATASETS.entries if isinstance(resolve(DATASETS, name)(), Task)}
    assert {name: measure.metric for name, measure in MEASURES.items()} == {
        "reasoning": "accuracy",
        "medical": "bertscore",
        "tools": "bertscore",
        "code": "loss",
    }


def test_what_is_asked_for_comes_before_the_task() -> None:
    """Data of one's own have loss; another metric keeps the task's limits; `none` is none."""
    assert measure_of("mine.jsonl", "auto") == Measure("loss")
    assert measure_of("medical", "auto") == Measure("bertscore", 512, 1.2)
    assert measure_of("medical", "accuracy") == Measure("accuracy", 512, 1.2)
    assert measure_of("mine.jsonl", "accuracy") == Measure("accuracy", 512, 1.0)
    assert measure_of("medical", "none") is None


def test_answers_are_greedy_under_the_tasks_limits() -> None:
    """Whatever the experiment's own sampling is, and with the metric first that λ is chosen on."""
    examples = list(CONVERSATIONS.values())
    made = validation_benchmark(Measure("accuracy", 99, 1.2), examples, None, 1024, Encoder())
    assert made.max_new_tokens == 99
    assert made.sampling == {"temperature": 0.0, "repetition_penalty": 1.2, "num_samples": 1}
    assert made.choices is None
    assert made.scorer is not None
    assert made.scorer.metrics == ("accuracy",)
    assert is_final_answer(examples[0], "Ho ho.") == 1
    assert validation_benchmark(Measure("bertscore"), examples, None, 1024, Encoder()).scorer is not None
