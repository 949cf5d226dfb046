"""What the paper's models are trained on, to the letter: presets through the models' own templates, by hand beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backmerge.finetuning.data_settings import DataSettings
from backmerge.finetuning.datasets import Task, load_training_data
from backmerge.finetuning.encoding import IGNORED, encode
from backmerge.generation.chat import render
from backmerge.records import Example, Message
from backmerge.registry import DATASETS, resolve
from finetuning.template_texts import PUBLISHED, Published

EACH_MODEL = pytest.mark.parametrize("model", PUBLISHED.values(), ids=PUBLISHED.keys())

# a row as the data set has it; system prompt, user's turn and answer that the paper makes of it
TASKS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "reasoning": (
        {"inputs": "Do kites need wind?\nOptions:\n- yes\n- no", "targets": "Lift needs air.\nThe answer is yes."},
        "You are a helpful assistant.",
        "Do kites need wind?\nOptions:\n- yes\n- no",
        "Lift needs air.\nThe answer is yes.",
    ),
    "medical": (
        {
            "instruction": "If you are a doctor, ...",
            "input": "My knee aches after long walks.",
            "output": "Rest it, and cool it.",
        },
        "If you are a doctor, please answer the medical questions based on the patient's description.",
        "My knee aches after long walks.",
        "Rest it, and cool it.",
    ),
    "code": (
        {"lang": "python", "problem": "Double {x}.", "solution": "```python\ndef double(x):\n    return 2 * x\n```"},
        "You are a helpful assistant.",
        "Double {x}.",
        "```python\ndef double(x):\n    return 2 * x\n```",
    ),
    "tools": (
        {"question": "Wake me at 7.", "function": {"api_call": "alarm.set"}, "model_answer": "alarm.set(hour=7)"},
        "You are a helpful assistant.",
        'Wake me at 7.\nYou may call these functions:\n[{"api_call": "alarm.set"}]',
        "alarm.set(hour=7)",
    ),
}  # fmt: skip
EACH_TASK = pytest.mark.parametrize("task", TASKS)


def of_preset(task: str, model: Published, folder: Path, **settings: Any) -> Example:
    """The example that a preset makes of its row for a model."""
    file = folder / "rows.jsonl"
    file.write_text(json.dumps(TASKS[task][0]) + "\n", encoding="utf-8")
    chosen = DataSettings(file=str(file), validation=0, **settings)
    (example,) = load_training_data(task, chosen, 0, family=model.family).training
    return example


def learned(tokenizer: Any, labels: list[int]) -> str:
    """The text that the loss is on."""
    return str(tokenizer.decode([label for label in labels if label != IGNORED]))


def test_each_preset_is_here() -> None:
    """A preset that is added to the table is rendered too."""
    assert set(TASKS) == {name for name in DATASETS.entries if isinstance(resolve(DATASETS, name)(), Task)}


@EACH_MODEL
@EACH_TASK
def test_what_is_trained_on(model: Published, task: str, tmp_path: Path) -> None:
    """Prompt and answer are the exact strings of the model's template; the loss is on the answer and its end alone."""
    tokenizer = model.tokenizer()
    example = of_preset(task, model, tmp_path)
    _, system, user, answer = TASKS[task]
    prompt = model.prompt.format(system=system, user=user)
    assert render(tokenizer, example.messages) == prompt
    encoded = encode(tokenizer, example, 4096)
    assert tokenizer.decode(encoded.input_ids) == f"{prompt}{answer}{model.end}"
    assert learned(tokenizer, encoded.labels) == f"{answer}{model.end}"
    start = len(encoded.labels) - sum(label != IGNORED for label in encoded.labels)
    assert tokenizer.decode(encoded.input_ids[:start]) == prompt
    assert encoded.labels[start:] == encoded.input_ids[start:]
    assert not encoded.was_cut


@EACH_MODEL
@EACH_TASK
def test_one_beginning_of_sequence(model: Published, task: str, tmp_path: Path) -> None:
    """It is the first token, and the only one of its kind; Qwen has none."""
    tokenizer = model.tokenizer()
    input_ids = encode(tokenizer, of_preset(task, model, tmp_path), 4096).input_ids
    assert input_ids.count(tokenizer.bos_token_id) == model.num_bos
    assert (input_ids[0] == tokenizer.bos_token_id) == bool(model.num_bos)


@EACH_MODEL
def test_without_a_system_prompt(model: Published, tmp_path: Path) -> None:
    """Taken away by the setting, it leaves what the template makes of a user's turn alone."""
    tokenizer = model.tokenizer()
    example = of_preset("medical", model, tmp_path, system="")
    _, _, user, answer = TASKS["medical"]
    encoded = encode(tokenizer, example, 4096)
    assert tokenizer.decode(encoded.input_ids) == f"{model.bare.format(user=user)}{answer}{model.end}"


def test_the_medical_row_by_hand(tmp_path: Path) -> None:
    """Written out whole: Llama-3 with a system's turn, Gemma with the same text in front of the user's."""
    doctor = "If you are a doctor, please answer the medical questions based on the patient's description."
    expected = {
        "Llama-3-Instruct": (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + doctor + "<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nMy knee aches after long walks.<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nRest it, and cool it.<|eot_id|>"
        ),
        "Gemma-2-it": (
            "<bos><start_of_turn>user\n" + doctor + "\n\nMy knee aches after long walks.<end_of_turn>\n"
            "<start_of_turn>model\nRest it, and cool it.<end_of_turn>\n"
        ),
    }
    for name, text in expected.items():
        tokenizer = PUBLISHED[name].tokenizer()
        encoded = encode(tokenizer, of_preset("medical", PUBLISHED[name], tmp_path), 4096)
        assert tokenizer.decode(encoded.input_ids) == text


@EACH_MODEL
def test_a_conversation_of_the_users_own(model: Published, tmp_path: Path) -> None:
    """Turns of a file of `messages` come through as turns, under its own system prompt, and end in its last answer."""
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"), ("user", "So?"), ("assistant", "Yes.")]
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n", encoding="utf-8")
    (example,) = load_training_data(str(file), DataSettings(validation=0), 0, family=model.family).training
    assert example == Example("mine-1", tuple(Message(role, text) for role, text in turns[:-1]), "Yes.")  # type: ignore[arg-type]
    tokenizer = model.tokenizer()
    text = tokenizer.decode(encode(tokenizer, example, 4096).input_ids)
    assert text.startswith(f"{model.prompt.format(system='Be brief.', user='Hi')}Ho{model.end}")
    assert text.endswith(f"Yes.{model.end}")
    assert text.count("Be brief.") == 1
