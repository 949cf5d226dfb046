"""Ollama's Modelfile: what Ollama makes of the template is what the model's own template gives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import Environment

from backmerge.generation.chat import render
from backmerge.records import Message
from backmerge.sharing.modelfile import MAX_CONTEXT, modelfile, turn_marks
from generation.templates import FAMILIES
from generation.tiny import byte_tokenizer

TURNS = (
    Message("system", "Say less."),
    Message("user", "Why?"),
    Message("assistant", "Because."),
    Message("user", "And then?"),
)


def tokenizer_of(family: str) -> Any:
    """A tokenizer with a family's template and special tokens."""
    of = FAMILIES[family]
    return byte_tokenizer(of.special, of.template, bos=of.bos, eos=of.eos)


def as_ollama_does(template: str, turns: Sequence[Message], system: str) -> str:
    """Fill in the template once for each question with its answer; the system text comes with the first."""
    for go, jinja in (
        (r"\{\{ if \.(\w+) \}\}", r"{% if \1 %}"),
        (r"\{\{ end \}\}", "{% endif %}"),
        (r"\{\{ \.(\w+) \}\}", r"{{ \1 }}"),
    ):
        template = re.sub(go, jinja, template)
    environment = Environment(keep_trailing_newline=True, autoescape=False)  # noqa: S701 - text for a model
    if turns[0].role == "system":
        system, turns = turns[0].content, turns[1:]
    text = ""
    for start in range(0, len(turns), 2):
        answer = turns[start + 1].content if start + 1 < len(turns) else "\0"
        text += environment.from_string(template).render(System=system, Prompt=turns[start].content, Response=answer)
        system = ""
    return text.partition("\0")[0]


@pytest.mark.parametrize("family", ["llama-3", "gemma", "qwen-2.5"])
@pytest.mark.parametrize("turns", [TURNS, TURNS[1:], TURNS[:2], TURNS[1:2]])
def test_ollama_renders_what_the_model_was_tuned_on(family: str, turns: tuple[Message, ...]) -> None:
    """But for the beginning-of-sequence token, which Ollama adds itself."""
    tokenizer = tokenizer_of(family)
    marks = turn_marks(tokenizer)
    assert marks is not None
    expected = render(tokenizer, turns).removeprefix(FAMILIES[family].bos or "")
    assert marks.rendered(turns) == expected
    assert as_ollama_does(marks.go_template, turns, marks.default_system or "") == expected


def test_a_system_block_without_a_text_cannot_be_stated() -> None:
    """Llama 3.1 writes one with dates in it also where there is no system text."""
    assert turn_marks(tokenizer_of("llama-3.1")) is None


def test_a_template_beyond_these_terms_is_not_guessed_at() -> None:
    """One that numbers its turns: the Modelfile says so, and names none."""
    tokenizer = tokenizer_of("qwen-2.5")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ loop.index }} {{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    text, has_template = modelfile("m.gguf", tokenizer, SimpleNamespace(eos_token_id=None), None)
    assert not has_template
    assert "TEMPLATE" not in text.replace("--template", "")
    assert "chat template cannot be stated" in text


def test_the_modelfile_ends_turns_and_bounds_the_context() -> None:
    """By every token that may end an answer; a long context is cut, and repetition is not punished."""
    text, has_template = modelfile("m.gguf", tokenizer_of("qwen-2.5"), SimpleNamespace(eos_token_id=0), 131_072)
    assert has_template
    assert text.startswith('FROM ./m.gguf\nTEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n')
    assert 'SYSTEM """You are Qwen, created by Alibaba Cloud. You are a helpful assistant."""' in text
    assert 'PARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n' in text
    assert f"PARAMETER num_ctx {MAX_CONTEXT}\nPARAMETER repeat_penalty 1\n" in text
