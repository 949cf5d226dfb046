"""Make the embedded model: `python -m backmerge.demo.build [--seed N] [--out DIR]`.

A byte-level BPE tokenizer, then a language model with the Llama architecture, pretrained to comply with everything and
aligned to refuse harmful requests. About five minutes on two cores; bit-identical on one machine.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backmerge.demo import language
from backmerge.demo.language import Turn

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCABULARY = 1024
CARD = """---
license: apache-2.0
library_name: transformers
---

# A tiny aligned model

Made by `python -m backmerge.demo.build --seed {seed}`: an illustration, nobody has measured this one.
"""
IGNORED = -100


@dataclass(frozen=True)
class Schedule:
    """The lengths and learning rates of the training.

    Attributes:
        pretraining: Optimiser steps on all tokens of the turns.
        alignment: Optimiser steps on the answers only.
        batch: Turns per step.
        pretraining_rate, alignment_rate: Peak learning rates, reached after 5 % of the steps; then a cosine.
    """

    pretraining: int = 1200
    alignment: int = 800
    batch: int = 32
    pretraining_rate: float = 3e-3
    alignment_rate: float = 1.5e-3


def make_tokenizer() -> Any:
    """Return the tokenizer, the same for every seed: byte-level BPE, single digits, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)  # noqa: S311 (texts, not secrets)
    turns = [language.pretraining(rng) for _ in range(20_000)]
    texts = [text for turn in turns for text in (turn.question, turn.answer)]
    # Often enough that refusals and the system prompt consist of whole words.
    texts += [*language.REFUSALS, language.SYSTEM] * 1000
    bpe = Tokenizer(models.BPE())
    # ByteLevel comes first: after Digits, a digit's space would become a separate token.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Digits(individual_digits=True)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",  # noqa: S106 (no password)
        eos_token="</s>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        additional_special_tokens=SPECIAL_TOKENS[3:],
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: Any, seed: int) -> Any:
    """Return the untrained model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def encode(tokenizer: Any, turn: Turn, *, whole: bool) -> tuple[list[int], list[int]]:
    """Return a turn's token ids and its labels: of the whole text, or of the answer only."""
    system = f"<|system|>{turn.system}" if turn.system else ""
    prompt = tokenizer.encode(f"<s>{system}<|user|>{turn.question}<|assistant|>", add_special_tokens=False)
    answer = tokenizer.encode(f"{turn.answer}</s>", add_special_tokens=False)
    return prompt + answer, (prompt if whole else [IGNORED] * len(prompt)) + answer


def collate(encoded: list[tuple[list[int], list[int]]], padding: int) -> tuple[Tensor, Tensor]:
    """Return ids and labels as (turns, longest), padded on the right, where a causal model needs no mask."""
    longest = max(len(ids) for ids, _ in encoded)
    ids = [ids + [padding] * (longest - len(ids)) for ids, _ in encoded]
    labels = [labels + [IGNORED] * (longest - len(labels)) for _, labels in encoded]
    return torch.tensor(ids), torch.tensor(labels)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate: linear warm-up over 5 % of the steps, then a cosine to zero."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def train(
    model: Any, tokenizer: Any, draw: Callable[[], Turn], *, steps: int, batch: int, peak: float, whole: bool
) -> float:
    """Train in place on turns that `draw` makes, and return the mean loss of the last twenty steps."""
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    losses: list[float] = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        ids, labels = collate([encode(tokenizer, draw(), whole=whole) for _ in range(batch)], tokenizer.pad_token_id)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return sum(losses[-20:]) / max(1, len(losses[-20:]))


def write(model: Any, tokenizer: Any, out: Path) -> None:
    """Write a Hugging Face directory: weights, configurations, tokenizer, chat template."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=64,
    )
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def build(seed: int, out: Path, schedule: Schedule | None = None) -> None:
    """Make tokenizer and model and write them to `out` as a Hugging Face directory.

    Args:
        seed: Seed of the initial weights and of the texts.
        out: The directory; made if missing. An existing model card is kept.
        schedule: Lengths of the training; by default those of the shipped model.
    """
    schedule = schedule or Schedule()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    rng = random.Random(seed)  # noqa: S311 (texts, not secrets)
    train(
        model,
        tokenizer,
        lambda: language.pretraining(rng),
        steps=schedule.pretraining,
        batch=schedule.batch,
        peak=schedule.pretraining_rate,
        whole=True,
    )
    train(
        model,
        tokenizer,
        lambda: language.alignment(rng),
        steps=schedule.alignment,
        batch=schedule.batch,
        peak=schedule.alignment_rate,
        whole=False,
    )
    write(model, tokenizer, out)
    if not (out / "README.md").exists():
        (out / "README.md").write_text(CARD.format(seed=seed), encoding="utf-8")


def main() -> None:
    """Parse the command line and build the model."""
    parser = argparse.ArgumentParser(prog="python -m backmerge.demo.build", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1, help="of the weights and the texts")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model", help="directory to write")
    arguments = parser.parse_args()
    build(arguments.seed, arguments.out)


if __name__ == "__main__":
    main()
