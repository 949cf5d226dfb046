"""The files next to a model's weights: which files there are, and from which side a merged model takes them.

The rule: files that belong to the tuned weights come from the tuned side if it has them, else from the base. It is
applied to four groups of files, so that files which only make sense together stay together:

- configuration (`config.json`, `generation_config.json`) and licence, file by file; an adapter has none of them;
- tokenizer: all of it from the tuned side if its folder has a vocabulary;
- chat template: from the tuned side if it has one, in a separate file or in `tokenizer_config.json`;
- additional chat templates, and processors of images, sound and video, file by file.

The fields of `config.json` that describe the tensors as they are stored (architecture, dtype, tied embeddings, rows of
the vocabulary) always match the written tensors, whichever side the rest comes from.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from backmerge.checkpoints.model_config import CONFIG, GENERATION, TOKENIZER, check_file, check_rope, read_json
from backmerge.errors import CheckpointError

Side = Literal["base", "tuned"]
SIDES: tuple[Side, Side] = ("base", "tuned")

VOCABULARY = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "tekken.json")
TOKENIZERS = (*VOCABULARY, "tokenizer*.json", "special_tokens_map.json", "added_tokens.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json")
MORE_TEMPLATES = ("additional_chat_templates/*.jinja",)
PROCESSORS = ("*processor_config.json",)
LICENCES = ("LICENSE*", "NOTICE*")
# the files that make the weights a usable model; an allow-list, so that no Python file or pickle is copied
COMPANIONS = (CONFIG, GENERATION, *TOKENIZERS, *TEMPLATES, *MORE_TEMPLATES, *PROCESSORS, *LICENCES)
# in the model's folder itself, and in folders within it
BY_FOLDER = (
    (".", tuple(pattern for pattern in COMPANIONS if pattern not in MORE_TEMPLATES)),
    ("additional_chat_templates", MORE_TEMPLATES),
)
# fields of config.json that describe how the tensors are stored
STORED = ("architectures", "model_type", "dtype", "torch_dtype", "tie_word_embeddings", "vocab_size")
# keys that do not affect what the model computes
SILENT = ("_name_or_path", "transformers_version", "use_cache")
ALIASES = {"dtype": "torch_dtype", "torch_dtype": "dtype"}  # names in new and old versions of transformers


@dataclass(frozen=True)
class Companions:
    """The files that a model has next to its weights.

    Attributes:
        files: The file that each name in the folder is read from.
        changed: Contents by name, for those that differ from every file.
        notes: Differences between base and tuned model with the side that was chosen, and files that are omitted.
    """

    files: Mapping[str, Path]
    changed: Mapping[str, bytes]
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Return all files' names, sorted."""
        return sorted({*self.files, *self.changed})

    def content(self, name: str) -> bytes | None:
        """Return the bytes of a file; `None` if no file has that name."""
        if name in self.changed:
            return self.changed[name]
        return self.files[name].read_bytes() if name in self.files else None

    @functools.cached_property
    def digest(self) -> str:
        """Return a hash of the names and contents of all files."""
        return self._digest_of(self.names)

    @functools.cached_property
    def config_digest(self) -> str:
        """Return a hash of the files that decide what a model computes and when it stops.

        Raises:
            CheckpointError: one of them is not a JSON object.
        """
        digest = hashlib.sha256()
        for name in (CONFIG, GENERATION):
            told = {key: value for key, value in self._settings(name).items() if key not in SILENT}
            digest.update(f"{name}\0{json.dumps(told, sort_keys=True)}\0".encode())
        return digest.hexdigest()

    def _settings(self, name: str) -> Mapping[str, Any]:
        if name in self.changed:
            values: dict[str, Any] = json.loads(self.changed[name])
            return values
        return read_json(self.files[name]) if name in self.files else {}

    def _digest_of(self, names: Sequence[str]) -> str:
        digest = hashlib.sha256()
        for name in names:
            digest.update(f"{name}\0".encode() + hashlib.sha256(self.content(name) or b"").digest())
        return digest.hexdigest()

    def beyond(self, folder: Path) -> Companions:
        """Return the files that differ from those in a folder: an adapter's files, next to its base's."""
        files = {name: file for name, file in self.files.items() if _root(file, name) != folder}
        return Companions(files, {name: content for name, content in self.changed.items() if name != CONFIG})

    def write(self, directory: Path) -> None:
        """Write the files to a folder."""
        for name in self.names:
            (directory / name).parent.mkdir(exist_ok=True)
            if name in self.changed:
                (directory / name).write_bytes(self.changed[name])
            else:
                shutil.copyfile(self.files[name], directory / name)

    def folder(self, weights: Path | None = None) -> Path:
        """Return a folder with these files for libraries: a side's own if it has the same, else a temporary one.

        Args:
            weights: A folder whose safetensors are linked there too; none if omitted.
        """
        folders = {_root(file, name) for name, file in self.files.items()}
        own = next(iter(folders)) if len(folders) == 1 else None
        if own is not None and not self.changed and weights in (None, own) and companion_files(own) == self.files:
            return own
        key = (self.digest, weights)
        if key not in _STAGED:
            _STAGED[key] = tempfile.TemporaryDirectory(prefix="backmerge-")
            staged = Path(_STAGED[key].name)
            self.write(staged)
            for file in () if weights is None else weights.glob("*.safetensors*"):
                (staged / file.name).symlink_to(file.resolve())
        return Path(_STAGED[key].name)


_STAGED: dict[tuple[str, Path | None], tempfile.TemporaryDirectory[str]] = {}  # removed when the process ends


class _Sides(NamedTuple):
    """The files of the two sides, by their names."""

    base: Mapping[str, Path]
    tuned: Mapping[str, Path]

    def of(self, side: Side, patterns: Sequence[str]) -> dict[str, Path]:
        files = self.base if side == "base" else self.tuned
        return {name: file for name, file in files.items() if _is_any(name, patterns)}


def companion_files(source: Path) -> dict[str, Path]:
    """Return config, tokenizer, templates, processors and licence of a model, by their names within its folder.

    Raises:
        CheckpointError: one is a link that leads out of the model, other than a hub cache's link to its blobs.
    """
    # each folder is listed once, and not once for each pattern, since a sweep asks often
    files = {
        name: file
        for folder, patterns in BY_FOLDER
        for file in _listed(source / folder)
        if _is_any(name := file.relative_to(source).as_posix(), patterns) and file.is_file()
    }
    for file in files.values():
        is_link = file.is_symlink() or (file.parent != source and file.parent.is_symlink())
        if is_link and not _is_within(file, source):
            raise CheckpointError(
                f"{file} is a link to {file.resolve()}, outside the model's folder: the linked file would become part "
                "of the result, and would be pushed with it",
                remedy="replace the link by a copy of the file if it belongs to the model, or remove it.",
            )
    return dict(sorted(files.items()))


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def copy_companions(source: Path, directory: Path) -> None:
    """Copy config, tokenizer, templates, processors and licence, but nothing that can be executed.

    Raises:
        CheckpointError: see `companion_files`.
    """
    Companions(companion_files(source), {}).write(directory)


def companions_of(
    base: Path,
    tuned: Path | None,
    *,
    stored: Path,
    is_adapter: bool = False,
    config_from: Side = "tuned",
    tokenizer_from: Side = "tuned",
) -> Companions:
    """Choose the files of a model that is made from two.

    Args:
        base: The base's folder.
        tuned: The tuned model's folder or an adapter's; `None` for the base alone.
        stored: The folder with the config.json that describes the written tensors.
        is_adapter: Whether `tuned` is an adapter's folder, which has no config.
        config_from: The side that the configuration comes from, if it has one.
        tokenizer_from: The side that tokenizer, chat templates and processors come from, if it has them.

    Raises:
        CheckpointError: a file cannot be read, has invalid settings, or is a link that leads out of its folder.
    """
    of_base = companion_files(base)
    of_tuned = {} if tuned is None else companion_files(tuned)
    if is_adapter:
        of_tuned = {name: file for name, file in of_tuned.items() if not _is_any(name, (CONFIG, GENERATION, *LICENCES))}
    known = tuple(_state(file) for file in (*of_base.values(), *of_tuned.values(), stored / CONFIG))
    return _chosen(_Frozen(_Sides(of_base, of_tuned), stored / CONFIG, known), config_from, tokenizer_from)


class _Frozen:
    """The state of the sides' files, as a key for a cached choice."""

    def __init__(self, sides: _Sides, stored: Path, state: tuple[Any, ...]) -> None:
        self.sides, self.stored = sides, stored
        self._key = (tuple(sides.base.items()), tuple(sides.tuned.items()), stored, state)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@functools.lru_cache(maxsize=64)
def _chosen(known: _Frozen, config_from: Side, tokenizer_from: Side) -> Companions:
    sides = known.sides
    files = _each(sides, config_from, (CONFIG, GENERATION, *LICENCES)) | _each(
        sides, tokenizer_from, (*PROCESSORS, *MORE_TEMPLATES)
    )
    whose = _with_rows(sides, tokenizer_from, known.stored)
    files |= _tokenizer(sides, whose)
    changed = _config(files.get(CONFIG), known.stored)
    templates, extracted = _templates(sides, whose, files)
    files |= templates
    changed |= extracted
    files = dict(sorted(files.items()))
    for name, file in files.items():
        check_file(name, file)
    if CONFIG in files and CONFIG in sides.base:
        check_rope(files[CONFIG], sides.base[CONFIG])
    return Companions(files, changed, tuple(_notes(sides, files, changed, tokenizer_from, whose)))


def _other(side: Side) -> Side:
    return "base" if side == "tuned" else "tuned"


def _each(sides: _Sides, first: Side, patterns: Sequence[str]) -> dict[str, Path]:
    return sides.of(_other(first), patterns) | sides.of(first, patterns)


def _tokenizer(sides: _Sides, first: Side) -> dict[str, Path]:
    """Return one side's tokenizer files if it has a vocabulary, and the other's extra files if both have the same."""
    ours, theirs = sides.of(first, TOKENIZERS), sides.of(_other(first), TOKENIZERS)
    vocabulary = sides.of(first, VOCABULARY)
    shared = [name for name in vocabulary if name in theirs]
    is_same = bool(shared) and all(vocabulary[name].read_bytes() == theirs[name].read_bytes() for name in shared)
    return theirs | ours if not vocabulary or is_same else ours


def _with_rows(sides: _Sides, wanted: Side, stored: Path) -> Side:
    """Return the base if the tuned side's tokenizer has tokens without embeddings in the model, else `wanted`."""
    if wanted == "base" or not stored.is_file():
        return wanted
    config = read_json(stored)
    text = config.get("text_config")
    rows = (text if isinstance(text, dict) else config).get("vocab_size")
    of_base, highest = (max(_token_ids(sides.of(side, TOKENIZERS)), default=-1) for side in SIDES)
    is_base_better = bool(sides.of("base", VOCABULARY)) and of_base < highest
    return "base" if isinstance(rows, int) and highest >= rows and is_base_better else wanted


def _token_ids(files: Mapping[str, Path]) -> Iterator[int]:
    """Yield the ids of the tokens that were added to a tokenizer."""
    if "tokenizer.json" in files:
        added = read_json(files["tokenizer.json"]).get("added_tokens")
        for token in added if isinstance(added, list) else ():
            if isinstance(token, dict) and isinstance(token.get("id"), int):
                yield token["id"]
    if "added_tokens.json" in files:
        yield from (number for number in read_json(files["added_tokens.json"]).values() if isinstance(number, int))


def _templates(sides: _Sides, first: Side, files: Mapping[str, Path]) -> tuple[dict[str, Path], dict[str, bytes]]:
    """Return the chat templates of the first side that has one; as a file if they were in the other tokenizer's."""
    for side in (first, _other(first)):
        found, inner = sides.of(side, TEMPLATES), _inner_template(sides.of(side, (TOKENIZER,)).get(TOKENIZER))
        if not found and inner is None:
            continue
        is_there = inner is not None and files.get(TOKENIZER) == sides.of(side, (TOKENIZER,)).get(TOKENIZER)
        if found or is_there:
            return found, {}
        if isinstance(inner, str):
            return {}, {"chat_template.jinja": inner.encode()}
        return {}, {}
    return {}, {}


def _inner_template(file: Path | None) -> Any:
    return None if file is None else read_json(file).get("chat_template") or None


def _config(file: Path | None, stored: Path) -> dict[str, bytes]:
    """Return the config with the fields that describe the tensors, if they differ from those in its file."""
    if file is None or not stored.is_file() or file == stored:
        return {}
    values, of_tensors = read_json(file), read_json(stored)
    settled = _settled(values, of_tensors)
    for part in ("text_config", "vision_config", "audio_config"):
        if isinstance(settled.get(part), dict) and isinstance(of_tensors.get(part), dict):
            settled[part] = _settled(settled[part], of_tensors[part])
    return {} if settled == values else {CONFIG: (json.dumps(settled, indent=2) + "\n").encode()}


def _settled(values: Mapping[str, Any], of_tensors: Mapping[str, Any]) -> dict[str, Any]:
    settled = dict(values)
    for key in STORED:
        if key not in of_tensors:
            continue
        place = ALIASES[key] if key in ALIASES and key not in values and ALIASES[key] in values else key
        settled[place] = of_tensors[key]
    return settled


def _notes(
    sides: _Sides, files: Mapping[str, Path], changed: Mapping[str, bytes], wanted: Side, whose: Side
) -> Iterator[str]:
    if not sides.tuned:
        return
    if whose != wanted:
        yield (
            "the tuned side's tokenizer has tokens without embeddings in the model, so the merged model has the "
            "base's tokenizer"
        )
    taken: dict[str, list[str]] = {"base": [], "tuned": []}
    for name in sides.base.keys() & sides.tuned.keys():
        if sides.base[name].read_bytes() != sides.tuned[name].read_bytes() and name in files:
            taken["base" if files[name] == sides.base[name] else "tuned"].append(name)
    for side, names in taken.items():
        if names:
            whom = "base" if side == "base" else "tuned model"
            yield f"{', '.join(sorted(names))}: base and tuned model differ; the merged model has the {whom}'s"
    if "chat_template.jinja" in changed:
        yield "the chat template is written to chat_template.jinja: it was in the other side's tokenizer_config.json"
    left = sorted((sides.base.keys() | sides.tuned.keys()) - files.keys() - changed.keys())
    if left:
        yield f"{', '.join(left)}: omitted, since the merged model has the other side's tokenizer or chat template"


def _state(file: Path) -> tuple[Path, int, int]:
    if not file.is_file():
        return file, 0, 0
    state = file.stat()
    return file, state.st_mtime_ns, state.st_size


def _is_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _root(file: Path, name: str) -> Path:
    return file.parents[name.count("/")]


def _is_within(file: Path, source: Path) -> bool:
    """Return whether a file is in its model's folder, or is a blob of the same repository in a hub cache."""
    folder, target = source.resolve(), file.resolve()
    is_cached = folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
    return target.is_relative_to(folder) or is_cached
