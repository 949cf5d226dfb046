"""A repetition penalty that does not see padding."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor


class UnpaddedRepetitionPenalty(LogitsProcessor):  # type: ignore[misc] # transformers is not typed
    """Divides positive and multiplies negative logits of tokens that occur in prompt or answer.

    The stock processor also penalises the padding of a left-padded batch; the pad token is often the end of
    sequence, so that answers run on, and change with the batch that they are in.

    Args:
        penalty: Above 1 discourages repetition.
        prompt_mask: 1 for tokens of the prompt, 0 for padding; shape (batch, prompt).

    Source: Keskar et al., CTRL (arXiv 1909.05858), section 4.1.
    """

    def __init__(self, penalty: float, prompt_mask: Tensor) -> None:
        self.penalty = penalty
        self.prompt_mask = prompt_mask.bool()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Penalised logits, shape (batch, vocabulary)."""
        num_new = input_ids.shape[1] - self.prompt_mask.shape[1]
        is_real = torch.nn.functional.pad(self.prompt_mask, (0, num_new), value=True)
        seen = torch.zeros_like(scores, dtype=torch.int32).scatter_add_(1, input_ids, is_real.int()) > 0
        penalised = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(seen, penalised, scores)
