"""What a model's linear layers see on conversations: the same as another hook sees, shared inputs once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from backmerge.checkpoints.reader import Checkpoint
from backmerge.errors import GenerationError
from backmerge.generation.layer_inputs import answers_to, gather_inputs, own_prompts
from backmerge.generation.protocol import EngineSettings
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.merging.inputs import GatheredLayer, LayerInputs
from backmerge.merging.recipe import Variant
from backmerge.records import Example, Message

Factory = Callable[..., Path]
PROMPTS = [Example("a", (Message("user", "Mend a kite"),)), Example("b", (Message("user", "Take the tape."),))]
ANSWERS = [" Sorry, I cannot", ""]


def gathered(directory: Path, answers: list[str] | None = None) -> tuple[dict[str, GatheredLayer], int]:
    """What is gathered of a model on the prompts."""
    engine = TransformersEngine(EngineSettings(device="cpu"))
    conversations = list(zip(PROMPTS, answers or ANSWERS, strict=True))
    return gather_inputs(engine, Variant(Checkpoint(directory)), conversations, 1024, lambda *_: None)


def second_moments(found: LayerInputs) -> np.ndarray:
    """C as a matrix."""
    return found.within(np.eye(found.directions.shape[1]), 0.0)


def seen(directory: Path, module: str) -> np.ndarray:
    """C of one module's inputs, by a hook and the definition."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    rows: list[torch.Tensor] = []
    model.get_submodule(module).register_forward_pre_hook(lambda _, given: rows.append(given[0][0].double()))
    for example, answer in zip(PROMPTS, ANSWERS, strict=True):
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": example.prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = [id_ for text in (asked, answer) for id_ in tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            model(torch.tensor([ids]))
    x = torch.cat(rows)
    found: np.ndarray = (x.T @ x * (x.shape[1] / x.square().sum())).numpy()
    return found


def test_each_layer_has_the_second_moments_of_its_inputs(make_model: Factory) -> None:
    """Prompt and answer count, q, k and v share theirs, gate and up as well; head, norms and embeddings have none."""
    directory = make_model("llama", seed=1)
    layers, num_tokens = gathered(directory)
    layer = "model.layers.1"
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    tensors = {name: found.tensors for name, found in layers.items() if name.startswith(layer)}
    assert tensors == {
        f"{attention}.q_proj.weight": tuple(f"{attention}.{each}_proj.weight" for each in "qkv"),
        f"{attention}.o_proj.weight": (f"{attention}.o_proj.weight",),
        f"{mlp}.gate_proj.weight": (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
        f"{mlp}.down_proj.weight": (f"{mlp}.down_proj.weight",),
    }
    assert len(layers) == 8
    for name in tensors:
        expected = seen(directory, name.removesuffix(".weight"))
        found = second_moments(layers[name].inputs)
        # float32 products, of inputs that the forward pass computes alike
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    first = f"<|begin|><|user|>Mend a kite<|end|><|assistant|>{ANSWERS[0]}"
    text = f"{first}<|begin|><|user|>Take the tape.<|end|><|assistant|>"
    assert num_tokens == len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert gathered(directory, ["", ""])[1] < num_tokens


def test_the_result_is_the_same_each_time(make_model: Factory) -> None:
    """Law 10: bit for bit, in the order of the prompts."""
    first, second = (gathered(make_model("qwen2", seed=1))[0] for _ in range(2))
    assert all(np.array_equal(first[name].inputs.directions, second[name].inputs.directions) for name in first)


def test_weights_that_are_stored_turned_say_so(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """GPT-2's layers hold (in, out): the width is the first of the two."""
    config = GPT2Config(vocab_size=len(tiny_tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    with torch.random.fork_rng():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    layers, _ = gathered(tmp_path)
    widths = {name: found.inputs.directions.shape[1] for name, found in layers.items()}
    base = Checkpoint(tmp_path)
    assert len(widths) == 4
    assert all(base.infos[name].shape[0] == width for name, width in widths.items())
    assert all(found.inputs.is_transposed for found in layers.values())


def test_a_model_writes_prompts_and_answers_them(make_model: Factory) -> None:
    """Of its own template's user turn, with a seed; no prompt twice, none empty; answers are its greedy ones."""
    variant = Variant(Checkpoint(make_model("llama", seed=1)))
    engine = TransformersEngine(EngineSettings(device="cpu"))
    first, second, other = (own_prompts(engine, variant, 6, seed) for seed in (0, 0, 1))
    assert first == second != other
    texts = [one.prompt for one in first]
    assert len(set(texts)) == len(texts) <= 6
    assert all(text.strip() and "<|" not in text for text in texts)
    assert len(answers_to(engine, variant, first, 4, lambda *_: None)) == len(first)
    assert answers_to(engine, variant, first, 0, lambda *_: None) == [""] * len(first)


def test_a_conversation_beyond_the_context_is_cut_there(make_model: Factory) -> None:
    """The model does not compute on positions that it has not learnt."""
    place = make_model("llama", seed=1)
    _, num_tokens = gathered(place, ["kite " * 300, "kite " * 300])
    assert num_tokens == 2 * json.loads((place / "config.json").read_text())["max_position_embeddings"]


def test_own_prompts_leave_room_for_an_answer(make_model: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of a random model can have more tokens than were generated."""
    engine, variant = TransformersEngine(EngineSettings(device="cpu")), Variant(Checkpoint(make_model("llama", seed=1)))
    monkeypatch.setattr("backmerge.generation.layer_inputs.max_positions", lambda _: 9)
    with pytest.raises(GenerationError, match="wrote no prompt"):
        own_prompts(engine, variant, 6, 0)
