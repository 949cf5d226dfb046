"""Compute how likely a model finds one text after another: the score of multiple-choice tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from backmerge.errors import GenerationError
from backmerge.generation.chat import max_positions
from backmerge.generation.completing import check_tokens
from backmerge.generation.protocol import LogLikelihood


def likelihoods(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int, advance: Callable[[int], None]
) -> list[LogLikelihood]:
    """Return one log-likelihood for each (context, continuation), in order.

    White space at the end of a context is moved to the continuation, and the two are tokenised as one text whose first
    tokens are the context's, as in lm-evaluation-harness. A text that exceeds the model's context loses its beginning.

    Raises:
        GenerationError: a continuation has no tokens, or alone exceeds the model's context, or the model has no
            embedding for a token.
    """
    limit = max_positions(model)
    rows = [row_of(tokenizer, context, continuation, limit) for context, continuation in pairs]
    check_tokens((ids for ids, _ in rows), model.get_input_embeddings().weight.shape[0])
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    found: dict[int, LogLikelihood] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        found.update(zip(batch, _scored(model, [rows[i] for i in batch]), strict=True))
        advance(len(batch))
    return [found[i] for i in range(len(rows))]


def row_of(tokenizer: Any, context: str, continuation: str, limit: int | None) -> tuple[list[int], int]:
    """Return the token ids of both, and how many of them are the continuation's."""
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    begins = tokenizer.bos_token is not None and stripped.startswith(tokenizer.bos_token)
    whole: list[int] = tokenizer(stripped + continuation, add_special_tokens=not begins)["input_ids"]
    before: list[int] = tokenizer(stripped, add_special_tokens=not begins)["input_ids"]
    if not before:  # the first token needs something before it: the token that starts or ends texts
        before = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
        whole = before + whole
    count = len(whole) - len(before)
    if count <= 0 or (limit is not None and count >= limit):
        raise GenerationError(
            f"a continuation of {max(count, 0)} tokens cannot be scored"
            + ("" if limit is None else f" in a context of {limit}"),
            remedy="remove the task's row, or use a model with a longer context.",
        )
    return (whole if limit is None else whole[-limit:]), count


@torch.inference_mode()
def _scored(model: Any, rows: Sequence[tuple[list[int], int]]) -> list[LogLikelihood]:
    width = max(len(ids) for ids, _ in rows)
    # padded on the right: later tokens do not change the prediction for an earlier one
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in rows], device=model.device)
    # only the positions that predict continuations: all logits over a large vocabulary need gigabytes
    first = min(len(row) - count for row, count in rows) - 1
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=width - first).logits
    scored = []
    for place, (row, count) in enumerate(rows):
        start = len(row) - count - 1 - first
        chosen = ids[place, len(row) - count : len(row)]
        predicted = torch.log_softmax(logits[place, start : start + count].float(), dim=-1)
        total = predicted.gather(1, chosen[:, None]).double().sum()
        scored.append(LogLikelihood(float(total), count, bool((predicted.argmax(-1) == chosen).all())))
    return scored
