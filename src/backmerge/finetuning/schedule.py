"""How many steps a training takes, of how many examples, at which learning rate."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

from backmerge.errors import ConfigError
from backmerge.finetuning.settings import FinetuneSettings


class Batches(NamedTuple):
    """How a step's examples are spread.

    Attributes:
        per_device: Examples at once on each device.
        num_accumulated: Such batches whose gradients are added up.
        num_devices: Processes that train together.
    """

    per_device: int
    num_accumulated: int
    num_devices: int


def schedule_steps(settings: FinetuneSettings, num_examples: int) -> int:
    """Optimiser steps that the learning rate's schedule runs over."""
    if settings.steps is not None:
        return settings.steps
    per_epoch = -(-num_examples // settings.batch_size)
    return -int(-settings.epochs * per_epoch // 1)


def num_steps(settings: FinetuneSettings, num_examples: int) -> int:
    """Optimiser steps that are taken: the schedule's, or up to the snapshot in its middle.

    Raises:
        ConfigError: the snapshot lies beyond the schedule.
    """
    total = schedule_steps(settings, num_examples)
    if settings.snapshot_steps is None:
        return total
    if settings.snapshot_steps > total:
        raise ConfigError(
            f"finetune.snapshot_steps is {settings.snapshot_steps}, and the whole schedule has {total} steps "
            f"({num_examples} examples, {settings.batch_size} a step)",
            remedy="lower it, train for more epochs, or leave it out.",
        )
    return settings.snapshot_steps


def learning_rate_at(step: int, settings: FinetuneSettings, total: int) -> float:
    """The learning rate after `step` of `total` steps: linear from 0 to its peak, then half a cosine to 0.

    Source: Farn et al. (arXiv 2412.19512), released scripts: cosine schedule, warm-up ratio 0.1.
    """
    warmup = math.ceil(settings.warmup * total)
    if step < warmup:
        return settings.learning_rate * step / warmup
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def batches(settings: FinetuneSettings) -> Batches:
    """A step's examples over the processes that `accelerate launch` or `torchrun` started.

    Raises:
        ConfigError: they cannot be spread evenly.
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
