"""Which of a model's files may go to others, found sound and rid of this machine's folders before a byte goes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from backmerge.checkpoints.adapter import TENSORS as ADAPTER_TENSORS
from backmerge.checkpoints.adapter import is_adapter, own_fingerprint
from backmerge.checkpoints.adapter_config import CONFIG as ADAPTER_CONFIG
from backmerge.checkpoints.companions import companion_files
from backmerge.checkpoints.files import SafetensorsFile
from backmerge.checkpoints.reader import CARD as RECIPE
from backmerge.checkpoints.reader import INDEX, Checkpoint, read_json
from backmerge.errors import CheckpointError
from backmerge.outputs import CURVE, EVAL_RESULTS
from backmerge.reporting.card_reading import front_of
from backmerge.sharing.local_names import without_folders

CARD = "README.md"
# of what goes next to the weights; nothing that could be run, whatever its name begins with
SUFFIXES = frozenset({"", ".json", ".jinja", ".md", ".model", ".txt"})
# where libraries note which folder a model came from
NOTED = ("config.json", "generation_config.json", "tokenizer_config.json", ADAPTER_CONFIG, RECIPE)


class Outgoing(NamedTuple):
    """A file on its way.

    Attributes:
        name: In the repository.
        content: The file, or its bytes where they differ from the file's.
        size: In bytes.
    """

    name: str
    content: Path | bytes
    size: int


class Package(NamedTuple):
    """A model that is whole.

    Attributes:
        directory: Its folder.
        files: What goes, by name.
        kept: What stays, by name.
        is_confirmed: Whether its card says so, of these very weights.
    """

    directory: Path
    files: tuple[Outgoing, ...]
    kept: tuple[str, ...]
    is_confirmed: bool

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(file.size for file in self.files)


def package_of(directory: Path) -> Package:
    """The model in a folder, as it may go.

    The weights are read once, to hold them to the hash that was taken when they were written.

    Args:
        directory: A merged model: a checkpoint or an adapter.

    Raises:
        CheckpointError: a file is missing or damaged, backmerge did not write it, its weights were changed since, or
            its card is of other weights.
    """
    weights = _weight_names(directory)
    recipe = _recipe(directory)
    fingerprint = recipe.get("fingerprint")
    if fingerprint is not None and _fingerprint(directory) != fingerprint:
        raise CheckpointError(
            f"the model in {directory} was changed since it was written: its weights, or the .json, .jinja, .model and "
            f".txt files next to them, are not those that {RECIPE} and the card tell of",
            remedy="take out what was added; or merge it anew and measure it, for what was found is of the model as it "
            "was.",
        )
    told = _of_card(directory)
    if told.get("confirmed") is True and (fingerprint is None or told.get("fingerprint") != fingerprint):
        raise CheckpointError(
            f"{directory / CARD} says that safety is confirmed, but of other weights than lie next to it",
            remedy="write the card anew with `backmerge report RUN`, or measure this model.",
        )
    names = [*weights, *_companions(directory)]
    files = tuple(_outgoing(directory, name) for name in sorted(names))
    within = {name.partition("/")[0] for name in names}
    kept = tuple(sorted(path.name for path in directory.iterdir() if path.name not in within))
    return Package(directory, files, kept, told.get("confirmed") is True)


def _weight_names(directory: Path) -> list[str]:
    """The files that hold the weights, each with a sound header; of several shards also their index."""
    if (directory / ADAPTER_CONFIG).is_file():
        if not (directory / ADAPTER_TENSORS).is_file():
            raise CheckpointError(
                f"{directory} has {ADAPTER_CONFIG} but no {ADAPTER_TENSORS}",
                remedy="merge it anew: the folder is not whole.",
            )
        SafetensorsFile(directory / ADAPTER_TENSORS)
        return [ADAPTER_TENSORS, ADAPTER_CONFIG]
    if not directory.is_dir():
        raise CheckpointError(f"there is no folder {directory}", remedy="give a merged model's folder, or a run.")
    shards = {info.file.name for info in Checkpoint(directory).infos.values()}
    return [*shards, *([INDEX] if (directory / INDEX).is_file() else [])]


def _fingerprint(directory: Path) -> str:
    """Of a checkpoint all that decides what it computes; of an adapter its two files."""
    return own_fingerprint(directory) if is_adapter(directory) else Checkpoint(directory).fingerprint


def _recipe(directory: Path) -> Mapping[str, Any]:
    if not (directory / RECIPE).is_file():
        raise CheckpointError(
            f"{directory} has no {RECIPE}, so backmerge did not write this model",
            remedy="give a folder that `backmerge restore`, `run` or `merge` wrote.",
        )
    recipe = read_json(directory / RECIPE)
    if "recipe" not in recipe:
        raise CheckpointError(
            f"{directory} holds no merged model: its {RECIPE} has no recipe",
            remedy="give a model under merged/ of a run; what was tuned is not what was measured to be safe.",
        )
    return recipe


def _of_card(directory: Path) -> Mapping[str, Any]:
    """What the card says to programs."""
    if not (directory / CARD).is_file():
        raise CheckpointError(
            f"{directory} has no {CARD}: nobody would know what the model is and what was found of it",
            remedy="measure it with `backmerge restore`, which writes one; `backmerge report RUN` writes it again; or "
            "write your own.",
        )
    told = front_of(directory / CARD).get("backmerge")
    return told if isinstance(told, dict) else {}


def _companions(directory: Path) -> Iterator[str]:
    """Configuration, tokenizer, templates, licence, card: an allow-list."""
    yield from (name for name, file in companion_files(directory).items() if file.suffix in SUFFIXES)
    yield from (name for name in (CARD, RECIPE, CURVE, EVAL_RESULTS) if (directory / name).is_file())


def _outgoing(directory: Path, name: str) -> Outgoing:
    file = directory / name
    if name in NOTED:
        values = read_json(file)
        cleaned = without_folders(values, is_ours=name == RECIPE)
        if cleaned != values:
            content = (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()
            return Outgoing(name, content, len(content))
    return Outgoing(name, file, file.stat().st_size)
