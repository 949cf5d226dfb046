"""One safetensors file: the position of each tensor's bytes, read piece by piece without mapping the file."""

from __future__ import annotations

import functools
import json
import math
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open

from backmerge.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


# bytes of an element, by safetensors' name of the dtype; dtypes that are not listed cannot be merged
ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
MERGED_DTYPES: Mapping[str, str] = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
}  # dtypes of merges
# names in numpy, which has no bfloat16: its bits are the upper half of a float32's
NUMPY_NAMES: Mapping[str, str] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# names in torch and in configurations
TORCH_NAMES: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class TensorInfo(NamedTuple):
    """A tensor's entry in a header.

    Attributes:
        shape: Its lengths, outermost first.
        dtype: Its dtype as safetensors names it ("BF16").
        file: The file that contains it.
        offset: Position of its first byte in that file.
        length: Number of its bytes in that file.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int = 0
    length: int = 0

    @property
    def num_elements(self) -> int:
        """The product of the lengths."""
        return math.prod(self.shape)


def torch_dtype(name: str) -> Any:
    """Return the torch dtype of a safetensors dtype.

    Raises:
        KeyError: torch has no such dtype.
    """
    import torch

    return getattr(torch, TORCH_NAMES[name])


class SafetensorsFile:
    """A safetensors file with a valid header.

    Args:
        path: The file.

    Raises:
        CheckpointError: it is truncated, or its header does not follow the format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # the library checks lengths, offsets, overlaps and gaps; tensors are not read
            with safe_open(path, framework="np") as checked:
                self.metadata: dict[str, str] = checked.metadata() or {}
            self._descriptor = os.open(path, os.O_RDONLY)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is not a complete safetensors file: {error}",
                remedy="it is truncated or damaged: download or save it again.",
            ) from error
        weakref.finalize(self, os.close, self._descriptor)
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        header = json.loads(os.pread(self._descriptor, length, 8))
        header.pop("__metadata__", None)
        placed = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        self.infos: dict[str, TensorInfo] = {}
        for name, entry in placed:
            begin, end = entry["data_offsets"]
            self.infos[name] = TensorInfo(tuple(entry["shape"]), entry["dtype"], path, 8 + length + begin, end - begin)

    def read_into(self, place: memoryview, offset: int) -> None:
        """Fill `place` with the bytes from `offset` on.

        Raises:
            CheckpointError: the file became shorter after it was opened, or the disk failed.
        """
        done = 0
        while done < len(place):
            try:
                count = os.preadv(self._descriptor, [place[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"cannot read {self.path}: {error}", remedy="the disk or network failed: try again."
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path} became shorter after it was opened",
                    remedy="another process is changing it: try again when that is done.",
                )
            done += count

    def block(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Return elements of a tensor, flat, as stored.

        Args:
            name: The tensor's name.
            start: First element.
            stop: One past the last.
            buffer: Bytes that the result may be stored in; it is then valid until they are used again.

        Raises:
            CheckpointError: see `read_into`; or the tensor's dtype cannot be merged.
        """
        import torch

        info = self.infos[name]
        size = num_bytes(name, info, stop - start)
        if buffer is None or len(buffer) < size:
            buffer = torch.empty(size, dtype=torch.uint8)
        place = buffer[:size]
        if size:
            self.read_into(place.numpy().data, info.offset + num_bytes(name, info, start))
        return place.view(torch_dtype(info.dtype))

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor, as stored."""
        info = self.infos[name]
        return self.block(name, 0, info.num_elements).reshape(info.shape)

    def float32_block(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return elements of a tensor, flat, in float32, without torch.

        Raises:
            CheckpointError: its dtype is not floating-point; or see `read_into`.
        """
        info = self.infos[name]
        if info.dtype not in FLOATS:
            raise CheckpointError(
                f"tensor '{name}' of {self.path} has dtype {info.dtype}, which cannot be merged",
                remedy="give an adapter in float32, bfloat16 or float16.",
            )
        values = np.empty(stop - start, NUMPY_NAMES[info.dtype])
        self.read_into(values.view(np.uint8).data, info.offset + num_bytes(name, info, start))
        if info.dtype == "BF16":  # the upper half of a float32
            values = (values.astype("<u4") << 16).view("<f4")
        return values.astype(np.float32, copy=False)

    @functools.lru_cache(maxsize=64)  # noqa: B019 - the blocks of a tensor ask for the same factors again and again
    def float32_array(self, name: str) -> np.ndarray:
        """Return a small tensor in float32, without torch; see `float32_block`."""
        info = self.infos[name]
        return self.float32_block(name, 0, info.num_elements).reshape(info.shape)


def num_bytes(name: str, info: TensorInfo, elements: int | None = None) -> int:
    """Return the bytes of a tensor, or of `elements` of its elements.

    Raises:
        CheckpointError: its dtype cannot be merged.
    """
    if info.dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"tensor '{name}' of {info.file} has dtype {info.dtype}, which cannot be merged",
            remedy="give an unquantised checkpoint (bfloat16, float16 or float32).",
        )
    return ITEM_BYTES[info.dtype] * (info.num_elements if elements is None else elements)


def header_bytes(
    names: Sequence[str], infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """Return a file's header, the position of each of its tensors in the file, and the file's length in bytes."""
    entries: dict[str, object] = {"__metadata__": {**metadata, "format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    for name in names:
        begins[name] = end
        end += num_bytes(name, infos[name])
        entries[name] = {
            "dtype": infos[name].dtype,
            "shape": list(infos[name].shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format requires tensors to start at a multiple of 8
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + end


BLOCK = 1 << 20  # elements that are hashed at once
FILE_BLOCK = 1 << 24  # bytes of a file that are hashed at once


class TensorDigests:
    """The digests of a model's tensors, collected as their blocks pass, in any order and from any thread.

    Args:
        infos: Shape and dtype of every tensor.
    """

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        self._infos = dict(infos)
        self._digests: dict[tuple[str, int], bytes] = {}

    def add(self, name: str, start: int, block: Tensor) -> None:
        """Add the elements from `start` on: whole blocks of 2^20, except for the last of a tensor."""
        import torch

        raw = block.view(-1).view(torch.uint8)
        size = BLOCK * block.element_size()
        for index, at in enumerate(range(0, max(len(raw), 1), size), start=start // BLOCK):
            self.add_bytes(name, index, raw[at : at + size])

    def add_bytes(self, name: str, index: int, raw: Tensor) -> None:
        """Add one block, as bytes, by its number within the tensor."""
        self._digests[name, index] = xxhash.xxh3_128_digest(raw.numpy().data)

    @property
    def is_complete(self) -> bool:
        """Return whether every block was added."""
        return len(self._digests) == sum(num_blocks(info) for info in self._infos.values())

    def combined(self) -> bytes:
        """Return one digest of names, shapes, dtypes and values, independent of the files that contain them."""
        digest = xxhash.xxh3_128()
        for name in sorted(self._infos):
            info = self._infos[name]
            digest.update(json.dumps([name, info.dtype, info.shape]).encode())
            for index in range(num_blocks(info)):
                digest.update(self._digests[name, index])
        return digest.digest()


def num_blocks(info: TensorInfo) -> int:
    """Return in how many blocks a tensor is hashed; an empty one counts as one."""
    elements = info.num_elements if info.dtype in ITEM_BYTES else info.length  # packed dtypes are hashed as bytes
    return max(1, -(-elements // BLOCK))


def fingerprint_of_files(files: set[Path], start: bytes = b"") -> str:
    """Return a hash over names and bytes of files, in the order of the names, after the bytes `start`."""
    digest = xxhash.xxh3_128(start)
    for file in sorted(files, key=lambda path: path.name):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(FILE_BLOCK):
                digest.update(block)
    return digest.hexdigest()
