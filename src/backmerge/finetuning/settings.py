"""The settings of fine-tuning; the defaults are the paper's."""

from __future__ import annotations

import math
import os
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from backmerge.config import Settings
from backmerge.errors import ConfigError
from backmerge.finetuning.data_settings import DataSettings

PositiveInt = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # the range that numpy accepts


class LoraSettings(Settings):
    """Low-rank adaptation of all linear layers.

    Attributes:
        r: Rank.
        alpha: The delta is scaled by alpha / r.
        dropout: Dropout of the adapter's input; 0 in the paper, otherwise one of the baselines of its second version.
        dora: Weight-decomposed (DoRA): each row's magnitude is trained separately.
        quantize: `nf4` trains on a base in 4 bits (QLoRA), for GPUs that are too small otherwise. The adapter is merged
            onto the unquantised base, which differs from the one in training by the quantisation error.
    """

    r: PositiveInt = 8
    alpha: Annotated[float, Field(gt=0)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dora: bool = False
    quantize: Literal["nf4"] | None = None


class FinetuneSettings(Settings):
    """One tuned model per seed.

    Attributes:
        dataset: A task (reasoning, medical, code, tools), a file of prompts and answers, or a data set on the hub.
        data: Which rows of it, and how they are read.
        seeds: Seeds of the adapter's initialisation, the order of the data, and the validation split.
        epochs: Passes over the data, unless `steps` is given.
        steps: Optimiser steps; the schedule spans them.
        snapshot_steps: Use the model after this many steps, from the middle of the full schedule, as the paper does.
        keep_every: Also keep each k-th step's model: the path from base to tuned.
        batch_size: Examples per step, over all devices together.
        micro_batch_size: Examples at once on a device; gradients of smaller batches are added up to the step's.
        learning_rate: Peak, after a warm-up over `warmup` of the steps, then a cosine to 0.
        warmup: Share of the steps.
        weight_decay: Weight decay of AdamW.
        ema: Write the exponential moving average of the trained weights with this decay instead of the last weights: a
            merge along the path.
        cutoff: Longest example in tokens, at most the model's context; longer ones lose their end, and
            are counted.
        device: `auto` uses a GPU if there is one; `cpu` gives the same adapter on machines with and without.
        dtype: Dtype of the computation: `auto` is bfloat16 on a GPU that has it, and float32 otherwise. bfloat16 is
            also faster on CPUs with AVX-512 BF16 or AMX.
        mode: `lora` trains an adapter, `full` all weights.
        lora: The adapter.
        gradient_checkpointing: Compute activations twice instead of keeping them: less memory, more time.
        validate_every: Steps between losses on the held-out rows; a tenth of all steps by default.
        save_every: Steps between the states from which a killed training continues.
        report_to: Where else losses are reported, by the transformers Trainer's names: tensorboard, wandb, mlflow,
            trackio.
    """

    dataset: str
    data: DataSettings = DataSettings()
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (42, 1024, 48763)
    epochs: Annotated[float, Field(gt=0)] = 3.0
    steps: PositiveInt | None = None
    snapshot_steps: PositiveInt | None = None
    keep_every: PositiveInt | None = None
    batch_size: PositiveInt = 8
    micro_batch_size: PositiveInt | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    cutoff: PositiveInt = 1024
    device: Literal["auto", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    mode: Literal["lora", "full"] = "lora"
    lora: LoraSettings = LoraSettings()
    gradient_checkpointing: bool = False
    validate_every: PositiveInt | None = None
    save_every: PositiveInt = 100
    report_to: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.mode == "full" and self.lora != LoraSettings():
            raise ValueError("'lora' has settings, but mode 'full' trains no adapter; remove one of the two")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


class Batches(NamedTuple):
    """How a step's examples are distributed.

    Attributes:
        per_device: Examples at once on each device.
        num_accumulated: Number of such batches whose gradients are added up.
        num_devices: Processes that train together.
    """

    per_device: int
    num_accumulated: int
    num_devices: int


def schedule_steps(settings: FinetuneSettings, num_examples: int) -> int:
    """Return the optimiser steps that the learning rate's schedule spans."""
    if settings.steps is not None:
        return settings.steps
    per_epoch = -(-num_examples // settings.batch_size)
    return -int(-settings.epochs * per_epoch // 1)


def num_steps(settings: FinetuneSettings, num_examples: int) -> int:
    """Return the optimiser steps that are taken: the schedule's, or those up to the snapshot in its middle.

    Raises:
        ConfigError: the snapshot is beyond the schedule.
    """
    total = schedule_steps(settings, num_examples)
    if settings.snapshot_steps is None:
        return total
    if settings.snapshot_steps > total:
        raise ConfigError(
            f"finetune.snapshot_steps is {settings.snapshot_steps}, but the whole schedule has only {total} steps "
            f"({num_examples} examples, {settings.batch_size} a step)",
            remedy="lower it, train for more epochs, or remove it.",
        )
    return settings.snapshot_steps


def learning_rate_at(step: int, settings: FinetuneSettings, total: int) -> float:
    """Return the learning rate after `step` of `total` steps: linear from 0 to its peak, then half a cosine to 0.

    Source: Farn et al. (arXiv 2412.19512), released scripts: cosine schedule, warm-up ratio 0.1.
    """
    warmup = math.ceil(settings.warmup * total)
    if step < warmup:
        return settings.learning_rate * step / warmup
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def batches(settings: FinetuneSettings) -> Batches:
    """Distribute a step's examples over the processes that `accelerate launch` or `torchrun` started.

    Raises:
        ConfigError: they cannot be distributed evenly.
    """
    num_devices = int(os.environ.get("WORLD_SIZE", "1"))
    share, rest = divmod(settings.batch_size, num_devices)
    if rest:
        raise ConfigError(
            f"{num_devices} processes cannot share batches of {settings.batch_size} examples evenly",
            remedy=f"make finetune.batch_size a multiple of {num_devices}.",
        )
    per_device = min(settings.micro_batch_size or share, share)
    if share % per_device:
        raise ConfigError(
            f"each of {num_devices} processes gets {share} examples a step, which micro_batch_size {per_device} does "
            "not divide",
            remedy="choose a divisor.",
        )
    return Batches(per_device, share // per_device, num_devices)
