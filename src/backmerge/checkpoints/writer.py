"""Write a model's directory: shards streamed tensor by tensor, then the index; the caller renames it into place."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from backmerge.checkpoints.reader import INDEX, SINGLE, TensorInfo
from backmerge.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD_BYTES = 5_000_000_000
BYTES_PER_ELEMENT = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

# what makes the weights a usable model; an allow-list, so that no Python file or pickle comes along
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "LICENSE*",
)  # fmt: skip


def write_weights(
    directory: Path,
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write shards of at most 5 GB and, if there are several, their index.

    Args:
        directory: An empty directory that nobody reads yet.
        infos: Shape and dtype of every tensor, in the order in which `tensors` gives them.
        tensors: Name and value, already of the dtype and shape announced.
        metadata: For every shard's header; transformers asks for a format in it, which is added.

    Raises:
        CheckpointError: the disk has not enough room, or a dtype is unknown.
    """
    sizes = {name: _num_bytes(name, info) for name, info in infos.items()}
    free = shutil.disk_usage(directory).free
    if sum(sizes.values()) > free:
        raise CheckpointError(
            f"writing to {directory.parent} needs {sum(sizes.values()) / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            remedy="free some space, or give an --out on another disk; nothing was written.",
        )
    shards = _shards(sizes)
    source = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (directory / file).open("wb") as stream:
            stream.write(_header(names, infos, sizes, metadata or {}))
            for expected in names:
                name, tensor = next(source)
                assert (name, tuple(tensor.shape)) == (expected, infos[expected].shape), "tensors out of order"
                stream.write(_bytes_of(tensor))
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, directory: Path) -> None:
    """Copy config, tokenizer, chat template and licence, following links; nothing that can run."""
    for file in sorted(source.iterdir()):
        if file.is_file() and any(fnmatch.fnmatch(file.name, pattern) for pattern in COMPANIONS):
            shutil.copyfile(file, directory / file.name)


def _num_bytes(name: str, info: TensorInfo) -> int:
    if info.dtype not in BYTES_PER_ELEMENT:
        raise CheckpointError(
            f"tensor '{name}' of {info.file} has dtype {info.dtype}, which cannot be merged",
            remedy="give an unquantised checkpoint (bfloat16, float16 or float32).",
        )
    elements = 1
    for length in info.shape:
        elements *= length
    return elements * BYTES_PER_ELEMENT[info.dtype]


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _header(
    names: Iterable[str], infos: Mapping[str, TensorInfo], sizes: Mapping[str, int], metadata: Mapping[str, str]
) -> bytes:
    entries: dict[str, object] = {"__metadata__": {**metadata, "format": "pt"}}
    offset = 0
    for name in names:
        end = offset + sizes[name]
        entries[name] = {
            "dtype": infos[name].dtype,
            "shape": list(infos[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start on a multiple of 8, as the format asks
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
