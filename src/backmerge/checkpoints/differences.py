"""List the differences of two models other than tensor values: names, shapes, dtypes, tokens, config."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.compare import is_grown
from backmerge.checkpoints.files import FLOATS, ITEM_BYTES
from backmerge.checkpoints.reader import Weights, read_json

SHOWN = 5  # listed differences of a kind; the rest are counted
LISTED = 12  # listed targets of an adapter
LONGEST = 60  # characters of a value that are shown

# keys of config.json that do not affect what the model computes
IGNORED = frozenset({"_name_or_path", "transformers_version", "use_cache"})
DTYPE_KEYS = ("dtype", "torch_dtype")  # names in new and old versions of transformers


class Difference(NamedTuple):
    """One line, and its topic: `adapter`, `tensors`, `vocabulary`, `special tokens`, `chat template` or `config`."""

    topic: str
    line: str


def differences(base: Weights, tuned: Weights) -> list[Difference]:
    """Return what differs apart from the values of the tensors, as lines for people; empty if nothing does.

    For an adapter, its own settings are included. Files that its folder does not have are taken from the base.

    Raises:
        CheckpointError: a JSON file is damaged.
    """
    is_adapter = isinstance(tuned, AdapterOnBase)
    ours = _Tokenizer(base.companions)
    theirs = _Tokenizer(tuned.directory, base.companions) if is_adapter else _Tokenizer(tuned.companions)
    topics: dict[str, Iterator[str]] = {
        "adapter": _of_adapter(tuned),
        "tensors": _of_tensors(base, tuned),
        "vocabulary": _of_vocabulary(ours, theirs),
        "special tokens": _of_special_tokens(ours, theirs),
        "chat template": _of_chat_template(ours, theirs),
        "config": _of_config(base.companions, tuned.companions),
    }
    found = [Difference(topic, line) for topic, lines in topics.items() for line in lines]
    if is_adapter and {topic for topic, _ in found} - {"adapter"}:
        found.append(Difference("adapter", "its folder has a tokenizer, but a merge gets the base's"))
    return found


def _of_adapter(tuned: Weights) -> Iterator[str]:
    if not isinstance(tuned, AdapterOnBase):
        return
    config = tuned.config
    kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    yield (
        f"a {kind} of r = {config.r}, alpha = {config.lora_alpha}, trained on "
        f"{_shown(config.base_model_name_or_path or 'an unnamed base')}"
    )
    targets = config.target_modules
    listed = ", ".join(sorted(map(str, targets))[:LISTED]) if isinstance(targets, list) else _shown(targets)
    yield f"targets: {listed}; {len(tuned.factors)} tensors changed by low-rank factors"
    for option, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        if patterns:
            yield f"{option}: {_shown(patterns)}"
    if tuned.dense_changes:
        yield f"changed as a whole, not only by factors: {_few(tuned.dense_changes)}"
    if tuned.note is not None:
        yield tuned.note


def _of_tensors(base: Weights, tuned: Weights) -> Iterator[str]:
    for one, other, side in ((base, tuned, "base"), (tuned, base, "tuned model")):
        only = sorted(one.infos.keys() - other.infos.keys())
        if only:
            yield f"only in the {side}: {_few(only)}"
    common = [(name, base.infos[name], tuned.infos[name]) for name in sorted(base.infos.keys() & tuned.infos.keys())]
    shapes = [
        f"{_shown(name)} is {ours.shape} in the base and {theirs.shape} in the tuned model"
        + (" (rows were added)" if is_grown(ours.shape, theirs.shape) else "")
        for name, ours, theirs in common
        if ours.shape != theirs.shape
    ]
    yield from _first(shapes)
    dtypes: dict[tuple[str, str], list[str]] = {}
    for name, ours, theirs in common:
        dtypes.setdefault((ours.dtype, theirs.dtype), []).append(name)
    for (first, second), names in dtypes.items():
        if first != second:
            yield f"{first} in the base and {second} in the tuned model: {_few(names)}"
        if not ({first, second} <= set(FLOATS) or first == second in ITEM_BYTES):
            yield f"cannot be compared because of their dtypes ({' and '.join(sorted({first, second}))}): {_few(names)}"


class _Tokenizer:
    """A tokenizer as described by its JSON files; transformers is not used.

    Args:
        folders: Folders with `tokenizer.json`, `tokenizer_config.json` and the like; the first that has a file counts.
    """

    def __init__(self, *folders: Path) -> None:
        self._folders = folders
        tokenizer = self._json("tokenizer.json")
        self._config = self._json("tokenizer_config.json")
        added = _added_tokens(tokenizer, self._config, self._json("added_tokens.json"))
        self.vocabulary = _vocabulary(tokenizer) | added

    @property
    def special_tokens(self) -> dict[str, str]:
        """Return the tokens with a role, such as `bos_token`, as text."""
        found: dict[str, str] = {}
        for values in (self._config, self._json("special_tokens_map.json")):
            for key, value in values.items():
                if key.endswith("_token") and isinstance(value, (str, dict)):
                    found[key] = _content(value)
                elif key.endswith("special_tokens") and isinstance(value, list) and value:
                    found["more special tokens"] = ", ".join(_content(token) for token in value)
        return found

    @property
    def chat_template(self) -> str | None:
        """Return the template; if there are several, all with their names."""
        for folder in self._folders:
            if (folder / "chat_template.jinja").is_file():
                return (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
            for name in ("tokenizer_config.json", "chat_template.json"):
                template = _json(folder, name).get("chat_template")
                if template:
                    return template if isinstance(template, str) else json.dumps(template, indent=1)
        return None

    def _json(self, name: str) -> dict[str, Any]:
        return next((values for folder in self._folders if (values := _json(folder, name))), {})


def _of_vocabulary(ours: _Tokenizer, theirs: _Tokenizer) -> Iterator[str]:
    if bool(ours.vocabulary) != bool(theirs.vocabulary):
        yield f"only the {'base' if ours.vocabulary else 'tuned model'} has a tokenizer.json"
        return
    if len(ours.vocabulary) != len(theirs.vocabulary):
        yield f"{len(ours.vocabulary)} tokens in the base and {len(theirs.vocabulary)} in the tuned model"
    for one, other, side in ((ours, theirs, "base"), (theirs, ours, "tuned model")):
        only = sorted(one.vocabulary.keys() - other.vocabulary.keys(), key=lambda token: one.vocabulary[token])
        if only:
            yield f"only in the {side}: {_few(only)}"
    both = ours.vocabulary.keys() & theirs.vocabulary.keys()
    moved = sorted(token for token in both if ours.vocabulary[token] != theirs.vocabulary[token])
    if moved:
        yield f"with another id in the tuned model: {_few(moved)}"


def _of_special_tokens(ours: _Tokenizer, theirs: _Tokenizer) -> Iterator[str]:
    yield from _of_values(ours.special_tokens, theirs.special_tokens)


def _of_chat_template(ours: _Tokenizer, theirs: _Tokenizer) -> Iterator[str]:
    first, second = ours.chat_template, theirs.chat_template
    if first == second:
        return
    if first is None or second is None:
        yield f"only the {'tuned model' if first is None else 'base'} has one"
        return
    pairs = itertools.zip_longest(first.splitlines(), second.splitlines(), fillvalue="")
    number, (mine, other) = next(((n, pair) for n, pair in enumerate(pairs, 1) if pair[0] != pair[1]), (1, ("", "")))
    at = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
    start = max(0, at - LONGEST // 3)
    yield (
        f"differs, first in line {number}: {_shown(mine[start:])} in the base, {_shown(other[start:])} in the tuned "
        "model"
    )


def _of_config(ours: Path, theirs: Path) -> Iterator[str]:
    if ours != theirs:
        yield from _of_values(_flat(read_json(ours / "config.json")), _flat(read_json(theirs / "config.json")))


def _of_values(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(ours.keys() | theirs.keys()):
        if key not in ours or key not in theirs or ours[key] != theirs[key]:
            first, second = (_shown(side[key]) if key in side else "absent" for side in (ours, theirs))
            yield f"{key}: {first} in the base, {second} in the tuned model"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a configuration's values with dots between the keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key in IGNORED:
            continue
        name = "dtype" if key in DTYPE_KEYS else key
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _json(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / name) if (folder / name).is_file() else {}


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Return tokens with their ids."""
    model = tokenizer.get("model")
    tokens = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(tokens, Mapping):
        return {str(token): number for token, number in tokens.items() if isinstance(number, int)}
    if isinstance(tokens, list):  # Unigram: pairs of token and score
        return {str(pair[0]): number for number, pair in enumerate(tokens) if isinstance(pair, list) and pair}
    return {}


def _added_tokens(
    tokenizer: Mapping[str, Any], config: Mapping[str, Any], listed_apart: Mapping[str, Any]
) -> dict[str, int]:
    """Return tokens that were added to the vocabulary, from all files of a folder that list them."""
    added = {token: number for token, number in listed_apart.items() if isinstance(number, int)}
    decoder = config.get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, Mapping) else ():
        if str(number).isdecimal():
            added[_content(token)] = int(number)
    listed = tokenizer.get("added_tokens")
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, Mapping) and isinstance(entry.get("id"), int):
            added[_content(entry)] = entry["id"]
    return added


def _content(token: Any) -> str:
    return str(token.get("content")) if isinstance(token, Mapping) else str(token)


def _few(names: Sequence[str]) -> str:
    """Return the number of names if there are several, and the first of them."""
    if len(names) == 1:
        return _shown(names[0])
    return f"{len(names)} ({', '.join(map(_shown, names[:SHOWN]))}{', ...' if len(names) > SHOWN else ''})"


def _first(lines: Sequence[str]) -> Iterator[str]:
    yield from lines[:SHOWN]
    if len(lines) > SHOWN:
        yield f"and {len(lines) - SHOWN} more of another shape"


def _shown(value: Any) -> str:
    """Return a value in one line: foreign words in quotes, with control characters escaped."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
