"""Score merges on the rows that tuning held out: the metric of each data set, and the benchmark of its rows.

The paper does not say which metric it validates with; these are ours, and none of them uses a test set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from backmerge.benchmarks.bertscore import DEFAULT_MODEL, BertScorer
from backmerge.benchmarks.matching import is_final_answer
from backmerge.benchmarks.metrics import BertScoreF1, PerAnswer
from backmerge.benchmarks.protocol import Benchmark, ScoreTable
from backmerge.generation.chat import render
from backmerge.generation.protocol import LogLikelihood
from backmerge.records import Example, Message

Metric = Literal["loss", "accuracy", "bertscore"]
NAME = "validation"


class Measure(NamedTuple):
    """How answers to held-out rows are scored.

    Attributes:
        metric: `loss`: the rows' own answers, by their likelihood. `accuracy`: generated answers, by their final
            answer. `bertscore`: generated answers, by BERTScore F1 with the rows' own.
        max_new_tokens: Generation limit.
        repetition_penalty: That of the task's benchmark.
    """

    metric: Metric
    max_new_tokens: int = 512
    repetition_penalty: float = 1.0


# one line for each task; others, such as the user's own data, are validated by loss
MEASURES: Mapping[str, Measure] = {
    "reasoning": Measure("accuracy"),
    "medical": Measure("bertscore", repetition_penalty=1.2),
    "tools": Measure("bertscore", max_new_tokens=256),
    "code": Measure("loss"),  # HumanEval would leak the test
}


class Encoder(NamedTuple):
    """The encoder of BERTScore.

    Attributes:
        model: A folder or a hub id.
        layer: The layer whose output is used; by the model's name if `None`.
    """

    model: str = DEFAULT_MODEL
    layer: int | None = None


def measure_of(dataset: str, asked: Literal["auto", "loss", "accuracy", "bertscore", "none"]) -> Measure | None:
    """Return the requested measure, with the limits of the data set's own task; `auto` is that task's own metric.

    Args:
        dataset: The name of a preset, or the user's own data.
        asked: The setting `choice.validation`.
    """
    own = MEASURES.get(dataset, Measure("loss"))
    if asked == "none":
        return None
    return own if asked == "auto" else own._replace(metric=asked)


def validation_benchmark(
    measure: Measure, examples: Sequence[Example], tokenizer: Any, cutoff: int, encoder: Encoder
) -> Benchmark:
    """Return held-out rows as a benchmark. Answers are greedy.

    Args:
        measure: How they are scored.
        examples: The rows, with their answers as references.
        tokenizer: The base's tokenizer.
        cutoff: Longest example in tokens, as in training; the end of a longer one is ignored.
        encoder: The encoder for BERTScore.

    Raises:
        ConfigError: the encoder's layer is not known.
    """
    if measure.metric == "loss":
        likelihood = AnswerLikelihood(tokenizer, examples, cutoff)
        return Benchmark(NAME, "utility", tuple(examples), 1, likelihood, choices=likelihood)
    return Benchmark(
        NAME,
        "utility",
        tuple(examples),
        measure.max_new_tokens,
        PerAnswer({"accuracy": is_final_answer}) if measure.metric == "accuracy" else BertScoreF1(BertScorer(*encoder)),
        {"temperature": 0.0, "repetition_penalty": measure.repetition_penalty, "num_samples": 1},
    )


class AnswerLikelihood:
    """The mean log-likelihood per token of an example's answers, in nats: minus its training loss; higher is better.

    In a conversation all of the assistant's turns are answers, as in training, and so is the token that ends a turn.
    Prompts are rendered as in training. The tokens also equal training's if an answer does not begin with white space,
    and the template begins with the token that the tokenizer puts before texts, if there is one: likelihoods are
    computed from texts, so white space at the end of a prompt is scored with the answer, and then subtracted.

    Args:
        tokenizer: The base's tokenizer.
        examples: The examples that may be used.
        cutoff: In tokens.
    """

    metrics = ("log_likelihood",)

    def __init__(self, tokenizer: Any, examples: Sequence[Example], cutoff: int) -> None:
        self._tokenizer, self._examples, self._cutoff = tokenizer, examples, cutoff

    @property
    def identity(self) -> str:
        """The version, and the cut-off."""
        return f"log_likelihood/1/{self._cutoff}"

    def __call__(
        self,
        examples: Sequence[Example],
        answers: Sequence[Sequence[str]],  # noqa: ARG002 - none is asked for
        advance: Callable[[int], None],  # noqa: ARG002
    ) -> ScoreTable:
        """Return nothing: generated answers are not used."""
        return {"log_likelihood": [None] * len(examples)}

    def pairs(self, tokenizer: Any, examples: Sequence[Example]) -> list[tuple[str, str]]:  # noqa: ARG002 - the base's
        """Return contexts and continuations: prompts and answers, and prompts and the white space at their end."""
        return [term.pair for example in examples for term in self._terms[example.id]]

    def score(self, examples: Sequence[Example], found: Sequence[LogLikelihood]) -> ScoreTable:
        """Return the mean per token of each example; `None` for one without a token."""
        left = iter(found)
        return {"log_likelihood": [_mean([(t.sign, next(left)) for t in self._terms[e.id]]) for e in examples]}

    @cached_property
    def _terms(self) -> dict[str, list[_Term]]:
        return {example.id: list(_terms(self._tokenizer, example, self._cutoff)) for example in self._examples}


class _Term(NamedTuple):
    """A likelihood that is added, or subtracted (-1)."""

    sign: int
    pair: tuple[str, str]


def _terms(tokenizer: Any, example: Example, cutoff: int) -> Iterator[_Term]:
    turns = (*example.messages, Message("assistant", example.reference or ""))
    used, seen = 0, ""
    for place in [number for number, turn in enumerate(turns) if turn.role == "assistant"]:
        prompt = render(tokenizer, turns[:place])
        whole = render(tokenizer, turns[: place + 1], answer_follows=False)
        used += _num_tokens(tokenizer, prompt[len(seen) :])
        answer = _beginning(tokenizer, whole[len(prompt) :], cutoff - used)
        if answer:
            yield _Term(1, (prompt, answer))
            bare = prompt.rstrip()
            if _num_tokens(tokenizer, prompt) > _num_tokens(tokenizer, bare):
                yield _Term(-1, (bare, prompt[len(bare) :]))
        used += _num_tokens(tokenizer, whole[len(prompt) :])
        seen = whole


def _beginning(tokenizer: Any, text: str, size: int) -> str:
    """Return the beginning of a text that `size` tokens cover, without a partial last character."""
    if size <= 0:
        return ""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) <= size:
        return text
    decoded = tokenizer.decode(ids[:size], clean_up_tokenization_spaces=False)
    return "".join(one for one, _ in takewhile(lambda both: both[0] == both[1], zip(text, decoded, strict=False)))


def _num_tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _mean(terms: Sequence[tuple[int, LogLikelihood]]) -> float | None:
    num_tokens = sum(sign * one.num_tokens for sign, one in terms)
    return sum(sign * one.total for sign, one in terms) / num_tokens if num_tokens > 0 else None
