"""Fingerprints: XXH3 (128 bit) of what decides a model's answers; of tensors, in blocks and in any order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from backmerge.checkpoints.files import ITEM_BYTES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 20  # elements that are hashed at once
FILE_BLOCK = 1 << 24  # bytes of a file that are hashed at once


class TensorDigests:
    """The digests of a model's tensors, gathered as their blocks pass, in any order and by any thread.

    Args:
        infos: Shape and dtype of every tensor.
    """

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        self._infos = dict(infos)
        self._digests: dict[tuple[str, int], bytes] = {}

    def add(self, name: str, start: int, block: Tensor) -> None:
        """Take in the elements from `start` on: whole blocks of 2^20, the last of a tensor excepted."""
        import torch

        raw = block.view(-1).view(torch.uint8)
        size = BLOCK * block.element_size()
        for index, at in enumerate(range(0, max(len(raw), 1), size), start=start // BLOCK):
            self.add_bytes(name, index, raw[at : at + size])

    def add_bytes(self, name: str, index: int, raw: Tensor) -> None:
        """Take in one block by its place among the tensor's, as bytes."""
        self._digests[name, index] = xxhash.xxh3_128_digest(raw.numpy().data)

    @property
    def is_complete(self) -> bool:
        """Whether every block was taken in."""
        return len(self._digests) == sum(num_blocks(info) for info in self._infos.values())

    def combined(self) -> bytes:
        """One digest of names, shapes, dtypes and values, whatever the files that hold them."""
        digest = xxhash.xxh3_128()
        for name in sorted(self._infos):
            info = self._infos[name]
            digest.update(json.dumps([name, info.dtype, info.shape]).encode())
            for index in range(num_blocks(info)):
                digest.update(self._digests[name, index])
        return digest.digest()


def num_blocks(info: TensorInfo) -> int:
    """In how many blocks a tensor is hashed; an empty one counts as one."""
    elements = info.num_elements if info.dtype in ITEM_BYTES else info.length  # packed dtypes are taken as bytes
    return max(1, -(-elements // BLOCK))


def fingerprint_of_files(files: set[Path], start: bytes = b"") -> str:
    """A hash over names and bytes of files, in the order of the names, and of what it is started with."""
    digest = xxhash.xxh3_128(start)
    for file in sorted(files, key=lambda path: path.name):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(FILE_BLOCK):
                digest.update(block)
    return digest.hexdigest()
