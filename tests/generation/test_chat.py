"""Every model is asked in the words of its own template, with one beginning of sequence."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from backmerge.demo import model_directory
from backmerge.errors import GenerationError
from backmerge.generation import chat
from backmerge.generation.chat import load_tokenizer, render, turn_end
from backmerge.records import Message
from generation.templates import FAMILIES, GEMMA, LLAMA_3_2, Family
from generation.tiny import byte_tokenizer, embedded_copy

USER, SYSTEM = Message("user", "Hi"), Message("system", "Be brief.")
EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


@EACH_FAMILY
def test_prompts_are_the_familys_own(family: Family) -> None:
    """With and without a system's turn the prompt is, to the letter, what the family's template makes."""
    tokenizer = family.tokenizer()
    assert render(tokenizer, (USER,)) == family.plain
    assert render(tokenizer, (SYSTEM, USER)) == family.with_system


@EACH_FAMILY
def test_one_beginning_of_sequence(family: Family) -> None:
    """A prompt holds one BOS; tokenised with special tokens added it would hold one more."""
    tokenizer = family.tokenizer()
    for messages in ((USER,), (SYSTEM, USER), (USER, Message("assistant", "Ho"), USER)):
        text = render(tokenizer, messages)
        assert tokenizer(text, add_special_tokens=False)["input_ids"].count(tokenizer.bos_token_id) == family.num_bos
        if family.num_bos:
            assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 2


@EACH_FAMILY
def test_an_answer_goes_on_where_the_prompt_ends(family: Family) -> None:
    """The conversation with its answer is the prompt, the answer, and the end of the turn."""
    tokenizer = family.tokenizer()
    for turns in ((USER,), (SYSTEM, USER)):
        whole = render(tokenizer, (*turns, Message("assistant", "Ho")), answer_follows=False)
        assert whole.rstrip("\n") == f"{render(tokenizer, turns)}Ho{family.end}"


@EACH_FAMILY
def test_the_end_of_a_turn_is_read_from_the_template(family: Family) -> None:
    """The token that ends an answer is found even where it is not the tokenizer's end of sequence (Gemma)."""
    tokenizer = family.tokenizer()
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids(family.end)


def test_a_template_without_an_end_has_none() -> None:
    """Where nothing, or no special token, follows an answer, no end is made up."""
    for after in ("", " Ok."):
        template = "{% for m in messages %}{{ m['content'] }}" + after + "{% endfor %}"
        assert turn_end(byte_tokenizer(("<a>",), template, bos=None, eos="<a>")) is None
    refuses = "{{ raise_exception('no') }}"
    assert turn_end(byte_tokenizer(("<a>",), refuses, bos=None, eos="<a>")) is None


def test_a_prompt_is_the_same_tomorrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that asks for today's date is told a fixed one; the guard is what fixes it."""
    tokenizer = FAMILIES["llama-3.2"].tokenizer()
    assert "strftime_now" in LLAMA_3_2
    assert "Today Date: 26 Jul 2024" in render(tokenizer, (USER,))
    monkeypatch.setattr(chat, "DATE_STRING", "02 Jan 2031")
    assert "Today Date: 02 Jan 2031" in render(tokenizer, (USER,))


def test_a_system_text_that_the_template_drops_is_kept() -> None:
    """A template that passes over the system's turn without a word gets its text in front of the user's."""
    silent = "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]{% endif %}{% endfor %}"
    tokenizer = byte_tokenizer(("<a>",), silent, bos=None, eos="<a>")
    assert render(tokenizer, (SYSTEM, USER)) == "[Be brief.\n\nHi]"
    assert render(tokenizer, (Message("system", ""), USER)) == "[Hi]"


def test_text_passes_unchanged() -> None:
    """Braces, tags, quotes and other scripts in a prompt are text, not template."""
    tokenizer = FAMILIES["qwen-2.5"].tokenizer()
    text = "{{ messages }} {% if %} <b>&amp;</b> 'λ' “é”\n\n  end"
    assert f"user\n{text}<|im_end|>" in render(tokenizer, (Message("user", text),))


def test_a_conversation_that_the_template_refuses_is_an_error() -> None:
    """Two users' turns in a row are refused by Gemma's template: said with its reason, and without the text."""
    tokenizer = byte_tokenizer(("<bos>", "<eos>"), GEMMA, bos="<bos>", eos="<eos>")
    with pytest.raises(GenerationError, match="roles must alternate") as caught:
        render(tokenizer, (Message("user", "SECRET"), Message("user", "SECRET")))
    assert "SECRET" not in str(caught.value)


def test_a_template_that_loops_for_some_contents_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes the first check, which renders another conversation; a user error, and the signal is free again."""
    monkeypatch.setattr(chat, "RENDERING_LIMIT", 0.1)
    loops = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    template = "{% if 'ticket' in messages[-1]['content'] %}" + loops + "{% endif %}{{ messages[-1]['content'] }}"
    tokenizer = byte_tokenizer(("<bos>", "<eos>"), template, bos="<bos>", eos="<eos>")
    before = signal.getsignal(signal.SIGVTALRM)
    chat.check_bounded(template, Path())
    assert render(tokenizer, (USER,)) == "Hi"
    with pytest.raises(GenerationError, match="seconds for one conversation"):
        render(tokenizer, (Message("user", "a ticket"),))
    assert (signal.getsignal(signal.SIGVTALRM), signal.getitimer(signal.ITIMER_VIRTUAL)[0]) == (before, 0)


def test_the_tokenizer_pads_on_the_left() -> None:
    """Padding goes in front of the prompt, by the tokenizer's own pad token."""
    tokenizer = load_tokenizer(model_directory())
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token == "<pad>"  # noqa: S105 - not a password


def test_without_a_pad_token_the_end_of_sequence_pads(tmp_path: Path) -> None:
    """Llama 3 has no pad token; its end of sequence stands in."""
    directory = embedded_copy(tmp_path / "m", {"tokenizer_config.json": {"pad_token": None}})
    assert load_tokenizer(directory).pad_token == "</s>"  # noqa: S105 - not a password


def test_no_chat_template_is_a_clear_error(tmp_path: Path) -> None:
    """A base model without a chat template is refused, with the file that would help."""
    directory = embedded_copy(tmp_path / "m", {})
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(GenerationError, match=r"no chat template(.|\n)*chat_template\.jinja"):
        load_tokenizer(directory)


def test_fault_of_the_config_is_not_blamed_on_the_tokenizer(tmp_path: Path) -> None:
    """Transformers finds a tokenizer's class by config.json, and fails there."""
    broken = embedded_copy(tmp_path / "broken", {"config.json": {"attention_dropout": "much"}})
    with pytest.raises(GenerationError, match=f"cannot read {broken / 'config.json'}: .*attention_dropout"):
        load_tokenizer(broken)


def test_no_tokenizer_is_a_clear_error(tmp_path: Path) -> None:
    """A directory with weights alone is refused, with what to do."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_directory() / name, tmp_path / name)
    with pytest.raises(GenerationError, match=r"cannot be loaded(.|\n)*copy the tokenizer files"):
        load_tokenizer(tmp_path)
