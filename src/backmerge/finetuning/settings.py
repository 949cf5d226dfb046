"""What fine-tuning can be told; the defaults are the paper's."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from backmerge.config import Settings
from backmerge.finetuning.data_settings import DataSettings

PositiveInt = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes


class LoraSettings(Settings):
    """Low-rank adaptation of all linear layers.

    Attributes:
        r: Rank.
        alpha: The delta is scaled by alpha / r.
        dropout: Of the adapter's input; 0 in the paper, one of the baselines of its second version otherwise.
        dora: Weight-decomposed (DoRA): each row's magnitude is trained by itself.
        quantize: `nf4` trains on a base in 4 bits (QLoRA), for GPUs that do not hold it otherwise. The adapter is
            merged onto the base as it is, which differs from the one seen in training by the quantisation error.
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
        seeds: Of the adapter's initialisation, the order of the data, and the validation split.
        epochs: Passes over the data, unless `steps` is given.
        steps: Optimiser steps; the schedule runs over them.
        snapshot_steps: Take the model after so many steps, from the middle of the full schedule, as the paper does.
        keep_every: Also keep each k-th step's model: the path from base to tuned.
        batch_size: Examples per step, over all devices together.
        micro_batch_size: Examples at once on a device; gradients of smaller batches are added up to the step's.
        learning_rate: Peak, after a warm-up over `warmup` of the steps, then a cosine to 0.
        warmup: Share of the steps.
        weight_decay: Of AdamW.
        ema: Hand over the exponential moving average of the trained weights with this decay instead of the last ones:
            a merge along the path.
        cutoff: Longest example in tokens, and never longer than the model's context; longer ones lose their end, and
            are counted.
        device: `auto` takes a GPU if there is one; `cpu` gives the same adapter on machines with and without.
        dtype: Of the computation: `auto` is bfloat16 on a GPU that has it, and float32 otherwise. bfloat16 is also
            faster on CPUs with AVX-512 BF16 or AMX.
        mode: `lora` trains an adapter, `full` all weights.
        lora: The adapter.
        gradient_checkpointing: Compute activations twice instead of keeping them: less memory, more time.
        validate_every: Steps between losses on the held-out rows; a tenth of all steps by default.
        save_every: Steps between the states that a killed training goes on from.
        report_to: Where else losses go, as the transformers Trainer names it: tensorboard, wandb, mlflow, trackio.
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
            raise ValueError("'lora' has settings, and mode 'full' trains no adapter; leave one of the two out")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of micro_batch_size {self.micro_batch_size}")
        return self
