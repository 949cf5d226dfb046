"""The loss over answers alone is the model's own loss, or is not used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

from backmerge.finetuning import answer_loss as module
from backmerge.finetuning.answer_loss import IGNORED, AnswerLossTrainer, answer_loss, by_length

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}


def llama() -> Any:
    """A tiny Llama with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def batch(rows: int = 4, tokens: int = 24) -> dict[str, torch.Tensor]:
    """Rows whose first third is a prompt, the last row padded."""
    ids = torch.randint(1, 96, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[-1, -5:] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, : tokens // 3] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def ragged(*lengths: int) -> dict[str, torch.Tensor]:
    """A row of each length, padded on the right; the first three tokens of each are a prompt."""
    inputs = batch(len(lengths), max(lengths))
    inputs["attention_mask"] = torch.arange(max(lengths)).lt(torch.tensor(lengths)[:, None]).long()
    inputs["input_ids"] *= inputs["attention_mask"]
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
    inputs["labels"][:, :3] = IGNORED
    return inputs


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([90, 20, 88, 22], [(2, 22), (2, 90)]),
        ([20, 40, 80, 160], [(1, 20), (1, 40), (1, 80), (1, 160)]),
        ([90, 89, 90, 88], [(4, 90)]),
        ([30], [(1, 30)]),
        ([60, 10, 62], [(1, 10), (2, 62)]),
    ],
)
def test_rows_of_similar_lengths_are_together(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], expected: list[tuple[int, int]]
) -> None:
    """Each row once, with all of its tokens."""
    monkeypatch.setattr(module, "FEWEST_ON_CPU", 10)
    inputs = ragged(*lengths)
    parts = by_length(inputs)
    assert [tuple(part["input_ids"].shape) for part in parts] == expected
    assert all(part.keys() == inputs.keys() for part in parts)
    for name in inputs:
        rows = [
            row[: int(mask.sum())].tolist()
            for part in parts
            for row, mask in zip(part[name], part["attention_mask"], strict=True)
        ]
        assert sorted(rows) == sorted(row[:length].tolist() for row, length in zip(inputs[name], lengths, strict=True))


def test_small_parts_are_not_worth_it() -> None:
    """Below what keeps a device busy, a batch stays whole."""
    assert len(by_length(ragged(90, 20, 88, 22))) == 1
    assert len(by_length(ragged(90, 64, 88, 64))) == 2


# fewer positions than the width, which are not taken in chunks, and more; rows that are computed in parts
@pytest.mark.parametrize("inputs", [batch(1), batch(4), ragged(24, 5, 17, 9, 23, 6)], ids=["one", "many", "in parts"])
@pytest.mark.parametrize("num_items", [None, 7])
def test_loss_and_gradients_are_the_models_own(
    monkeypatch: pytest.MonkeyPatch, inputs: dict[str, torch.Tensor], num_items: int | None
) -> None:
    """Value and gradients agree with the model's forward pass within the rounding of sums in float32."""
    monkeypatch.setattr(module, "FEWEST_ON_CPU", 10)
    found = []
    for ours in (False, True):
        model = llama()
        kwargs = {} if num_items is None else {"num_items_in_batch": num_items}
        loss = answer_loss(model, inputs, num_items) if ours else model(**inputs, **kwargs).loss
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.reshape(-1) for p in model.parameters()])))
    (own, own_gradient), (loss, gradient) = found
    assert torch.allclose(own, loss, rtol=1e-5)
    assert torch.allclose(own_gradient, gradient, rtol=1e-3, atol=1e-6)


def trainer_of(model: Any, place: Path) -> AnswerLossTrainer:
    """A trainer on the CPU that is never run."""
    return AnswerLossTrainer(model=model, args=TrainingArguments(output_dir=str(place), use_cpu=True, report_to="none"))


def test_it_is_used_for_large_batches_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small logits are left to transformers; large ones are not made."""
    model = llama()
    assert not trainer_of(model, tmp_path)._can_use_answer_loss(model, batch())
    monkeypatch.setattr(module, "MIN_LOGIT_BYTES", 0)
    assert trainer_of(model, tmp_path)._can_use_answer_loss(model, batch())


def test_a_model_that_caps_its_logits_keeps_its_own_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 caps its logits after the output layer: the two losses differ, which the first batch shows."""
    monkeypatch.setattr(module, "MIN_LOGIT_BYTES", 0)
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=0.5))
    model.model.norm.weight.data.add_(20.0)
    trainer, inputs = trainer_of(model, tmp_path), batch()
    assert torch.equal(trainer.compute_loss(model, dict(inputs)), model(**inputs).loss)
    assert trainer._uses_answer_loss is False
