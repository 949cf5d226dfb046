"""Compute the loss over the answers only, without the logits of the whole batch in memory.

transformers computes logits for every position, widens them to float32, and then ignores those of the prompts. With a
vocabulary of 128,000 and 8,192 tokens per batch these take 4 GB, several times over. Here only the positions with a
label reach the output layer, and torch's fused loss processes them in chunks. Rows of similar lengths are computed
together, so that little of the work is for padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer

IGNORED = -100
MIN_LOGIT_BYTES = 64 << 20  # size of a batch's logits in float32; below it, transformers' own loss is as good
CHECKED_TOKENS = 64
WORTH_HALVING = 0.95  # rows are computed in two parts if these have at most this share of the tokens, padding included
# fewest tokens of a part; smaller ones do not keep a device busy
FEWEST_ON_CPU, FEWEST_ON_GPU = 128, 512
AGREEMENT = 1e-3  # relative; bfloat16 logits are rounded to 2^-8, but their mean over tokens is much more exact


class AnswerLossTrainer(Trainer):  # type: ignore[misc] # transformers is not followed by the type checker
    """A Trainer that uses `answer_loss` if that equals the model's own loss, and otherwise the model's own.

    The two differ for models that scale or cap their logits, or that train the output layer through an adapter; they
    are compared on the first batch. With several processes the model's own loss is used, since gradients are shared by
    hooks of the wrapped model's forward pass.
    """

    _uses_answer_loss: bool | None = None  # not decided yet

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the mean loss over the tokens with a label, or their sum over `num_items_in_batch` if given."""
        if self._uses_answer_loss is None:
            self._uses_answer_loss = self._can_use_answer_loss(model, inputs)
        if not self._uses_answer_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # as in the Trainer: a model that does not accept the number of items returns the mean of each part of a batch
        num_items = num_items_in_batch if self.model_accepts_loss_kwargs else None
        with self.accelerator.autocast():
            loss = answer_loss(_plain(model), inputs, num_items)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _can_use_answer_loss(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        if self.accelerator.num_processes > 1:  # the model is then wrapped, and its output layer is not accessible
            return False
        plain = _plain(model)
        head = plain.get_output_embeddings()
        if type(head) is not nn.Linear:
            return False
        if 4 * inputs["input_ids"].numel() * head.out_features < MIN_LOGIT_BYTES:
            return False
        # the last tokens of the first row, which contain the answer
        length = int(inputs["attention_mask"][0].sum())
        few = {name: tensor[:1, max(0, length - CHECKED_TOKENS) : length] for name, tensor in inputs.items()}
        was_training = model.training
        model.eval()  # dropout would make the two differ
        with torch.no_grad(), self.accelerator.autocast():
            own, ours = float(model(**few).loss), float(answer_loss(plain, few, None))
        model.train(was_training)
        return abs(own - ours) <= AGREEMENT * abs(own)


def answer_loss(model: Any, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
    """Return the cross-entropy of the next token at the positions with a label.

    Args:
        model: A causal language model of transformers whose logits are its output layer's unchanged result.
        inputs: `input_ids`, `attention_mask` and `labels`, each (rows, tokens); labels of -100 are ignored.
        num_items: Divisor of the sum; by default the number of labels.
    """
    total = torch.stack([_loss_of(model, part) for part in by_length(inputs)]).sum()
    return total / ((inputs["labels"][:, 1:] != IGNORED).sum() if num_items is None else num_items)


def by_length(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return a batch in parts of rows of similar lengths, each without the padding that only longer rows need.

    Args:
        inputs: `attention_mask` and other tensors, each (rows, tokens), padded on the right.
    """
    lengths = inputs["attention_mask"].sum(dim=1)
    order = lengths.argsort(stable=True)
    in_order = lengths[order].tolist()
    fewest = FEWEST_ON_CPU if lengths.device.type == "cpu" else FEWEST_ON_GPU
    return [
        {name: tensor[order[part.start : part.stop], : in_order[part.stop - 1]] for name, tensor in inputs.items()}
        for part in _halved(in_order, range(len(in_order)), fewest)
    ]


def _halved(lengths: Sequence[int], rows: range, fewest: int) -> list[range]:
    """Return sorted rows in halves, and their halves, as long as that leaves out enough of their tokens."""

    def num_tokens(part: range) -> int:
        return len(part) * lengths[part[-1]]

    low, high = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    if not low or num_tokens(low) < fewest or num_tokens(low) + num_tokens(high) > WORTH_HALVING * num_tokens(rows):
        return [rows]
    return [*_halved(lengths, low, fewest), *_halved(lengths, high, fewest)]


def _loss_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    hidden = model.get_decoder()(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
    ).last_hidden_state
    labels = inputs["labels"][:, 1:]
    is_learned = labels != IGNORED
    head = model.get_output_embeddings()
    return _summed_loss(hidden[:, :-1][is_learned].to(head.weight.dtype), head, labels[is_learned])


def _summed_loss(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    fused = getattr(functional, "linear_cross_entropy", None)  # torch 2.13 and newer
    if fused is None or len(labels) < head.in_features or head.out_features < head.in_features:  # chunks cost more
        return functional.cross_entropy(head(hidden).float(), labels, reduction="sum")
    in_chunks = nn.LinearCrossEntropyOptions
    loss: Tensor = fused(hidden, head.weight, labels, linear_bias=head.bias, reduction="sum", options=in_chunks())
    return loss


def _plain(model: nn.Module) -> Any:
    """Return the transformers model without peft's wrapper; its adapters are in its layers."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
