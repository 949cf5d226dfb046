"""Templates that need another form of the conversation, lose a text, or think; and the switch for thoughts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from backmerge.errors import GenerationError
from backmerge.generation.chat import render, thinking_switch
from backmerge.records import Message

SYSTEM, USER = Message("system", "Be brief."), Message("user", "Why is the sky blue?")
TURN = "{% for m in messages %}<|{{ m['role'] }}|>"
END = "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
PARTS = TURN + "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}" + END
NO_SYSTEM = "{% for m in messages if m['role'] != 'system' %}<|{{ m['role'] }}|>{{ m['content'] }}" + END
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + (
    TURN + "{{ m['content'] }}" + END
)
DEAF = "{% for m in messages %}<|{{ m['role'] }}|>{% endfor %}"
QWEN = (
    TURN
    + "{{ m['content'] }}"
    + END
    + "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
)


@pytest.fixture
def with_template(tiny_tokenizer: Any) -> Callable[[str], Any]:
    """The tiny tokenizer with another template."""

    def make(template: str) -> Any:
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.mark.parametrize("template", [PARTS, NO_SYSTEM, REFUSES_SYSTEM])
def test_every_text_is_rendered_once(with_template: Callable[[str], Any], template: str) -> None:
    """As a list of parts, or with the system's text in front of the user's, whatever the template needs."""
    text = render(with_template(template), (SYSTEM, USER))
    assert text.count(SYSTEM.content) == text.count(USER.content) == 1
    assert text.index(SYSTEM.content) < text.index(USER.content)
    assert "'type'" not in text
    assert text.endswith("<|assistant|>")


def test_a_template_that_loses_the_question_is_refused(with_template: Callable[[str], Any]) -> None:
    """No form of the conversation helps, and the error names whose text is lost."""
    with pytest.raises(GenerationError, match="drops the user's text"):
        render(with_template(DEAF), (USER,))


def test_thoughts_are_switched_by_the_templates_own_variable(with_template: Callable[[str], Any]) -> None:
    """On, off, or left to the template; a template without a switch is an error that names the option."""
    tokenizer = with_template(QWEN)
    assert thinking_switch(tokenizer, thinking=False) == {"enable_thinking": False}
    assert render(tokenizer, (USER,), thinking=False).endswith("<think></think>")
    assert render(tokenizer, (USER,), thinking=True) == render(tokenizer, (USER,))
    with pytest.raises(GenerationError, match="no switch for thinking") as caught:
        render(with_template(PARTS), (USER,), thinking=True)
    assert "--thinking" in (caught.value.remedy or "")
