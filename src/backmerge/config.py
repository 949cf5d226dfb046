"""Read experiment files: YAML to frozen, validated settings, with errors that name the line.

Only the mechanism is here; each package declares its own settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from backmerge.errors import BackmergeError, ConfigError
from backmerge.registry import closest

KeyPath = tuple[str | int, ...]

# keys that name other files; for the loader, not settings
EXTENDS, SCALES = "extends", "scales"

SET = "--set"  # the option that overrides a setting

# pyyaml raises a plain ValueError for an impossible date (2024-13-45) or number (0x_)
MAX_NODES = 100_000  # most values in a YAML file, with its aliases expanded
MAX_SHOWN = 60  # characters of a wrong value in a message
MAX_MESSAGE = 1_900  # characters of a message that lists several problems
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)


class Settings(BaseModel):
    """A frozen group of settings; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


SettingsT = TypeVar("SettingsT", bound=Settings)


@dataclass(frozen=True)
class Document:
    """Parsed settings, with the place that each came from.

    Attributes:
        source: The file's name, or its replacement in messages.
        values: Plain mappings, lists and scalars.
        lines: Key path to line number in its file, counted from 1.
        overridden: Key path to the `--set` option that gave its value instead of the file.
        files: Key path to its file, if that is not the source.
        options: Key path without list positions to the option that set it, if a command made the document, or to the
            parameter, if a Python call did.
        remedy: The advice in messages about wrong settings.
    """

    source: str
    values: dict[str, Any]
    lines: Mapping[KeyPath, int]
    overridden: Mapping[KeyPath, str] = field(default_factory=dict)
    files: Mapping[KeyPath, str] = field(default_factory=dict)
    options: Mapping[KeyPath, str] = field(default_factory=dict)
    remedy: str = "correct the lines named; `backmerge schema` prints every key with its meaning."

    def laid_under(self, values: Mapping[str, Any]) -> Document:
        """Return this document with these values on top: mappings are merged, everything else is replaced."""
        return replace(self, values=_laid_over(self.values, dict(values)))

    def option(self, at: KeyPath) -> str | None:
        """Return the command-line option that set the value at a key path, if one did."""
        keys = tuple(key for key in at if isinstance(key, str))
        found = (self.options[keys[:length]] for length in range(len(keys), 0, -1) if keys[:length] in self.options)
        return None if self.place(at) else next(found, None)

    def place(self, at: KeyPath) -> str:
        """Return where a value comes from, for messages: `line 3`, or `other.yaml, line 3`; empty if unknown."""
        prefixes = [at[:length] for length in range(len(at), 0, -1)]
        option = next((self.overridden[prefix] for prefix in prefixes if prefix in self.overridden), None)
        if option:
            return option
        found = next((prefix for prefix in prefixes if prefix in self.lines), None)
        if found is None:
            return ""
        file = self.files.get(found, self.source)
        return f"{'' if file == self.source else f'{file}, '}line {self.lines[found]}"


class CommandLine(NamedTuple):
    """The settings of a command line.

    Attributes:
        document: The settings that its options give, and their names for messages.
        overrides: Its `--set KEY=VALUE` options, which override everything else.
    """

    document: Document
    overrides: Sequence[str] = ()


def load_yaml(path: Path) -> Document:
    """Read a YAML file as plain data.

    Raises:
        ConfigError: the file is missing, is not YAML, repeats a key, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"cannot read {path}: {reason}", remedy="give the path of a YAML file.") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_size(path, node)
        values = yaml.safe_load(text)
    except NOT_YAML as error:
        raise ConfigError(f"{path} is not YAML: {error}", remedy="fix the line that the message names.") from error
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise ConfigError(
            f"{path} has no settings", remedy="write `key: value` lines; `backmerge schema` prints them all."
        )
    lines: dict[KeyPath, int] = {}
    for key_path, line in _key_lines(path, node, (), ()):
        if key_path in lines and isinstance(key_path[-1], str):
            name = ".".join(map(str, key_path))
            raise ConfigError(
                f"{path}, line {line}: '{name}' is set twice (first on line {lines[key_path]})",
                remedy="keep one of the two lines.",
            )
        lines[key_path] = line
    return Document(str(path), values, lines)


def _check_size(path: Path, root: yaml.Node | None) -> None:
    """Refuse aliases that multiply: a few bytes of text could expand to billions of values."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 1  # until the size is known; a node that contains itself is reported below
            inner = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
            if not isinstance(node, yaml.ScalarNode):
                sizes[id(node)] = 1 + sum(map(size, inner))
        return sizes[id(node)]

    if root is not None and size(root) > MAX_NODES:
        raise ConfigError(
            f"{path} expands to more than {MAX_NODES:,} values: its aliases repeat one another",
            remedy="write the values out, or use fewer aliases.",
        )


def _key_lines(
    path: Path, node: yaml.Node, at: KeyPath, within: tuple[yaml.Node, ...]
) -> Iterator[tuple[KeyPath, int]]:
    if any(node is outer for outer in within):
        raise ConfigError(
            f"{path}, line {node.start_mark.line + 1}: '{'.'.join(map(str, at))}' contains itself",
            remedy="write the value out instead of the alias.",
        )
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*at, key.value), key.start_mark.line + 1
            yield from _key_lines(path, value, (*at, key.value), (*within, node))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*at, index), value.start_mark.line + 1
            yield from _key_lines(path, value, (*at, index), (*within, node))


def load_extended(path: Path, scale: str | None = None, *, needs_scale: bool = True) -> Document:
    """Read a YAML file, laid over the files that it `extends` and under those of a scale.

    `extends: ../shared.yaml`, a path relative to the file's folder or a list of paths, inherits the settings of those
    files, which may extend others. Mappings are merged, key by key; lists and single values are replaced: later files
    of a list override earlier ones, and the file itself overrides them all. `scales: {small: small.yaml}` names files,
    or lists of files, that override everything if that scale is requested: the same experiment on other models and
    data.

    Args:
        path: The file.
        scale: The scale to use, if any.
        needs_scale: Whether the file must have that scale; if not, a file without it is read without a scale.

    Raises:
        ConfigError: a file is missing or not YAML, extends itself, or has no such scale.
    """
    document, scales = _extended(path, ())
    if scale is None or not (needs_scale or scale in scales):
        return document
    if scale not in scales:
        raise ConfigError(
            f"{path} has no scale '{scale}'{closest(scale, scales)}",
            remedy=f"it has {', '.join(sorted(scales))}." if scales else "remove --scale: the file has no scales.",
        )
    for over in scales[scale]:
        document = merged(document, _extended(over, ())[0], source=document.source)
    return document


def part(document: Document, at: KeyPath) -> Document:
    """Return the settings under a key as a separate document; empty if there is no mapping."""
    value: Any = document.values
    for key in at:
        value = value[key]
    depth = len(at)

    def inner(table: Mapping[KeyPath, Any]) -> dict[KeyPath, Any]:
        return {path[depth:]: found for path, found in table.items() if path[:depth] == at and len(path) > depth}

    return Document(
        document.source,
        _copied(value) if isinstance(value, dict) else {},
        inner(document.lines),
        inner(document.overridden),
        inner(document.files),
    )


def merged(under: Document, over: Document, *, source: str) -> Document:
    """Return one document laid over another: mappings are merged, everything else is replaced.

    Args:
        under: Gives the values that the other lacks.
        over: Has precedence.
        source: Name of the result.
    """
    lines, files = dict(under.lines), {at: under.files.get(at, under.source) for at in under.lines}
    given = _replaced(under.values, over.values)
    for at in [at for at in lines if any(at[:length] in given for length in range(1, len(at) + 1))]:
        del lines[at], files[at]
    lines |= over.lines
    files |= {at: over.files.get(at, over.source) for at in over.lines}
    values: dict[str, Any] = _laid_over(under.values, over.values)
    return Document(source, values, lines, {}, {at: file for at, file in files.items() if file != source})


def _laid_over(under: Any, over: Any) -> Any:
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return _copied(over)
    both = {key: _laid_over(under[key], over[key]) if key in under else _copied(over[key]) for key in over}
    return {**{key: _copied(value) for key, value in under.items() if key not in over}, **both}


def _replaced(under: Mapping[Any, Any], over: Mapping[Any, Any], at: KeyPath = ()) -> set[KeyPath]:
    """Return the key paths whose values are replaced instead of merged."""
    found: set[KeyPath] = set()
    for key, value in over.items():
        inner = under.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict)
        found |= _replaced(inner, value, (*at, key)) if both else {(*at, key)}  # type: ignore[arg-type]
    return found


def _extended(path: Path, within: tuple[Path, ...]) -> tuple[Document, dict[str, list[Path]]]:
    """Read a file with everything that it extends, and its scales by name."""
    own = load_yaml(path)
    within = (*within, path.resolve())
    scales: dict[str, list[Path]] = {}
    under: Document | None = None
    for file in _named_files(own, (EXTENDS,)):
        if file.resolve() in within:
            chain = [*within[within.index(file.resolve()) :], file.resolve()]
            raise ConfigError(
                f"{path}, {own.place((EXTENDS,))}: it extends itself: {' → '.join(one.name for one in chain)}",
                remedy="remove one of these lines.",
            )
        found, its_scales = _extended(file, within)
        under = found if under is None else merged(under, found, source=str(path))
        scales |= its_scales
    offered = own.values.get(SCALES) or {}
    if not isinstance(offered, dict):
        raise ConfigError(
            f"{path}, {own.place((SCALES,))}: '{SCALES}' is not a mapping", remedy="for example {small: a.yaml}."
        )
    scales |= {str(name): _named_files(own, (SCALES, name)) for name in offered}
    values = {key: value for key, value in own.values.items() if key not in (EXTENDS, SCALES)}
    lines = {at: line for at, line in own.lines.items() if at[0] not in (EXTENDS, SCALES)}
    bare = replace(own, values=values, lines=lines)
    return bare if under is None else merged(under, bare, source=str(path)), scales


def _named_files(document: Document, at: KeyPath) -> list[Path]:
    """Return the files that a key names, relative to the folder of the document's file."""
    value: Any = document.values
    for key in at:
        value = value.get(key)
    names = value if isinstance(value, list) else [] if value is None else [value]
    found = []
    for name in names:
        where = f"{document.source}, {document.place(at)}"
        if not isinstance(name, str):
            raise ConfigError(
                f"{where}: '{'.'.join(map(str, at))}' is neither a path nor a list of paths",
                remedy="for example ../a.yaml.",
            )
        file = Path(document.source).parent / Path(name).expanduser()
        if not file.is_file():
            raise ConfigError(
                f"{where}: there is no file '{name}'",
                remedy="paths are relative to the folder of the file that names them.",
            )
        found.append(file)
    return found


def with_overrides(document: Document, overrides: Sequence[str], option: str = SET) -> Document:
    """Return the document with `key.path=value` options applied; values are read as YAML.

    Args:
        document: The settings to change.
        overrides: In their order.
        option: The option that gives them, for messages.

    Raises:
        ConfigError: an override has no `=`, or its path leads through a value that has no keys.
    """
    values = _copied(document.values)
    overridden = dict(document.overridden)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"{option} {override}: expected key.path=value", remedy=f"for example {option} merge.0.lam=[0.5]"
            )
        try:
            value = yaml.safe_load(text)
        except NOT_YAML as error:
            raise ConfigError(f"{option} {override}: the value is not YAML: {error}") from error
        overridden[_assign(values, key.split("."), value, f"{option} {override}")] = f"{option} {override}"
    return replace(document, values=values, overridden=overridden)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copied(inner) for inner in value]
    return value


def _assign(values: Any, keys: Sequence[str], value: Any, override: str) -> KeyPath:
    """Set the value, and return its key path."""
    at: list[str | int] = []
    for depth, key in enumerate(keys):
        place: Any = key
        if isinstance(values, list):
            if not key.isdecimal() or int(key) >= len(values):
                name = ".".join(keys[:depth])
                raise ConfigError(
                    f"{override}: '{name}' is a list of {len(values)}; '{key}' is not in it",
                    remedy=f"give the number of an item, from 0, or the whole list: {name}=[...].",
                )
            place = int(key)
        elif not isinstance(values, dict):
            raise ConfigError(f"{override}: '{'.'.join(keys[:depth])}' is a single value and has no keys")
        at.append(place)
        if depth == len(keys) - 1:
            values[place] = value
        else:
            if isinstance(values, dict) and values.get(place) is None:
                values[place] = {}
            values = values[place]
    return tuple(at)


def validated(kind: type[SettingsT], document: Document) -> SettingsT:
    """Return the settings that a document describes.

    Raises:
        ConfigError: one line per fault, each with its key, its line and, for a misspelt key, the likely one.
    """
    try:
        return kind.model_validate(document.values)
    except ValidationError as error:
        faults = [_described(kind, document, fault) for fault in _first_hand(error.errors(include_url=False))]
        raise ConfigError(
            f"{document.source} cannot be used:\n" + "\n".join(f"  {fault}" for fault in faults),
            remedy=document.remedy,
        ) from error


def _first_hand(faults: Sequence[Any]) -> list[Any]:
    """Drop faults that only follow from others: a list with wrong items is also reported as too short."""
    places = [tuple(fault["loc"]) for fault in faults]
    return [
        fault
        for fault, place in zip(faults, places, strict=True)
        if fault["type"] != "too_short" or not any(len(p) > len(place) and p[: len(place)] == place for p in places)
    ]


def _described(kind: type[Settings], document: Document, fault: Any) -> str:
    location: KeyPath = tuple(fault["loc"])
    name = ".".join(map(str, location))
    place = document.place(location)
    where = f"{place}: " if place else ""
    if fault["type"] == "extra_forbidden":
        owner = _settings_at(kind, location[:-1])
        hint = closest(str(location[-1]), owner.model_fields) if owner else ""
        return f"{where}unknown key '{name}'{hint}"
    if fault["type"] == "missing":
        return f"{where}'{name}' is required"
    message = fault["msg"].removeprefix("Value error, ")
    option = document.option(location)
    if option is not None:
        return f"{option} {fault['input']}: {message.removeprefix('Input ')}{_as_share(fault)}"
    if message.startswith("Input ") and isinstance(fault["input"], str | int | float | date):
        message = f"{_shortened(fault['input'])}{message.removeprefix('Input')}"
    return f"{where}'{name}': {message}" if name else message


def _shortened(value: object) -> str:
    text = f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _as_share(fault: Any) -> str:
    """Return the share that was probably meant, if a percentage was given."""
    most = next((fault["ctx"][key] for key in ("le", "lt") if key in fault.get("ctx", {})), None)
    value = fault["input"]
    if most == 1 and isinstance(value, int | float) and 2 <= value < 100:
        return f"; it is a share, so did you mean {value / 100:g}?"
    return ""


def _settings_at(kind: type[Settings], location: KeyPath) -> type[Settings] | None:
    """Return the settings class that has the key at `location`, by following annotations."""
    current: type[Settings] | None = kind
    for key in location:
        if current is None:
            return None
        if isinstance(key, int):
            continue
        field = current.model_fields.get(str(key))
        current = _inner_settings(field.annotation) if field else None
    return current


def _inner_settings(annotation: Any) -> type[Settings] | None:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    for argument in get_args(annotation):
        if (found := _inner_settings(argument)) is not None:
            return found
    return None


class Problem(NamedTuple):
    """One fault in some settings.

    Attributes:
        at: The key path of the wrong value; empty if it is about no single value.
        error: The error with which a run would end.
    """

    at: KeyPath
    error: BackmergeError


class Problems:
    """All faults in some settings, so that they are reported together, each with its place.

    Args:
        document: Where the settings come from; without it, problems are reported without a place.

    Attributes:
        found: In the order of checking, without repetitions.
    """

    def __init__(self, document: Document | None = None) -> None:
        self.document = document
        self.found: list[Problem] = []

    @contextmanager
    def at(self, *keys: str | int) -> Iterator[None]:
        """Note a user error raised in the block as a problem of this key, and continue after the block."""
        try:
            yield
        except BackmergeError as error:
            self.note(error, keys)

    def note(self, error: BackmergeError, at: KeyPath = ()) -> None:
        """Note a problem, once."""
        if all(str(problem.error) != str(error) for problem in self.found):
            self.found.append(Problem(at, error))

    def place(self, at: KeyPath) -> str:
        """Return where the value of a key was written: `--safety`, or `line 3, evaluate.safety`; empty if nowhere."""
        if self.document is None or not at:
            return ""
        option, place = self.document.option(at), self.document.place(at)
        key = ".".join(map(str, at))
        return option or (place if place in self.document.overridden.values() else f"{place}, {key}" if place else "")

    def raise_any(self) -> None:
        """Raise what was found: a single problem unchanged, several as one error that lists them.

        Raises:
            BackmergeError: a problem was found; the message starts with its place.
        """
        if not self.found:
            return
        if len(self.found) == 1:
            (problem,) = self.found
            place = self.place(problem.at)
            if place and not problem.error.message.startswith(place):
                file = "" if place.startswith("--") or self.document is None else f"{self.document.source}, "
                problem.error.message = f"{file}{place}: {problem.error.message}"
            raise problem.error
        source = "this cannot be run" if self.document is None else f"{self.document.source} cannot be used"
        lines = [f"{source}: {len(self.found)} problems"]
        for number, problem in enumerate(self.found):
            text = ": ".join(filter(None, (self.place(problem.at), str(problem.error)))).replace("\n", "\n  ")
            if sum(map(len, lines)) + len(text) > MAX_MESSAGE:
                lines.append(f"  and {len(self.found) - number} more")
                break
            lines.append(f"  {text}")
        raise ConfigError("\n".join(lines)) from self.found[0].error
