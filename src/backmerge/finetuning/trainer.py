"""LoRA fine-tuning with transformers' Trainer; writes an ordinary peft adapter, whole or not at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from backmerge import __version__
from backmerge.checkpoints.reader import Checkpoint
from backmerge.errors import DataError
from backmerge.finetuning.encoding import encode
from backmerge.finetuning.settings import FinetuneSettings
from backmerge.generation.chat import load_tokenizer
from backmerge.records import Example, to_json
from backmerge.runs import key_of, whole_directory

CARD = "backmerge.json"
LOG_EVERY = 10  # steps between losses in loss.jsonl


def training_key(base: Checkpoint, examples: Sequence[Example], settings: FinetuneSettings, seed: int) -> str:
    """A hash of everything that an adapter depends on."""
    versions = {
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "torch": torch.__version__.partition("+")[0],
    }
    kept = settings.model_dump(mode="json", exclude={"seeds", "dataset"})
    return key_of(base.fingerprint, key_of([to_json(example) for example in examples]), kept, seed, versions)


def is_trained(directory: Path, key: str) -> bool:
    """Whether `directory` holds the adapter of that key."""
    card = directory / CARD
    return card.is_file() and json.loads(card.read_text(encoding="utf-8")).get("key") == key


def train_adapter(
    base: Checkpoint,
    examples: Sequence[Example],
    settings: FinetuneSettings,
    seed: int,
    directory: Path,
    advance: Callable[[int], None],
) -> None:
    """Fine-tune the base with LoRA and write the adapter, its losses and what it was made of.

    Args:
        base: The model to tune.
        examples: Prompts with references.
        settings: Hyper-parameters.
        seed: Of the initialisation and of the order of the data.
        directory: Appears when all is written.
        advance: Told of each optimiser step.

    Raises:
        DataError: there are no examples, or one cannot be encoded.
    """
    if not examples:
        raise DataError("there is nothing to tune on: the data set is empty")
    tokenizer = load_tokenizer(base.directory)
    encoded = [encode(tokenizer, example, settings.cutoff) for example in examples]
    set_seed(seed)
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    model = AutoModelForCausalLM.from_pretrained(
        base.directory, dtype=torch.bfloat16 if has_bf16 else torch.float32, trust_remote_code=False
    )
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.lora.r,
        lora_alpha=settings.lora.alpha,
        lora_dropout=settings.lora.dropout,
        target_modules="all-linear",
    )
    tuned = get_peft_model(model, lora)
    with tempfile.TemporaryDirectory(prefix="backmerge-") as scratch, whole_directory(directory) as temporary:
        trainer = Trainer(
            model=tuned,
            args=_arguments(settings, seed, scratch, has_bf16=has_bf16),
            train_dataset=[{"input_ids": e.input_ids, "labels": e.labels} for e in encoded],
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            callbacks=[_Advance(advance)],
        )
        # the progress printer writes each log entry to standard output
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        tuned.save_pretrained(temporary)
        losses = [{"step": e["step"], "loss": e["loss"]} for e in trainer.state.log_history if "loss" in e]
        (temporary / "loss.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in losses))
        card = {
            "backmerge": __version__,
            "key": training_key(base, examples, settings, seed),
            "base_fingerprint": base.fingerprint,
            "dataset": settings.dataset,
            "num_examples": len(examples),
            "num_cut": sum(e.was_cut for e in encoded),
            "seed": seed,
            "final_loss": losses[-1]["loss"] if losses else None,
        }
        (temporary / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def num_steps(settings: FinetuneSettings, num_examples: int) -> int:
    """Optimiser steps of one seed."""
    if settings.steps is not None:
        return settings.steps
    per_epoch = -(-num_examples // settings.batch_size)
    return -int(-settings.epochs * per_epoch // 1)


def _arguments(settings: FinetuneSettings, seed: int, scratch: str, *, has_bf16: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,  # below 1 it is a share of all steps
        weight_decay=settings.weight_decay,
        optim="adamw_torch",
        bf16=has_bf16,
        seed=seed,
        data_seed=seed,
        logging_steps=LOG_EVERY,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


class _Advance(TrainerCallback):  # type: ignore[misc] # transformers is not typed
    """Tells of each step that is done."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - the Trainer's own signature
        """Called by the Trainer."""
        self.advance(1)
