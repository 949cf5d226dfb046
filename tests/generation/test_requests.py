"""What the transformers engine can be asked next to one greedy answer: samples, stops, beginnings, raw texts, odds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import model_directory
from backmerge.errors import GenerationError
from backmerge.generation.chat import load_tokenizer, render
from backmerge.generation.loading import load_model
from backmerge.generation.protocol import EngineSettings, Sampling
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.merging.recipe import Variant
from backmerge.records import Completion, Example, Message

QUESTIONS = tuple(
    Example(f"q{i}", (Message("user", text),))
    for i, text in enumerate(("How do I mend a kite?", "How do I wash a cup?", "How do I forge a ticket?", "Hello!"))
)
GREEDY = Sampling(max_new_tokens=24)


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    """On the CPU, in float32, two prompts at once."""
    return TransformersEngine(EngineSettings(device="cpu", dtype="float32", batch_size=2))


@pytest.fixture(scope="module")
def variant() -> Variant:
    """The embedded model."""
    return Variant(Checkpoint(model_directory()))


def answered(engine: TransformersEngine, variant: Variant, sampling: Sampling, *examples: Example) -> list[Completion]:
    """The completions, with the steps told checked against the examples."""
    told: list[int] = []
    found = engine.generate(variant, examples, sampling, told.append)
    assert sum(told) == len(examples)
    return found


def test_samples_are_in_order(engine: TransformersEngine, variant: Variant) -> None:
    """Each prompt's samples follow one another, numbered; drawn ones differ, greedy ones do not."""
    drawn = Sampling(max_new_tokens=16, num_samples=3, temperature=1.5, seed=1)
    found = answered(engine, variant, drawn, *QUESTIONS)
    assert [(c.example, c.sample) for c in found] == [(q.id, s) for q in QUESTIONS for s in range(3)]
    assert len({c.text for c in found if c.example == "q3"}) > 1
    greedy = answered(engine, variant, GREEDY.model_copy(update={"num_samples": 2}), *QUESTIONS)
    plain = answered(engine, variant, GREEDY, *QUESTIONS)
    assert [c.text for c in greedy[::2]] == [c.text for c in greedy[1::2]] == [c.text for c in plain]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_stop_text_ends_an_answer(batch_size: int, variant: Variant) -> None:
    """It and what follows is cut off, and the tokens counted are those up to it, whatever else is in the batch."""
    engine = TransformersEngine(EngineSettings(device="cpu", dtype="float32", batch_size=batch_size))
    whole = answered(engine, variant, GREEDY, *QUESTIONS)
    stop = whole[0].text[8:12]
    found = answered(engine, variant, GREEDY.model_copy(update={"stop": (stop, "never said")}), *QUESTIONS)
    tokenizer = load_tokenizer(model_directory())
    for before, after in zip(whole, found, strict=True):
        if stop not in before.text:
            assert after == before
            continue
        assert after.text == before.text[: before.text.index(stop)]
        assert after.finished
        ids = tokenizer(before.text, add_special_tokens=False)["input_ids"]
        least = next(k for k in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:k]))
        assert after.num_tokens == least
    assert stop in whole[0].text


def test_a_beginning_is_gone_on_from(engine: TransformersEngine, variant: Variant) -> None:
    """What is put into the model's mouth is part of the prompt and of the answer; the model continues from there."""
    begun = Example("q0", QUESTIONS[0].messages, prefill="Sorry")
    (found,) = answered(engine, variant, GREEDY, begun)
    assert found.prompt.endswith("<|assistant|>Sorry")
    assert found.text.startswith("Sorry")
    (by_hand,) = answered(engine, variant, GREEDY, Example("x", (Message("user", found.prompt),), is_raw=True))
    assert found.text == "Sorry" + by_hand.text


def test_a_raw_text_gets_no_template(engine: TransformersEngine, variant: Variant) -> None:
    """It is seen as it is, with one beginning-of-sequence token; the template's own text gives the same answer."""
    tokenizer = load_tokenizer(model_directory())
    text = render(tokenizer, QUESTIONS[0].messages)
    raw = [Example("a", (Message("user", text),), is_raw=True)]
    raw.append(Example("b", (Message("user", text.removeprefix(tokenizer.bos_token)),), is_raw=True))
    found = answered(engine, variant, GREEDY, *raw, QUESTIONS[0])
    assert found[0].text == found[2].text
    assert (found[0].prompt, found[1].prompt) == (text, text.removeprefix(tokenizer.bos_token))


def test_likelihoods_by_hand(engine: TransformersEngine, variant: Variant) -> None:
    """The sum of the continuation's log-probabilities, in any batch and order; the likeliest tokens are greedy."""
    context = render(load_tokenizer(model_directory()), QUESTIONS[2].messages)
    (greedy,) = answered(engine, variant, GREEDY, QUESTIONS[2])
    pairs = [(context, greedy.text), (context, "go(shed)"), ("a ", "kite"), (context, "Sorry"), ("", "Sorry")]
    found = engine.log_likelihoods(variant, pairs, lambda _: None)
    tokenizer = load_tokenizer(model_directory())
    model = load_model(model_directory(), torch.float32).eval()
    for (before, after), one in zip(pairs, found, strict=True):
        asked = tokenizer(before.rstrip(), add_special_tokens=not before.startswith("<s>"))["input_ids"]
        whole = tokenizer(before + after, add_special_tokens=not before.startswith("<s>"))["input_ids"]
        if not asked:  # an empty context: the first token is predicted from the one that texts begin with
            asked, whole = [tokenizer.bos_token_id], [tokenizer.bos_token_id, *whole]
        with torch.inference_mode():
            odds = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), dim=-1)
        places = range(len(asked), len(whole))
        # float32 sums in another order, over 320 terms in three layers
        assert one.total == pytest.approx(sum(float(odds[p - 1, whole[p]]) for p in places), abs=1e-3)
        assert one.num_tokens == len(places)
        assert one.is_greedy == all(int(odds[p - 1].argmax()) == whole[p] for p in places)
    assert found[0].is_greedy
    assert not found[1].is_greedy
    assert engine.log_likelihoods(variant, pairs[1:2], lambda _: None)[0].total == pytest.approx(
        found[1].total, abs=1e-4
    )


def test_a_continuation_that_cannot_be_scored(engine: TransformersEngine, variant: Variant) -> None:
    """Nothing to score, or more than the context holds, is an error."""
    for continuation in ("", "kite " * 300):
        with pytest.raises(GenerationError, match="cannot be scored"):
            engine.log_likelihoods(variant, [("a", continuation)], lambda _: None)


def test_released_and_asked_again(variant: Variant) -> None:
    """Its memory is freed in between, and the answers are the same."""
    engine = TransformersEngine(EngineSettings(device="cpu", dtype="float32"))
    before = answered(engine, variant, GREEDY, *QUESTIONS)
    engine.release()
    assert engine.model is None
    assert answered(engine, variant, GREEDY, *QUESTIONS) == before


def test_a_prompt_too_long_names_itself(engine: TransformersEngine, variant: Variant, tmp_path: Path) -> None:
    """The error knows which example it is, so that a judge can go on with the others."""
    long = Example("long", (Message("user", "kite " * 400),))
    with pytest.raises(GenerationError, match="'long'") as caught:
        answered(engine, variant, GREEDY, QUESTIONS[0], long)
    assert caught.value.example == "long"
