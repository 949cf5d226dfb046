"""LoRA fine-tuning with transformers' Trainer; writes an ordinary peft adapter, whole or not at all."""

from __future__ import annotations

import json
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments, set_seed

from backmerge import __version__
from backmerge.checkpoints.adapter import CONFIG
from backmerge.checkpoints.reader import Checkpoint, read_json
from backmerge.errors import ConfigError, DataError
from backmerge.finetuning.encoding import encode
from backmerge.finetuning.settings import FinetuneSettings
from backmerge.generation.chat import load_tokenizer
from backmerge.generation.loading import load_model
from backmerge.records import Example, to_json
from backmerge.runs import key_of, whole_directory

CARD = "backmerge.json"
LOG_EVERY = 10  # steps between losses in loss.jsonl


def training_key(base: Checkpoint, examples: Sequence[Example], settings: FinetuneSettings, seed: int) -> str:
    """A hash of everything that an adapter depends on."""
    versions = {
        "backmerge": __version__,
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
        GenerationError: the base cannot be loaded.
        ConfigError: the training diverged.
    """
    if not examples:
        raise DataError("there is nothing to tune on: the data set is empty")
    tokenizer = load_tokenizer(base.directory)
    encoded = [encode(tokenizer, example, settings.cutoff) for example in examples]
    # on the right: the forward pass of training counts positions from the first column, padding included
    tokenizer.padding_side = "right"
    has_bf16 = settings.device == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    with (
        tempfile.TemporaryDirectory(prefix="backmerge-") as scratch,
        whole_directory(directory) as temporary,
        _randomness_from(seed),
    ):
        tuned = _with_adapter(load_model(base.directory, torch.bfloat16 if has_bf16 else torch.float32), settings)
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
        _check_finite(tuned, settings)
        tuned.save_pretrained(temporary)
        _sort_targets(temporary / CONFIG)
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


def _with_adapter(model: Any, settings: FinetuneSettings) -> Any:
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.lora.r,
        lora_alpha=settings.lora.alpha,
        lora_dropout=settings.lora.dropout,
        target_modules="all-linear",
    )
    with warnings.catch_warnings():
        # peft 0.21 asks the model for a property that transformers 5.23 has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, lora)


@contextmanager
def _randomness_from(seed: int) -> Iterator[None]:
    """Seed the global generators that the Trainer draws from, and put them back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            set_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _sort_targets(config: Path) -> None:
    """Peft lists the target modules in the order of a set, which changes from one process to the next."""
    values = read_json(config)
    values["target_modules"] = sorted(values["target_modules"])
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_finite(tuned: Any, settings: FinetuneSettings) -> None:
    if not all(bool(torch.isfinite(p).all()) for p in tuned.parameters() if p.requires_grad):
        raise ConfigError(
            f"the training diverged: at a learning rate of {settings.learning_rate:g} the adapter's weights became NaN "
            "or infinite, so nothing was written",
            remedy="lower finetune.learning_rate, or raise finetune.warmup.",
        )


def num_steps(settings: FinetuneSettings, num_examples: int) -> int:
    """Optimiser steps of one seed."""
    if settings.steps is not None:
        return settings.steps
    per_epoch = -(-num_examples // settings.batch_size)
    return -int(-settings.epochs * per_epoch // 1)


def _arguments(settings: FinetuneSettings, seed: int, scratch: str, *, has_bf16: bool) -> TrainingArguments:
    arguments = TrainingArguments(
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
        use_cpu=settings.device == "cpu",
        seed=seed,
        data_seed=seed,
        logging_steps=LOG_EVERY,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=settings.device == "auto" and torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # on several GPUs the Trainer would multiply the batch by their number
    return arguments


class _Advance(TrainerCallback):  # type: ignore[misc] # transformers is not typed
    """Tells of each step that is done."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - the Trainer's own signature
        """Called by the Trainer."""
        self.advance(1)
