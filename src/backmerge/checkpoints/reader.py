"""A Hugging Face directory of safetensors, read lazily: names, shapes and dtypes at once, tensors one at a time."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import xxhash
from safetensors import SafetensorError, safe_open

from backmerge.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HASH_BLOCK = 1 << 24  # bytes read at a time for a fingerprint


class TensorInfo(NamedTuple):
    """What a header says of a tensor: shape, dtype as safetensors names it ("BF16"), and the file that holds it."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


class Weights(Protocol):
    """Named tensors of one model: a checkpoint, or an adapter on its base seen as one."""

    @property
    def directory(self) -> Path:
        """Where the weights come from, for messages."""
        ...

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor's shape, dtype and file, in a fixed order."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides what the model computes."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One tensor, read now. May be of a higher precision than its info says (adapter on base)."""
        ...


class Checkpoint:
    """The weights in one directory.

    Args:
        directory: Holds `model.safetensors`, or an index and its shards; symbolic links are followed.

    Attributes:
        infos: Every tensor's shape, dtype and file, in the order of files and names.
        metadata: What the shards' headers say beside the tensors.

    Raises:
        CheckpointError: files are missing or damaged, an index names files outside the directory or tensors that its
            shards do not hold, or a tensor is held twice.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.infos: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        for file in _weight_files(directory):
            with _opened(file) as shard:
                self.metadata |= shard.metadata() or {}
                for name in shard.keys():  # noqa: SIM118 - a shard is no dict and cannot be iterated
                    if name in self.infos:
                        raise CheckpointError(
                            f"tensor '{name}' is in both {self.infos[name].file.name} and {file.name} of {directory}",
                            remedy="the checkpoint is inconsistent: download or save it again.",
                        )
                    tensor = shard.get_slice(name)
                    self.infos[name] = TensorInfo(tuple(tensor.get_shape()), tensor.get_dtype(), file)
        _check_index(directory, self.infos)
        if not self.infos:
            raise CheckpointError(f"{directory} holds no tensors", remedy="download or save the model again.")

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored, mapped from its file.

        Raises:
            CheckpointError: the file was damaged since it was opened.
        """
        shard = self._shard(self.infos[name].file)
        tensor: Tensor = shard.get_tensor(name)
        return tensor

    @functools.cache  # noqa: B019 - a checkpoint lives as long as its run
    def _shard(self, file: Path) -> Any:
        return _opened(file)

    @functools.cached_property
    def fingerprint(self) -> str:
        """XXH3 (128 bit) over the names and bytes of weights, config and tokenizer."""
        files = {info.file for info in self.infos.values()}
        beside = {".json", ".jinja", ".model", ".txt"}
        files |= {path for path in self.directory.iterdir() if path.suffix in beside and path.is_file()}
        return fingerprint_of_files(files - {self.directory / "backmerge.json"})


def fingerprint_of_files(files: set[Path]) -> str:
    """XXH3 (128 bit) over names and bytes, in the order of the names."""
    digest = xxhash.xxh3_128()
    for file in sorted(files, key=lambda path: path.name):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(HASH_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a model's directory.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}", remedy="download or save the model again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is not a JSON object", remedy="download or save the model again.")
    return values


def _weight_files(directory: Path) -> list[Path]:
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} has no config.json, so it is not a model's folder",
            remedy="give the folder that holds config.json and *.safetensors (or adapter_config.json).",
        )
    if (directory / INDEX).is_file():
        shards = read_json(directory / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{directory / INDEX} has no weight_map", remedy="download or save the model again.")
        for name in set(shards.values()):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{directory / INDEX} names '{name}', which is not a plain .safetensors name in its own folder",
                    remedy="do not use this checkpoint before you know who wrote that.",
                )
        if (directory / SINGLE).is_file() and SINGLE not in shards.values():
            raise CheckpointError(
                f"{directory} holds {SINGLE} and an index of other shards: transformers would load the former",
                remedy="two models lie in one folder: remove the one that is not meant.",
            )
        files = [directory / name for name in sorted(set(shards.values()))]
    elif (directory / SINGLE).is_file():
        files = [directory / SINGLE]
    else:
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        found = f"; it has {', '.join(pickles[:3])}, which are pickles and can run code" if pickles else ""
        raise CheckpointError(
            f"{directory} has no safetensors{found}",
            remedy="convert it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., "
            "safe_serialization=True) by someone who trusts it.",
        )
    for file in files:
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing, though {INDEX} names it",
                remedy="the download is incomplete: fetch the model again.",
            )
    return files


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file: {error}",
            remedy="it is truncated or damaged: download or save it again.",
        ) from error


def _check_index(directory: Path, infos: Mapping[str, TensorInfo]) -> None:
    if not (directory / INDEX).is_file():
        return
    weight_map: dict[str, str] = read_json(directory / INDEX)["weight_map"]
    held = {name: info.file.name for name, info in infos.items()}
    wrong = sorted(name for name in weight_map.keys() | held.keys() if weight_map.get(name) != held.get(name))
    if wrong:
        kinds = Counter("named but not held" if name not in held else "held elsewhere or unnamed" for name in wrong)
        raise CheckpointError(
            f"{directory / INDEX} does not describe its shards: {len(wrong)} tensors {dict(kinds)}, first '{wrong[0]}'",
            remedy="shards of different models are mixed: fetch the model again.",
        )
