"""The checkpoint realisation: merged models as Hugging Face directories, several λs in one pass over the inputs."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backmerge import __version__
from backmerge.checkpoints.files import TORCH_NAMES, TensorDigests
from backmerge.checkpoints.reader import CARD, Checkpoint, read_json
from backmerge.checkpoints.writer import CheckpointWriter, check_room
from backmerge.errors import CheckpointError, remedy_for
from backmerge.merging.blocks import Merge
from backmerge.merging.engine import carry_out
from backmerge.merging.recipe import Variant
from backmerge.outputs import damage_of, listed_files
from backmerge.runs import whole_directory


class Written(NamedTuple):
    """A merged model on disk.

    Attributes:
        directory: The model's folder.
        rounding_loss: The share of the change that its dtype lost (see `RoundingLoss`), if known.
    """

    directory: Path
    rounding_loss: float | None


Verify = Callable[[Path, Variant], None]  # raises if what was written to a folder is not the recipe


def write_merged(
    variant: Variant,
    directory: Path,
    *,
    replace: bool = False,
    verify: Verify | None = None,
) -> Written:
    """Write one merged model; see `write_all`."""
    return write_all({directory: variant}, replace=replace, verify=verify)[0]


def write_all(
    outputs: Mapping[Path, Variant],
    *,
    max_shard_bytes: int | None = None,
    sha256: bool = False,
    workers: int | None = None,
    replace: bool = False,
    advance: Callable[[int], None] | None = None,
    add_files: Callable[[Path, Written], None] | None = None,
    verify: Verify | None = None,
) -> list[Written]:
    """Write merged models as Hugging Face directories, each whole or not at all, reading the inputs once.

    Args:
        outputs: Directory to variant; the variants differ in λ alone.
        max_shard_bytes: Largest size of a shard's tensors; by default 5 GB.
        sha256: Whether the card also lists the files' SHA-256, which takes longer than the merge.
        workers: Number of threads.
        replace: Whether to replace models that backmerge wrote in these directories.
        advance: Progress callback; gets the number of finished elements.
        add_files: Writes other files of a merge, such as a model card, into its folder before the folder is moved into
            place.
        verify: Checks the last one before any is moved into place; all come from one pass.

    Raises:
        MergeError: see `Merge` and `Merge.merged`; or what `verify` raises.
        CheckpointError: the disk has not enough room, or cannot be written to.
        RunError: one of the directories exists, or was made by another process meanwhile.
    """
    merge = Merge(list(outputs.values()))
    try:
        with ExitStack() as stack:
            places = [stack.enter_context(whole_directory(directory, replace=replace)) for directory in outputs]
            check_room(places[0].parent, [merge.infos] * len(places))
            metadata = merge.base.metadata
            writers = [
                stack.enter_context(CheckpointWriter(place, merge.infos, metadata, max_shard_bytes)) for place in places
            ]
            digests = [TensorDigests(merge.infos) for _ in places]
            is_blockwise = merge.method is None or merge.method.cut != "rows"

            def write(number: int, name: str, start: int, block: Tensor) -> None:
                if is_blockwise:
                    digests[number].add(name, start, block)
                writers[number].write(name, start, block)

            carry_out(merge, write, workers=workers, advance=advance)
            written = [Written(path, loss.share) for path, loss in zip(outputs, merge.losses, strict=True)]
            for number, (place, variant) in enumerate(zip(places, outputs.values(), strict=True)):
                writers[number].finish()
                variant.companions.write(place)
                _name_dtype(place, variant)
                _write_card(place, variant, digests[number], written[number].rounding_loss, sha256=sha256)
                if add_files is not None:
                    add_files(place, written[number])
            if verify is not None:
                verify(places[-1], list(outputs.values())[-1])
    except OSError as error:
        where = next(iter(outputs)) if len(outputs) == 1 else next(iter(outputs)).parent
        raise CheckpointError(
            f"cannot write {where}: {error}",
            remedy=f"{remedy_for(error) or 'Give another --out.'} Nothing was left there.",
        ) from error
    return written


def damage_of_merged(directory: Path) -> str | None:
    """Return how a merged model on disk differs from what was written, or `None`; reads all of it."""
    damage = damage_of(directory)
    if damage is not None:
        return damage
    try:
        is_same = Checkpoint(directory).fingerprint == read_json(directory / CARD).get("fingerprint")
    except CheckpointError as error:
        return error.message
    return None if is_same else "its tensors were changed after they were written, or files were added to it"


def _name_dtype(directory: Path, variant: Variant) -> None:
    """Record the dtype of the tensors in the configuration."""
    if variant.dtype is None:
        return
    config = read_json(directory / "config.json")

    def renamed(values: dict[str, Any]) -> dict[str, Any]:
        name = TORCH_NAMES[str(variant.dtype)]
        return {
            key: renamed(value) if isinstance(value, dict) else name if key in ("dtype", "torch_dtype") else value
            for key, value in values.items()
        }

    (directory / "config.json").write_text(json.dumps(renamed(config), indent=2) + "\n", encoding="utf-8")


def _write_card(directory: Path, variant: Variant, digests: TensorDigests, loss: float | None, *, sha256: bool) -> None:
    written = Checkpoint(directory)
    written.adopt(digests)
    card: dict[str, Any] = {
        "backmerge": __version__,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "recipe": variant.identity,
        "fingerprint": written.fingerprint,
        "rounding_loss": loss,
    }
    shards = sorted(file.name for file in directory.glob("*.safetensors"))
    if sha256:
        card["sha256"] = {name: _sha256(directory / name) for name in shards}
    card["files"] = listed_files(directory, without_digest=shards)  # the fingerprint covers the tensors
    (directory / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's names of its settings
KEPT = 64 << 20  # bytes


def keep_freed_memory() -> None:
    """Let glibc keep up to 64 MB of freed memory, rather than return it and fault it in again for every block.

    The temporaries of a block are some megabytes; without this, up to a third of a merge's CPU time goes to clearing
    their pages. It applies to the whole process, so the command must request it; without glibc it does nothing.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(TRIM_THRESHOLD, KEPT)
        libc.mallopt(MMAP_THRESHOLD, KEPT // 2)
