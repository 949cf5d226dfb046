"""Write a model's directory: files of their final size first, tensors into them in any order, the index last."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

from backmerge.checkpoints.files import TensorInfo, header_bytes, num_bytes
from backmerge.checkpoints.reader import INDEX, SINGLE
from backmerge.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD_BYTES = 5_000_000_000


class CheckpointWriter:
    """Shards of their final size, to be filled from several threads; a context manager.

    Args:
        directory: An empty directory that nobody reads yet.
        infos: Shape and dtype of every tensor, in the order in which they are stored.
        metadata: Entries for every shard's header; the format entry that transformers needs is added.
        max_shard_bytes: Largest size of a shard's tensors, unless a single one is larger.

    Raises:
        CheckpointError: a dtype is unknown.
        OSError: the disk has not enough room; found before the first tensor is written.
    """

    def __init__(
        self,
        directory: Path,
        infos: Mapping[str, TensorInfo],
        metadata: Mapping[str, str] | None = None,
        max_shard_bytes: int | None = None,
    ) -> None:
        self.directory = directory
        sizes = {name: num_bytes(name, info) for name, info in infos.items()}
        self._item = {name: sizes[name] // info.num_elements for name, info in infos.items() if info.num_elements}
        shards = _shards(sizes, max_shard_bytes or MAX_SHARD_BYTES)
        self._places: dict[str, tuple[int, int]] = {}
        self._weight_map: dict[str, str] = {}
        self._total = sum(sizes.values())
        self._descriptors: list[int] = []
        self._has_index = len(shards) > 1
        with ExitStack() as stack:
            stack.callback(self.close)  # closes the open ones if one cannot be made
            for number, names in enumerate(shards, start=1):
                file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                self._open(file, names, infos, metadata or {})
            stack.pop_all()

    def _open(
        self, file: str, names: Sequence[str], infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]
    ) -> None:
        """Make a shard of its final size, with its header."""
        header, begins, length = header_bytes(names, infos, metadata)
        descriptor = os.open(self.directory / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._descriptors.append(descriptor)
        _allocate(descriptor, length)
        _write(descriptor, memoryview(header), 0)
        self._places.update({name: (descriptor, begin) for name, begin in begins.items()})
        self._weight_map.update(dict.fromkeys(names, file))

    def write(self, name: str, start: int, block: Tensor) -> None:
        """Write elements of a tensor, already in its dtype, to their position; from any thread."""
        import torch

        descriptor, begin = self._places[name]
        raw = block.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        if len(raw):
            offset = begin + start * self._item[name]
            _write(descriptor, raw.data, offset)
            _begin_write_back(descriptor, offset, len(raw))

    def close(self) -> None:
        """Close the files; an unfinished model has no index."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def finish(self) -> None:
        """Sync the tensors to disk, then write the index if there are several shards."""
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        if self._has_index:
            index = {"metadata": {"total_size": self._total}, "weight_map": self._weight_map}
            (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_weights(
    directory: Path,
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write whole tensors, one after the other; see `CheckpointWriter`."""
    check_room(directory, [infos])
    with CheckpointWriter(directory, infos, metadata) as writer:
        for name, tensor in tensors:
            writer.write(name, 0, tensor)
        writer.finish()


def check_room(directory: Path, models: Sequence[Mapping[str, TensorInfo]]) -> None:
    """Refuse to start if the disk has not enough room.

    Args:
        directory: An existing folder on the target disk.
        models: The tensors of each model that will be written.

    Raises:
        CheckpointError: the disk has not enough room, or a dtype is unknown.
    """
    needed = sum(num_bytes(name, info) for infos in models for name, info in infos.items())
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise CheckpointError(
            f"writing to {directory} needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free",
            remedy="free some space, or give an --out on another disk; nothing was written.",
        )


def _shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _allocate(descriptor: int, length: int) -> None:
    """Allocate the room on the disk now, so that a full disk is found before the work and not halfway."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, length)
    else:
        os.ftruncate(descriptor, length)  # macOS: the length is set; room is allocated as the file is filled


def _begin_write_back(descriptor: int, offset: int, length: int) -> None:
    """Start writing to disk while the merge goes on, so that the last sync has little to wait for.

    The advice drops only clean pages, and those just written are not clean: it is used here to start writing them.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


def _write(descriptor: int, raw: memoryview, offset: int) -> None:
    done = 0
    while done < len(raw):
        done += os.pwrite(descriptor, raw[done:], offset + done)
