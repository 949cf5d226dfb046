"""A Hugging Face directory of safetensors, read lazily: names, shapes and dtypes first, tensors one at a time."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from backmerge.checkpoints.files import (
    BLOCK,
    ITEM_BYTES,
    SafetensorsFile,
    TensorDigests,
    TensorInfo,
    fingerprint_of_files,
    num_blocks,
)
from backmerge.checkpoints.model_config import ModelConfig, check_links, read_config
from backmerge.checkpoints.model_config import read_json as read_json  # noqa: PLC0414 - exported
from backmerge.errors import CheckpointError
from backmerge.outputs import MANIFEST

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CARD = MANIFEST  # backmerge writes it next to the weights

# prefixes in the tensor names of a model that was saved while wrapped by torch.compile, (distributed) data parallelism,
# activation checkpointing or peft
WRAPPERS = re.compile(
    r"^(?:module\.|base_model\.model\.)+|(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
LAYER = re.compile(r"(?P<stack>.*?\b(?:layers|layer|h|blocks|block))\.(?P<number>\d+)\.")
EXTRA_EMBEDDINGS = frozenset({"mllama", "mllama_text_model", "molmo2", "molmo2_text", "moshi"})  # beyond vocab_size
REPEATED_LAYERS = frozenset({"hrm_text"})  # num_hidden_layers counts how often they run
# the input embeddings' names in transformers' architectures
EMBEDDINGS = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|embed_in|word_embeddings)\.weight")


class Weights(Protocol):
    """Named tensors of one model: a checkpoint, or an adapter on its base treated as one."""

    @property
    def directory(self) -> Path:
        """Where the weights come from, for messages."""
        ...

    @property
    def companions(self) -> Path:
        """The folder whose config, tokenizer and chat template go with these weights."""
        ...

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor's shape, dtype and file, in a fixed order."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """The entries of the files' headers other than tensors."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides what the model computes."""
        ...

    def block(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Return elements of a tensor, flat, read now.

        The result may have a higher precision than the tensor's info (adapter on base). It may be stored in `buffer`,
        if given, and is then valid until that is used again.
        """
        ...

    def tensor(self, name: str) -> Tensor:
        """Return one whole tensor, read now."""
        ...

    def is_base(self, name: str) -> bool:
        """Return whether a tensor is known, without reading it, to be the base's, for an adapter's weights."""
        ...


class Checkpoint:
    """The weights in one directory.

    Args:
        directory: Folder with `model.safetensors`, or an index and its shards; symbolic links are followed.
        unwrap: Accept tensors whose names have a wrapper's prefix. `merge` writes them without it; elsewhere they are
            refused, since libraries that load the folder fill the model with random numbers.

    Attributes:
        config: Its `config.json`.
        infos: Every tensor's shape, dtype and file, in the order of files and of positions in them. Names are those of
            the model, without the prefixes of wrappers such as torch.compile.
        metadata: Entries of the shards' headers other than tensors.

    Raises:
        CheckpointError: files are missing or damaged, an index names files outside the directory or tensors that its
            shards do not contain, a tensor exists twice, or the config describes another model than the tensors.
    """

    def __init__(self, directory: Path, *, unwrap: bool = False) -> None:
        self.directory = self.companions = directory
        self.infos: dict[str, TensorInfo] = {}
        self._stored: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        self._files: dict[Path, SafetensorsFile] = {}
        self._tensors_digest: bytes | None = None
        for path in _weight_files(directory):
            file = self._files[path] = SafetensorsFile(path)
            self.metadata |= file.metadata
            for stored, info in file.infos.items():
                name = plain_name(stored)
                if name in self.infos:
                    raise CheckpointError(
                        f"tensor '{name}' is in both {self.infos[name].file.name} and {path.name} of {directory}",
                        remedy="the checkpoint is inconsistent: download or save it again.",
                    )
                self.infos[name] = info
                self._stored[name] = stored
        _check_index(directory, {self._stored[name]: info for name, info in self.infos.items()})
        if not self.infos:
            raise CheckpointError(f"{directory} contains no tensors", remedy="download or save the model again.")
        if self.wrapper is not None and not unwrap:
            raise CheckpointError(
                f"the tensors in {directory} have '{self.wrapper}' in their names: the model was saved wrapped, and "
                "libraries that load it fill it with random numbers",
                remedy=f"write it with its original names: backmerge merge {directory} {directory} --lam 0 --out "
                f"{directory.name}-plain",
            )
        self.config = read_config(directory)
        _check_config(directory, self.config, self.infos)

    @property
    def wrapper(self) -> str | None:
        """The prefix that names on disk have and the model's own do not, such as `_orig_mod.`; `None` if they agree."""
        found = (WRAPPERS.search(stored) for name, stored in self._stored.items() if name != stored)
        return next((match[0] for match in found if match), None)

    def block(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Return elements of a tensor, flat, as stored; see `Weights.block`.

        Raises:
            CheckpointError: the file was damaged after it was opened, or the dtype cannot be merged.
        """
        return self._files[self.infos[name].file].block(self._stored[name], start, stop, buffer)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor as stored.

        Raises:
            CheckpointError: the file was damaged after it was opened, or the dtype cannot be merged.
        """
        return self._files[self.infos[name].file].tensor(self._stored[name])

    def is_base(self, name: str) -> bool:  # noqa: ARG002 - an adapter's question
        """Return False: this is not an adapter."""
        return False

    def leave_out(self, names: Set[str]) -> None:
        """Drop tensors, as if they had never been saved."""
        self.infos = {name: info for name, info in self.infos.items() if name not in names}

    def add(self, name: str, info: TensorInfo) -> None:
        """Add a tensor, as if it had been saved: bytes of a file, of this model's or another's."""
        if info.file not in self._files:
            self._files[info.file] = SafetensorsFile(info.file)
        self._files[info.file].infos[name] = self.infos[name] = info
        self._stored[name] = name

    @functools.cached_property
    def fingerprint(self) -> str:
        """XXH3 (128 bit) over tensors, config and tokenizer; how the tensors are split into files is ignored."""
        beside = {".json", ".jinja", ".model", ".txt"}
        files = {path for path in self.directory.iterdir() if path.suffix in beside and path.is_file()}
        return fingerprint_of_files(files - {self.directory / CARD, self.directory / INDEX}, self._digest_of_tensors())

    @property
    def tensors_fingerprint(self) -> str:
        """XXH3 (128 bit) over names, shapes, dtypes and values of the tensors alone, without config and tokenizer."""
        return self._digest_of_tensors().hex()

    def adopt(self, digests: TensorDigests) -> None:
        """Store digests that were computed while the tensors were read, which saves a second reading."""
        if digests.is_complete:
            self._tensors_digest = digests.combined()

    def _digest_of_tensors(self) -> bytes:
        """Return the tensors' digest; they are read once for it, unless `adopt` has stored it."""
        if self._tensors_digest is not None:
            return self._tensors_digest
        import torch

        digests = TensorDigests(self.infos)
        buffer = torch.empty(BLOCK * 8, dtype=torch.uint8)
        for name, info in self.infos.items():
            size = ITEM_BYTES.get(info.dtype, 1)
            for index in range(num_blocks(info)):
                begin = index * BLOCK * size
                place = buffer[: min(info.length - begin, BLOCK * size)]
                self._files[info.file].read_into(place.numpy().data, info.offset + begin)
                digests.add_bytes(name, index, place)
        self._tensors_digest = digests.combined()
        return self._tensors_digest


def plain_name(stored: str) -> str:
    """Return a tensor's name without the prefixes of wrappers.

    >>> plain_name("_orig_mod.model.norm.weight")
    'model.norm.weight'
    """
    return WRAPPERS.sub("", stored)


def _check_config(directory: Path, config: ModelConfig, infos: Mapping[str, TensorInfo]) -> None:
    """Refuse a config with more layers, or another vocabulary size, than the tensors have."""
    text = config.text
    types = {config.model_type, text.model_type}
    stacks: dict[str, set[str]] = {}
    for name in infos:
        if match := LAYER.match(name):
            stacks.setdefault(match["stack"], set()).add(match["number"])
    most = max(map(len, stacks.values()), default=0)
    is_short = most and text.num_hidden_layers is not None and most < text.num_hidden_layers
    if is_short and types.isdisjoint(REPEATED_LAYERS):
        raise CheckpointError(
            f"{directory} has tensors of {most} layers, but its config.json describes {text.num_hidden_layers}: the "
            "missing layers would be random numbers",
            remedy="the weights are incomplete, or config.json is another model's: download or save the model again.",
        )
    # packed numbers have other shapes
    if config.quantization_config is not None or text.vocab_size is None:
        return
    rows = {name: infos[name].shape[0] for name in infos if EMBEDDINGS.fullmatch(name) and len(infos[name].shape) == 2}
    has_extra = not types.isdisjoint(EXTRA_EMBEDDINGS)
    fits = int.__ge__ if has_extra else int.__eq__
    wrong = next((name for name, count in rows.items() if not fits(count, text.vocab_size)), None)
    if wrong is not None and text.vocab_size not in rows.values():
        raise CheckpointError(
            f"{directory}: config.json has a vocab_size of {text.vocab_size}, but '{wrong}' has {rows[wrong]} rows; no "
            "library loads such a model",
            remedy=f"write {rows[wrong]} for vocab_size into config.json if tokens were added or the rows were padded; "
            "otherwise download or save the model again.",
        )


def _weight_files(directory: Path) -> list[Path]:
    if directory.is_dir():
        check_links(directory)
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{directory} is an adapter, but a whole model is needed here",
            remedy="give its base. If a command takes both, BASE comes first, then TUNED.",
        )
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} has no config.json, so it is not a model's folder",
            remedy="give a folder with config.json and *.safetensors (in a run: merged/NAME), or an adapter with its "
            "adapter_config.json.",
        )
    if (directory / INDEX).is_file():
        shards = read_json(directory / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{directory / INDEX} has no weight_map", remedy="download or save the model again.")
        for name in set(shards.values()):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{directory / INDEX} names '{name}', which is not a plain .safetensors name in its own folder",
                    remedy="do not use this checkpoint unless you know who made it.",
                )
        if (directory / SINGLE).is_file() and SINGLE not in shards.values():
            raise CheckpointError(
                f"{directory} has {SINGLE} and an index of other shards: transformers would load the former",
                remedy="the folder contains two models: remove the one that you do not want.",
            )
        files = [directory / name for name in sorted(set(shards.values()))]
    elif (directory / SINGLE).is_file():
        files = [directory / SINGLE]
    else:
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        found = f"; its {', '.join(pickles[:3])} are pickles, which can run code" if pickles else ""
        raise CheckpointError(
            f"{directory} has no safetensors{found}",
            remedy="if you trust its author, convert it: AutoModelForCausalLM.from_pretrained(...).save_pretrained("
            "..., safe_serialization=True).",
        )
    for file in files:
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing, though {INDEX} names it",
                remedy="the download is incomplete: download the model again.",
            )
    return files


def _check_index(directory: Path, infos: Mapping[str, TensorInfo]) -> None:
    if not (directory / INDEX).is_file():
        return
    weight_map: dict[str, str] = read_json(directory / INDEX)["weight_map"]
    held = {name: info.file.name for name, info in infos.items()}
    wrong = sorted(name for name in weight_map.keys() | held.keys() if weight_map.get(name) != held.get(name))
    if wrong:
        kinds = Counter("listed but missing" if name not in held else "in another file or unlisted" for name in wrong)
        raise CheckpointError(
            f"{directory / INDEX} does not describe its shards: {len(wrong)} tensors {dict(kinds)}, first '{wrong[0]}'",
            remedy="shards of different models are mixed: download the model again.",
        )


def context_length(directory: Path) -> int | None:
    """Return how many tokens a model can process, prompt and answer together; `None` if its config does not say.

    Raises:
        CheckpointError: see `read_json`.
    """
    config = read_json(directory / "config.json")
    text = config.get("text_config")
    values = text if isinstance(text, dict) else config
    found = (values.get(key) for key in ("max_position_embeddings", "n_positions"))  # GPT-2 has the latter
    return next((number for number in found if isinstance(number, int)), None)
