"""Completions do not depend on which prompts are asked together (DESIGN.md, law 10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import benchmarks, language, model_directory
from backmerge.generation import transformers_engine
from backmerge.generation.protocol import EngineSettings, Sampling
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.merging.recipe import Variant
from backmerge.progress import Bar
from backmerge.records import Example, Message

Ids = tuple[int, ...]

# Float32 logits of about ten in size differ by some ulps (1e-6 each) when the batch, and so the order of a sum,
# changes; law 10 excuses a divergence where the two best tokens were this close.
CLOSE = 1e-4
MAX_EXCUSED = 0.01  # share of the prompts
SIZES = (7, 64, 200)


class Recording(TransformersEngine):
    """Remembers the token ids of each prompt's answer."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(EngineSettings(device="cpu", dtype="float32", batch_size=batch_size))
        self.answers: dict[Ids, Ids] = {}

    def _batch(self, prompts: Sequence[list[int]], sampling: Sampling, shown: Bar) -> list[tuple[list[int], bool]]:
        answers = super()._batch(prompts, sampling, shown)
        self.answers.update({tuple(prompt): tuple(ids) for prompt, (ids, _) in zip(prompts, answers, strict=True)})
        return answers


def prompts() -> list[Example]:
    """Prompts of 5 to 60 tokens: plans, harmful requests, words to say again, with a system text or without."""
    found = [*benchmarks.plans().examples[:25], *benchmarks.harmful().examples[:25]]
    words = ["paste", "kitchen", "robot", "fence", "lamp", "ticket"]
    for number in range(1, 21):
        said = " ".join(words[(number * k) % len(words)] for k in range(2 * number))
        turns = [Message("user", f"Say: {said}")]
        if number % 2:
            turns.insert(0, Message("system", language.SYSTEM))
        found.append(Example(f"say-{number}", tuple(turns)))
    return found


def answers(batch_size: int, penalty: float, engine: Recording | None = None) -> Mapping[Ids, Ids]:
    """Token ids of the prompts' answers, greedy."""
    engine = engine or Recording(batch_size)
    sampling = Sampling(max_new_tokens=40, repetition_penalty=penalty)
    engine.generate(Variant(Checkpoint(model_directory())), prompts(), sampling, lambda _: None)
    return engine.answers


@pytest.fixture(scope="module")
def alone() -> Recording:
    """An engine that asks one prompt at a time: nothing is padded."""
    return Recording(1)


@pytest.fixture(scope="module")
def one_at_a_time(alone: Recording) -> dict[float, Mapping[Ids, Ids]]:
    """Answers without any padding, by repetition penalty."""
    found = {}
    for penalty in (1.0, 1.2):
        alone.answers = {}
        found[penalty] = answers(1, penalty, alone)
    return found


def gap(model: Any, prompt: Ids, said: Ids, penalty: float) -> float:
    """How far apart the two best logits for the next token are, from a forward pass over this prompt alone."""
    ids = torch.tensor([[*prompt, *said]])
    with torch.inference_mode():
        logits = model(ids).logits[:, -1].float()
    logits = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    best, second = logits[0].topk(2).values.tolist()
    return float(best - second)


def divergences(
    model: Any, expected: Mapping[Ids, Ids], found: Mapping[Ids, Ids], penalty: float
) -> tuple[list[Ids], list[Ids]]:
    """Prompts whose answers differ: those excused by two close logits where they part, and the others."""
    assert expected.keys() == found.keys()
    excused: list[Ids] = []
    wrong: list[Ids] = []
    for prompt, one in expected.items():
        other = found[prompt]
        if one == other:
            continue
        start = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        (excused if gap(model, prompt, one[:start], penalty) < CLOSE else wrong).append(prompt)
    return excused, wrong


@pytest.mark.parametrize("penalty", [1.0, 1.2])
@pytest.mark.parametrize("batch_size", SIZES)
def test_same_answers_at_any_batch_size(
    alone: Recording, one_at_a_time: dict[float, Mapping[Ids, Ids]], batch_size: int, penalty: float
) -> None:
    """On a CPU in float32 a batch gives what single prompts give, with and without a repetition penalty."""
    expected = one_at_a_time[penalty]
    assert len(expected) >= 60
    assert len({len(prompt) for prompt in expected}) >= 15
    excused, wrong = divergences(alone.model, expected, answers(batch_size, penalty), penalty)
    assert not wrong
    assert len(excused) <= MAX_EXCUSED * len(expected)


def test_a_penalty_changes_answers(one_at_a_time: dict[float, Mapping[Ids, Ids]]) -> None:
    """The penalty of the test above does something: words that are to be said again are among the prompts."""
    assert one_at_a_time[1.0] != one_at_a_time[1.2]


def test_padding_that_is_seen_is_found_out(
    alone: Recording, one_at_a_time: dict[float, Mapping[Ids, Ids]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an attention mask that lets padding through, answers differ, and no close call excuses them."""
    engine = Recording(64)
    engine._become(Variant(Checkpoint(model_directory())))
    generate = engine.model.generate

    def unmasked(*, attention_mask: torch.Tensor, **rest: Any) -> Any:
        return generate(attention_mask=torch.ones_like(attention_mask), **rest)

    monkeypatch.setattr(engine.model, "generate", unmasked)
    _, wrong = divergences(alone.model, one_at_a_time[1.0], answers(64, 1.0, engine), 1.0)
    assert wrong


def test_the_stock_penalty_is_found_out(
    alone: Recording, one_at_a_time: dict[float, Mapping[Ids, Ids]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With transformers' own processor, and an end of sequence that pads as in Llama 3, answers depend on the batch."""
    engine = Recording(64)
    engine._become(Variant(Checkpoint(model_directory())))
    engine.tokenizer.pad_token = engine.tokenizer.eos_token
    excused, wrong = divergences(alone.model, one_at_a_time[1.2], answers(64, 1.2, engine), 1.2)
    assert not wrong
    assert len(excused) <= MAX_EXCUSED * len(one_at_a_time[1.2])
    monkeypatch.setattr(
        transformers_engine,
        "UnpaddedRepetitionPenalty",
        lambda penalty, _: RepetitionPenaltyLogitsProcessor(penalty),
    )
    engine.answers = {}
    _, wrong = divergences(alone.model, one_at_a_time[1.2], answers(64, 1.2, engine), 1.2)
    assert wrong
