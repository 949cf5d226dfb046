"""The repetition penalty sees prompt and answer, and never the padding."""

from __future__ import annotations

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from backmerge.generation.transformers_engine import UnpaddedRepetitionPenalty

# two prompts: [3, 4] and, behind two pads (token 0), [4]; each has since been answered by token 1
INPUT_IDS = torch.tensor([[5, 3, 4, 1], [0, 0, 4, 1]])
PROMPT_MASK = torch.tensor([[1, 1, 1], [0, 0, 1]])
SCORES = torch.tensor([[3.0, -1.0, 2.0, 4.0, -2.0, 0.0], [3.0, -1.0, 2.0, 4.0, -2.0, 0.0]])


def test_values_by_hand() -> None:
    """Positive logits of seen tokens are halved by a penalty of 2, negative ones doubled, the others left."""
    penalised = UnpaddedRepetitionPenalty(2.0, PROMPT_MASK)(INPUT_IDS, SCORES)
    expected = torch.tensor([[3.0, -2.0, 2.0, 2.0, -4.0, 0.0], [3.0, -2.0, 2.0, 4.0, -4.0, 0.0]])
    assert torch.equal(penalised, expected)


def test_the_stock_processor_penalises_the_padding() -> None:
    """The guard is real: with transformers' own processor the pad token's logit falls in the padded row."""
    stock = RepetitionPenaltyLogitsProcessor(2.0)(INPUT_IDS, SCORES.clone())
    ours = UnpaddedRepetitionPenalty(2.0, PROMPT_MASK)(INPUT_IDS, SCORES)
    assert torch.equal(stock[0], ours[0])
    assert stock[1, 0] == 1.5
    assert ours[1, 0] == 3.0


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.2])
def test_without_padding_it_is_the_stock_processor(penalty: float) -> None:
    """Where nothing is padded both give the same numbers, bit for bit."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(5, 50, generator=generator)
    ids = torch.randint(50, (5, 20), generator=generator)
    ours = UnpaddedRepetitionPenalty(penalty, torch.ones(5, 12))(ids, scores)
    assert torch.equal(ours, RepetitionPenaltyLogitsProcessor(penalty)(ids, scores.clone()))


def test_pad_token_inside_the_text_is_penalised() -> None:
    """What counts is the place, not the token: an end of sequence within the prompt is seen, though it also pads."""
    scores = torch.full((1, 3), 6.0)
    mask = torch.tensor([[0, 1, 1]])
    said = UnpaddedRepetitionPenalty(2.0, mask)(torch.tensor([[0, 0, 1]]), scores)
    assert said.tolist() == [[3.0, 3.0, 6.0]]


def test_scores_are_not_changed_in_place() -> None:
    """The logits that come in are left as they are."""
    before = SCORES.clone()
    UnpaddedRepetitionPenalty(1.2, PROMPT_MASK)(INPUT_IDS, SCORES)
    assert torch.equal(SCORES, before)
