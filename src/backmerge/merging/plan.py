"""The cheapest way to realise a recipe that is exact, and that whoever wants it can take."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

from backmerge.checkpoints.files import FLOATS, ITEM_BYTES, num_bytes
from backmerge.merging.lowrank import adapter_obstacle
from backmerge.merging.recipe import Variant

Realisation = Literal["adapter", "live", "checkpoint"]
CHEAPEST_FIRST: tuple[Realisation, ...] = ("adapter", "live", "checkpoint")


class Plan(NamedTuple):
    """How a recipe is to be realised.

    Attributes:
        realisation: The way.
        reason: Why this one, in words that follow its name.
        num_bytes: What it puts on the disk; an adapter's is that of its factors, in float32.
    """

    realisation: Realisation
    reason: str
    num_bytes: int


def plan(variant: Variant, takes: Collection[Realisation] = CHEAPEST_FIRST) -> Plan:
    """The first of adapter, live weights and checkpoint that is exact here and taken there.

    An adapter comes first, since it holds the merge unrounded, is written in milliseconds, and several are served by
    one engine; then live weights, which never touch the disk; a checkpoint is always possible.

    Args:
        variant: The recipe.
        takes: What its consumer can take: vLLM adapters and checkpoints, an engine in this process all three.
    """
    obstacle = adapter_obstacle(variant)
    if obstacle is None and "adapter" in takes:
        return Plan("adapter", "the merge is of low rank, and held unrounded", _factor_bytes(variant))
    why_not = "adapters are not taken here" if obstacle is None else obstacle
    if "live" in takes:
        return Plan("live", f"no adapter: {why_not}", 0)
    return Plan("checkpoint", f"no adapter: {why_not}", checkpoint_bytes(variant))


def checkpoint_bytes(variant: Variant) -> int:
    """What the merged tensors take on the disk."""
    return sum(
        info.num_elements * ITEM_BYTES[variant.dtype]
        if variant.dtype and info.dtype in FLOATS
        else num_bytes(name, info)
        for name, info in variant.base.infos.items()
    )


def _factor_bytes(variant: Variant) -> int:
    files = [getattr(weights, "file", None) for weights in variant.tuned_models]
    return sum(4 * info.num_elements for file in files if file is not None for info in file.infos.values())
