"""Find a model's folder, select its files for publication, check them, and remove this machine's folders from them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from backmerge.checkpoints.adapter import TENSORS as ADAPTER_TENSORS
from backmerge.checkpoints.adapter import is_adapter, own_fingerprint
from backmerge.checkpoints.adapter_config import CONFIG as ADAPTER_CONFIG
from backmerge.checkpoints.companions import companion_files
from backmerge.checkpoints.files import SafetensorsFile
from backmerge.checkpoints.reader import CARD as RECIPE
from backmerge.checkpoints.reader import INDEX, Checkpoint, read_json
from backmerge.errors import CheckpointError, RunError
from backmerge.outputs import CURVE, EVAL_RESULTS
from backmerge.reporting.card_reading import front_of

CARD = "README.md"
# files next to the weights that may be published; nothing executable, whatever its name begins with
SUFFIXES = frozenset({"", ".json", ".jinja", ".md", ".model", ".txt"})
# keys in which libraries record the folder that a model came from
NOTED = ("config.json", "generation_config.json", "tokenizer_config.json", ADAPTER_CONFIG, RECIPE)


class Outgoing(NamedTuple):
    """A file to publish.

    Attributes:
        name: Its name in the repository.
        content: The file, or its bytes if they differ from the file's.
        size: In bytes.
    """

    name: str
    content: Path | bytes
    size: int


class Package(NamedTuple):
    """A complete model.

    Attributes:
        directory: Its folder.
        files: Files to publish, by name.
        kept: Files that are not published, by name.
        is_confirmed: Whether its card says so about these weights.
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
    """Return the model in a folder in the form in which it may be published.

    The weights are read once, to compare them with the hash that was computed when they were written.

    Args:
        directory: A merged model: a checkpoint or an adapter.

    Raises:
        CheckpointError: a file is missing or damaged, backmerge did not write it, its weights were changed afterwards,
            or its card belongs to other weights.
    """
    weights = _weight_names(directory)
    recipe = _recipe(directory)
    fingerprint = recipe.get("fingerprint")
    if fingerprint is not None and _fingerprint(directory) != fingerprint:
        raise CheckpointError(
            f"the model in {directory} was changed after it was written: its weights, or the .json, .jinja, .model and "
            f".txt files next to them, differ from those in {RECIPE} and the card",
            remedy="remove what was added; or merge it again and measure it, since the results are for the earlier "
            "model.",
        )
    told = _of_card(directory)
    if told.get("confirmed") is True and (fingerprint is None or told.get("fingerprint") != fingerprint):
        raise CheckpointError(
            f"{directory / CARD} says that safety is confirmed, but for other weights than those next to it",
            remedy="write the card again with `backmerge report RUN`, or measure this model.",
        )
    names = [*weights, *_companions(directory)]
    files = tuple(_outgoing(directory, name) for name in sorted(names))
    within = {name.partition("/")[0] for name in names}
    kept = tuple(sorted(path.name for path in directory.iterdir() if path.name not in within))
    return Package(directory, files, kept, told.get("confirmed") is True)


def _weight_names(directory: Path) -> list[str]:
    """Return the files with the weights, each with a valid header; for several shards also their index."""
    if (directory / ADAPTER_CONFIG).is_file():
        if not (directory / ADAPTER_TENSORS).is_file():
            raise CheckpointError(
                f"{directory} has {ADAPTER_CONFIG} but no {ADAPTER_TENSORS}",
                remedy="merge it again: the folder is incomplete.",
            )
        SafetensorsFile(directory / ADAPTER_TENSORS)
        return [ADAPTER_TENSORS, ADAPTER_CONFIG]
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist", remedy="give a merged model's folder, or a run.")
    shards = {info.file.name for info in Checkpoint(directory).infos.values()}
    return [*shards, *([INDEX] if (directory / INDEX).is_file() else [])]


def _fingerprint(directory: Path) -> str:
    """Return the hash of everything that a checkpoint computes with, or of an adapter's two files."""
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
            f"{directory} is not a merged model: its {RECIPE} has no recipe",
            remedy="give a model in merged/ of a run; the tuned model is not the one that was confirmed to be safe.",
        )
    return recipe


def _of_card(directory: Path) -> Mapping[str, Any]:
    """Return the card's metadata."""
    if not (directory / CARD).is_file():
        raise CheckpointError(
            f"{directory} has no {CARD}: a reader would not know what the model is and what was measured",
            remedy="measure it with `backmerge restore`, which writes one; `backmerge report RUN` writes it again; or "
            "write your own.",
        )
    told = front_of(directory / CARD).get("backmerge")
    return told if isinstance(told, dict) else {}


def _companions(directory: Path) -> Iterator[str]:
    """Yield configuration, tokenizer, templates, licence, card: an allow-list."""
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


ORIGIN = "name_or_path"  # the end of keys in which transformers and peft record a model's origin
_ROOTED = re.compile(r"(/|~[\w.-]*/|\.{1,2}/|file:|[A-Za-z]:[\\/]|\\\\)")


def is_folder_name(text: str) -> bool:
    """Return whether a word is a path on a machine, rather than a hub id or anything else."""
    return bool(_ROOTED.match(text)) or (bool(text) and "\n" not in text and len(text) < 4096 and Path(text).exists())


def last_part(text: str) -> str:
    """Return a folder's or file's own name, without its path."""
    path = PureWindowsPath(text) if "\\" in text else PurePosixPath(text)
    return path.name


def without_folders(value: Any, *, is_ours: bool) -> Any:
    """Return plain data with this machine's folders shortened to their own names.

    Args:
        value: The contents of a JSON file.
        is_ours: Whether every word may be a folder, as in `backmerge.json`. In other files only words recorded as a
            model's origin: a token or a template may begin with a slash, too.
    """
    if isinstance(value, dict):
        return {
            key: without_folders(inner, is_ours=is_ours)
            if is_ours or str(key).endswith(ORIGIN) or isinstance(inner, (dict, list))
            else inner
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [
            without_folders(inner, is_ours=is_ours) if is_ours or isinstance(inner, (dict, list)) else inner
            for inner in value
        ]
    if isinstance(value, str) and is_folder_name(value):
        return last_part(value)
    return value


def model_in(directory: Path, *, may_be_unconfirmed: bool = False) -> Path:
    """Return the folder of the model.

    Args:
        directory: A merged model's folder; or a run with one model in its `merged/`.
        may_be_unconfirmed: Whether the model may be the one in a run's `unconfirmed/` if `merged/` is empty.

    Raises:
        RunError: the folder does not exist, or the run has no such model, or several.
    """
    if not directory.is_dir():
        raise RunError(f"{directory} does not exist", remedy="give a merged model's folder, or a run.")
    if (directory / "config.json").is_file() or (directory / ADAPTER_CONFIG).is_file():
        return directory
    if not (directory / "experiment.yaml").is_file():
        raise RunError(
            f"{directory} is neither a model's folder nor a run: it has no config.json and no experiment.yaml",
            remedy="give RUN or RUN/merged/NAME.",
        )
    merged, unconfirmed = _models(directory / "merged"), _models(directory / "unconfirmed")
    found = merged or (unconfirmed if may_be_unconfirmed else [])
    if len(found) == 1:
        return found[0]
    if found:
        raise RunError(
            f"{directory} has {len(found)} models to choose from: {', '.join(path.name for path in found)}",
            remedy=f"give one of them: {found[0]}.",
        )
    held = f"; {len(unconfirmed)} in unconfirmed/ were not shown to be safe" if unconfirmed else ""
    raise RunError(
        f"{directory} has no model in merged/{held}",
        remedy="read its report.html; --unconfirmed sends a model whose card says that it is not confirmed."
        if unconfirmed
        else "the run is not finished, or chose no λ: read its report.html, or run its command again.",
    )


def _models(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
