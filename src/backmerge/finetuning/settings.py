"""What fine-tuning can be told; the defaults are the paper's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from backmerge.config import Settings

PositiveInt = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes


class LoraSettings(Settings):
    """Low-rank adaptation of all linear layers.

    Attributes:
        r: Rank.
        alpha: The delta is scaled by alpha / r.
        dropout: Of the adapter's input.
    """

    r: PositiveInt = 8
    alpha: Annotated[float, Field(gt=0)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class FinetuneSettings(Settings):
    """One adapter per seed.

    Attributes:
        dataset: A name from the table of data sets, or a JSON Lines or CSV file of prompts and answers.
        seeds: Of the adapter's initialisation and the order of the data.
        epochs: Passes over the data, unless `steps` is given.
        steps: Optimiser steps; the schedule runs over them.
        batch_size: Examples per step.
        learning_rate: Peak, after a warm-up over `warmup` of the steps, then a cosine to 0.
        warmup: Share of the steps.
        weight_decay: Of AdamW.
        cutoff: Longest example in tokens; longer ones lose their end, and are counted.
        device: `auto` takes a GPU if there is one; `cpu` gives the same adapter on machines with and without.
        lora: The adapter.
    """

    dataset: str
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (42, 1024, 48763)
    epochs: Annotated[float, Field(gt=0)] = 3.0
    steps: PositiveInt | None = None
    batch_size: PositiveInt = 8
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    cutoff: PositiveInt = 1024
    device: Literal["auto", "cpu"] = "auto"
    lora: LoraSettings = LoraSettings()
