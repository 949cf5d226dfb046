"""The chat templates of the paper's models, tool calls left out, and tokenizers that have their special tokens.

Each gives the very text of the model's own template for conversations of system, user and assistant turns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from generation.tiny import byte_tokenizer

LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_LLAMA_3_WITH_DATE = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}{{- 'Cutting Knowledge Date: December 2023\n' }}"
    "{{- 'Today Date: ' + date_string + '\n\n' }}{{- system_message }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
LLAMA_3_1 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    + _LLAMA_3_WITH_DATE
)
LLAMA_3_2 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}" + _LLAMA_3_WITH_DATE
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
QWEN_2_5 = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}{%- else %}"
    "{{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif %}{%- for message in messages %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == 'assistant' %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


class Family(NamedTuple):
    """A chat model's template and what it renders.

    Attributes:
        plain: The prompt for the user's turn "Hi".
        with_system: The same after the system's turn "Be brief.".
        end: The token that ends an answer.
        num_bos: Beginning-of-sequence tokens in a prompt.
    """

    template: str
    bos: str | None
    eos: str
    special: tuple[str, ...]
    plain: str
    with_system: str
    end: str
    num_bos: int

    def tokenizer(self) -> Any:
        """A tokenizer that has the family's special tokens."""
        return byte_tokenizer(self.special, self.template, bos=self.bos, eos=self.eos)


_LLAMA_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
_QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_USER_AND_ASSISTANT = (
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
_DATED = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
)
_LLAMA_3_DATED = Family(
    LLAMA_3_1,
    "<|begin_of_text|>",
    "<|eot_id|>",
    _LLAMA_TOKENS,
    f"{_DATED}<|eot_id|>{_USER_AND_ASSISTANT}",
    f"{_DATED}Be brief.<|eot_id|>{_USER_AND_ASSISTANT}",
    "<|eot_id|>",
    1,
)
_GEMMA = Family(
    GEMMA,
    "<bos>",
    "<eos>",
    _GEMMA_TOKENS,
    "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<end_of_turn>",
    1,
)

FAMILIES = {
    "llama-3": Family(
        LLAMA_3,
        "<|begin_of_text|>",
        "<|eot_id|>",
        _LLAMA_TOKENS,
        f"<|begin_of_text|>{_USER_AND_ASSISTANT}",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>" + _USER_AND_ASSISTANT,
        "<|eot_id|>",
        1,
    ),
    "llama-3.1": _LLAMA_3_DATED,
    "llama-3.2": _LLAMA_3_DATED._replace(template=LLAMA_3_2),
    "gemma": _GEMMA,
    "gemma-2": _GEMMA,  # the same template; what differs are the end tokens that its generation config lists
    "qwen-2.5": Family(
        QWEN_2_5,
        None,
        "<|im_end|>",
        _QWEN_TOKENS,
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
        0,
    ),
}
