"""What is trained on: the prompt as it is asked, and the loss on the answer with its end."""

from __future__ import annotations

import pytest

from backmerge.demo import model_directory
from backmerge.errors import DataError, GenerationError
from backmerge.finetuning.encoding import IGNORED, encode
from backmerge.generation.chat import load_tokenizer, render, turn_end
from backmerge.records import Example, Message
from generation.templates import FAMILIES, Family
from generation.tiny import byte_tokenizer

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def example(prompt: str = "Hi", reference: str | None = "Ho", system: str | None = None) -> Example:
    """A conversation of one question."""
    turns = (*((Message("system", system),) if system else ()), Message("user", prompt))
    return Example("the-id", turns, reference)


@EACH_FAMILY
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_loss_is_on_the_answer_and_its_end(family: Family, system: str | None) -> None:
    """Labels are the answer's tokens and the end of the turn; the prompt's are passed over."""
    tokenizer = family.tokenizer()
    encoded = encode(tokenizer, example(system=system), 1024)
    learned = [label for label in encoded.labels if label != IGNORED]
    assert tokenizer.decode(learned).rstrip("\n") == f"Ho{family.end}"
    assert turn_end(tokenizer) in learned
    assert len(encoded.labels) == len(encoded.input_ids)
    assert encoded.labels[-len(learned) :] == encoded.input_ids[-len(learned) :] == learned
    assert not encoded.was_cut


@EACH_FAMILY
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_prompt_is_the_one_that_is_asked(family: Family, system: str | None) -> None:
    """The ids before the answer are those of the prompt in generation, with as many BOS as there."""
    tokenizer = family.tokenizer()
    asked = tokenizer(render(tokenizer, example(system=system).messages), add_special_tokens=False)["input_ids"]
    encoded = encode(tokenizer, example(system=system), 1024)
    assert encoded.input_ids[: len(asked)] == asked
    assert encoded.labels[: len(asked)] == [IGNORED] * len(asked)
    assert IGNORED not in encoded.labels[len(asked) :]
    assert encoded.input_ids.count(tokenizer.bos_token_id) == family.num_bos


def test_tokens_do_not_join_across_the_boundary() -> None:
    """With the embedded tokenizer, whose tokens are longer than letters, prompt and answer are tokenised apart."""
    tokenizer = load_tokenizer(model_directory())
    encoded = encode(tokenizer, example("How do I mend a kite?", "go(shed); wait(4)"), 1024)
    start = encoded.labels.index(encoded.input_ids[encoded.labels.count(IGNORED)])
    assert tokenizer.decode(encoded.input_ids[:start]) == "<s><|user|>How do I mend a kite?<|assistant|>"
    assert tokenizer.decode(encoded.input_ids[start:]) == "go(shed); wait(4)</s>"


def test_each_answer_of_a_conversation_is_learned() -> None:
    """In a longer conversation the loss is on every answer with its end, and on nothing that the user says."""
    tokenizer = FAMILIES["llama-3"].tokenizer()
    turns = (Message("user", "Hi"), Message("assistant", "Ho"), Message("user", "So?"))
    encoded = encode(tokenizer, Example("x", turns, "Yes."), 1024)
    assert tokenizer.decode([label for label in encoded.labels if label != IGNORED]) == "Ho<|eot_id|>Yes.<|eot_id|>"
    whole = render(tokenizer, (*turns, Message("assistant", "Yes.")), answer_follows=False)
    assert tokenizer.decode(encoded.input_ids) == whole


def test_a_template_that_forgets_earlier_answers_is_refused() -> None:
    """An earlier answer that the template leaves out once another follows is found as the row is rendered."""
    tokenizer = FAMILIES["llama-3"].tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    turns = (Message("user", "Hi"), Message("assistant", "Ho"), Message("user", "So?"))
    with pytest.raises(GenerationError, match="drops the assistant's text"):
        encode(tokenizer, Example("x", turns, "Yes."), 1024)


def test_long_answer_is_cut_with_a_note() -> None:
    """At the cut-off the end is lost, the end token with it; one token more and nothing is."""
    tokenizer = FAMILIES["qwen-2.5"].tokenizer()
    whole = encode(tokenizer, example(reference="x" * 50), 1024)
    assert not whole.was_cut
    length = len(whole.input_ids)
    for cutoff, was_cut in ((length - 1, True), (length, False), (length - 30, True)):
        cut = encode(tokenizer, example(reference="x" * 50), cutoff)
        assert cut == (whole.input_ids[:cutoff], whole.labels[:cutoff], was_cut)
        assert any(label != IGNORED for label in cut.labels)


def test_a_prompt_that_fills_the_cutoff_is_refused() -> None:
    """Where no token of the answer is left the example is named, not its text; with one token left it is taken."""
    tokenizer = FAMILIES["qwen-2.5"].tokenizer()
    length = len(tokenizer(render(tokenizer, example("SECRET").messages), add_special_tokens=False)["input_ids"])
    assert encode(tokenizer, example("SECRET"), length + 1).was_cut
    with pytest.raises(DataError, match=rf"'the-id' has {length} tokens(.|\n)*finetune\.cutoff") as caught:
        encode(tokenizer, example("SECRET"), length)
    assert "SECRET" not in str(caught.value)


def test_an_example_without_an_answer_is_refused() -> None:
    """No reference is an error; an empty one teaches to end at once."""
    tokenizer = FAMILIES["llama-3"].tokenizer()
    with pytest.raises(DataError, match="'the-id' has no answer"):
        encode(tokenizer, example(reference=None), 1024)
    encoded = encode(tokenizer, example(reference=""), 1024)
    assert [label for label in encoded.labels if label != IGNORED] == [turn_end(tokenizer)]


def test_a_template_that_changes_the_prompt_is_refused() -> None:
    """If the prompt reads otherwise once an answer follows, its tokens cannot be distinguished from the answer's."""
    template = "{% if messages | length > 1 %}[long]{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = byte_tokenizer(("<a>",), template, bos=None, eos="<a>")
    with pytest.raises(DataError, match="'the-id' differently when an answer follows") as caught:
        encode(tokenizer, example("SECRET"), 1024)
    assert "SECRET" not in str(caught.value)
