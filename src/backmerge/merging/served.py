"""The form in which a model is served, so that the measured model is the one that is written.

An adapter is served next to its base: the base keeps its dtype, the factors keep theirs, and the change is never
rounded to the base's dtype. A checkpoint has weights that are rounded to its dtype, which may lose most of a small
change. So the two are different models whenever the base is not in float32, and every `Variant` states which one it is.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from backmerge.checkpoints.adapter import AdapterOnBase, is_adapter
from backmerge.checkpoints.files import FLOATS, ITEM_BYTES, TORCH_NAMES, num_bytes
from backmerge.checkpoints.reader import CARD, Checkpoint, Weights, read_json
from backmerge.errors import ConfigError
from backmerge.merging.lowrank import adapter_identity, adapter_obstacle, write_adapter
from backmerge.merging.methods.linear import linear
from backmerge.merging.recipe import Form, Variant
from backmerge.runs import key_of

HEADROOM = 1.3  # memory needed, as a multiple of the weights' size: activations and buffers
Wanted = Literal["auto", "adapter", "checkpoint"]


class Realisation(NamedTuple):
    """How a model was measured.

    Attributes:
        served_as: What a user loads: `adapter` or `checkpoint`; `server` for a model on a server, `earlier` for answers
            of an earlier run.
        dtype: Of the adapter's factors or the checkpoint's tensors, as torch names it; `None` for those two.
        reached_as: How the engine got it: `base` (its files), `live` (weights overwritten in memory), `adapter` (loaded
            by peft or vLLM), `checkpoint` (written for the engine); `None` for those two.
        computed_in: Dtype of the engine's computation, as torch names it; `None` if that is not known.
    """

    served_as: Literal["adapter", "checkpoint", "server", "earlier"]
    dtype: str | None
    reached_as: str | None
    computed_in: str | None


def in_form(variant: Variant, wanted: Wanted = "auto") -> Variant:
    """Return the variant in the form in which it is served.

    Args:
        variant: The recipe.
        wanted: `auto` is an adapter if that represents the recipe exactly (see `adapter_obstacle`), otherwise a
            checkpoint.

    Raises:
        ConfigError: an adapter is wanted, and the recipe is not one.
    """
    if not variant.tuned_models:
        return variant
    form: Form = "checkpoint"
    if wanted != "checkpoint":
        obstacle = adapter_obstacle(variant)
        if obstacle is None:
            form = "adapter"
        elif wanted == "adapter":
            raise ConfigError(
                f"this merge cannot be an adapter: {obstacle}",
                remedy="remove --as (merged_as), or give checkpoint: the merge is then written whole.",
            )
    return replace(variant, served_as=form)


def as_given(variant: Variant) -> Variant:
    """Return a tuned model in the form in which the user has it: an adapter stays one, of whatever kind."""
    tuned = variant.tuned_models
    if len(tuned) == 1 and isinstance(tuned[0], AdapterOnBase):
        return replace(variant, served_as="adapter", dtype=None)
    return variant


def is_own_adapter(variant: Variant) -> bool:
    """Return whether a variant is an unchanged adapter on disk."""
    return (
        variant.served_as == "adapter"
        and len(variant.tuned_models) == 1
        and isinstance(variant.tuned_models[0], AdapterOnBase)
        and variant.method == linear
        and isinstance(variant.lam, int | float)
        and variant.lam == 1
        and variant.dtype is None
    )


def adapter_of(variant: Variant, scratch: Path) -> AdapterOnBase:
    """Return the adapter that a variant is served as: its own files, or files written to a folder.

    Args:
        variant: A variant that is served as an adapter.
        scratch: Folder that it may be written to.

    Raises:
        MergeError: see `write_adapters`.
    """
    assert variant.served_as == "adapter"
    if is_own_adapter(variant):
        own = variant.tuned_models[0]
        assert isinstance(own, AdapterOnBase)
        return own
    place = scratch / f"adapter-{key_of(variant.identity)[:12]}"
    write_adapter(variant, place)
    return AdapterOnBase(place, variant.base)


def write_served(
    variant: Variant,
    directory: Path,
    *,
    verify: Callable[[Path, Variant], None] | None = None,
) -> float | None:
    """Write a merge in the form in which it is served; return the share of the change that rounding lost, if known.

    Raises:
        BackmergeError: see `write_adapters` and `write_all`.
    """
    if variant.served_as == "adapter":
        write_adapter(variant, directory, verify=verify)
        return None
    # imported here, since adapters are written without torch
    from backmerge.merging.to_disk import write_merged

    return write_merged(variant, directory, verify=verify).rounding_loss


def opened(directory: Path, base: Weights) -> Variant:
    """Open a written merge as its user loads it: a checkpoint alone, an adapter on the base."""
    if is_adapter(directory):
        return Variant(base, AdapterOnBase(directory, base), served_as="adapter")
    return Variant(Checkpoint(directory))


def is_written(directory: Path, variant: Variant) -> bool:
    """Return whether a folder contains a merge of this recipe in this form, by the card next to it."""
    if not (directory / CARD).is_file() or is_adapter(directory) is not (variant.served_as == "adapter"):
        return False
    recipe = adapter_identity(variant) if variant.served_as == "adapter" else variant.identity
    return key_of(read_json(directory / CARD).get("recipe")) == key_of(recipe)


def dtype_of(weights: Weights) -> str:
    """Return the dtype of most of a model's elements, as torch names it."""
    counts: Counter[str] = Counter()
    for info in weights.infos.values():
        if info.dtype in FLOATS:
            counts[info.dtype] += info.num_elements
    return TORCH_NAMES[counts.most_common(1)[0][0]] if counts else "float32"


def served_dtype(variant: Variant) -> str:
    """Return the dtype that a user loads, as torch names it: that of an adapter's factors or a checkpoint's tensors."""
    if variant.dtype is not None:
        return TORCH_NAMES[variant.dtype]
    if variant.served_as == "checkpoint":
        return dtype_of(variant.base)
    if not is_own_adapter(variant):
        return "float32"
    own = variant.tuned_models[0]
    assert isinstance(own, AdapterOnBase)
    kinds = Counter(info.dtype for info in own.file.infos.values() if info.dtype in FLOATS)
    return TORCH_NAMES[kinds.most_common(1)[0][0]] if kinds else "float32"


Way = Literal["adapter", "live", "checkpoint"]
CHEAPEST_FIRST: tuple[Way, ...] = ("adapter", "live", "checkpoint")


class Cheapest(NamedTuple):
    """The realisation chosen for a recipe.

    Attributes:
        realisation: Its name.
        reason: Why this one, in words that follow its name.
        num_bytes: Bytes that it writes to disk; for an adapter those of its factors, in float32.
    """

    realisation: Way
    reason: str
    num_bytes: int


def plan(variant: Variant, takes: Collection[Way] = CHEAPEST_FIRST) -> Cheapest:
    """Return the first of adapter, live weights and checkpoint that is exact and that the consumer takes.

    An adapter comes first: it keeps the merge unrounded, is written in milliseconds, and one engine serves several.
    Live weights, which never touch the disk, come next; a checkpoint is always possible.

    Args:
        variant: The recipe.
        takes: What the consumer takes: vLLM adapters and checkpoints, an engine in this process all three.
    """
    obstacle = adapter_obstacle(variant)
    if obstacle is None and "adapter" in takes:
        return Cheapest("adapter", "the merge is low-rank and is kept unrounded", _factor_bytes(variant))
    why_not = "adapters are not supported here" if obstacle is None else obstacle
    if "live" in takes:
        return Cheapest("live", f"no adapter: {why_not}", 0)
    return Cheapest("checkpoint", f"no adapter: {why_not}", checkpoint_bytes(variant))


def checkpoint_bytes(variant: Variant) -> int:
    """Return the size of the merged tensors on disk, in bytes."""
    return sum(
        info.num_elements * ITEM_BYTES[variant.dtype]
        if variant.dtype and info.dtype in FLOATS
        else num_bytes(name, info)
        for name, info in variant.base.infos.items()
    )


def _factor_bytes(variant: Variant) -> int:
    files = [weights.file for weights in variant.tuned_models if isinstance(weights, AdapterOnBase)]
    return sum(4 * info.num_elements for file in files for info in file.infos.values())


def verification_obstacle(base: Weights) -> str | None:
    """Return why a merge cannot be compared with peft's, if it cannot: both models must fit in memory in float32."""
    needed = HEADROOM * 4 * sum(info.num_elements for info in base.infos.values())
    if needed <= _free_memory():
        return None
    return f"Not verified against peft: that needs {needed / 1e9:.0f} GB of memory, and less is free."


def _free_memory() -> float:
    """Return the bytes that can be used without swapping, according to the system."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            found = next(line for line in lines if line.startswith("MemAvailable"))
        return float(found.split()[1]) * 1024
    except (OSError, StopIteration):  # macOS has no such file
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2
