"""The examples to tune on: found by name, read, sampled and split."""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from backmerge.errors import ConfigError, DataError
from backmerge.finetuning.data_settings import DataSettings
from backmerge.finetuning.shapes import NAMES, Draft, RowError, recognised, renamed
from backmerge.progress import count_text
from backmerge.records import Example, Message
from backmerge.registry import DATASETS, NOTHING_ALLOWED, Permissions, closest, is_plugin, resolve
from backmerge.rows import FORMATS_REMEDY, SUFFIXES, HubData, Row, files_of, hub_rows, read_rows
from backmerge.runs import key_of

MAX_SHOWN = 5  # bad rows that a message lists
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class TrainingData(NamedTuple):
    """The examples that a model is tuned on.

    Attributes:
        training: Examples with references, in the order of the rows.
        validation: The same, held out; no prompt of theirs is among the training examples.
        source: For the card: where they come from, and how many of how many.
        notes: Lines for the user: what was sampled, held out and dropped, and why.
    """

    training: tuple[Example, ...]
    validation: tuple[Example, ...]
    source: Mapping[str, Any]
    notes: tuple[str, ...]


def load_training_data(
    dataset: str, settings: DataSettings, seed: int, permissions: Permissions = NOTHING_ALLOWED, *, family: str = ""
) -> TrainingData:
    """Read, sample and split the data of one run.

    The sample and the held-out part depend on the seed and on the texts of the rows, without system prompts: a copy of
    the data gives the same examples, and models of different families are trained and validated on the same ones. Rows
    with the same prompt are held out together.

    Args:
        dataset: A preset's name, a file or a folder of files, a data set on the hub (`owner/name`), or
            `package.module:function` for your own code that returns examples, or a `Task`.
        settings: Which rows, and the names of their columns.
        seed: The run's seed.
        family: The model's `model_type`, which a preset's system prompt may depend on.
        permissions: What may be run.

    Raises:
        ConfigError: there is no such name, or a setting does not apply to this data set.
        DataError: the data cannot be found or read, or rows cannot be used; the message lists up to five of them. Only
            in a preset's data, which are as published, are rows with a blank text dropped and counted.
    """
    tally = _Tally()
    found = _find(dataset, settings, family, permissions)
    sample = sampled(found.examples(tally), found.num_examples, seed, by_category=found.is_uniform_by_category)
    tally.check()
    if not sample.examples:
        raise DataError(f"{found.name} contains no rows", remedy="give a file with a row for each example.")
    training, validation = split(sample.examples, settings.validation, seed)
    source = {
        "dataset": found.name,
        **found.source,
        "num_rows": sample.num_candidates + tally.num_dropped,
        "num_dropped": tally.num_dropped,
        "num_sampled": len(sample.examples),
        "num_training": len(training),
        "num_validation": len(validation),
        "seed": seed,
        "system": found.system,
    }
    notes = [*found.notes, *tally.notes(), *sample.notes(seed)]
    if validation:
        notes.append(f"{len(validation):,} of {len(sample.examples):,} examples are held out for validation")
    return TrainingData(training, validation, source, tuple(notes))


class Sample(NamedTuple):
    """A sample of examples.

    Attributes:
        examples: In their original order.
        num_candidates: How many there were.
        by_category: How many were sampled of each category; empty if that was not requested.
    """

    examples: tuple[Example, ...]
    num_candidates: int
    by_category: Mapping[str, int]

    def notes(self, seed: int) -> Iterator[str]:
        """Yield the remarks that a user should know."""
        if len(self.examples) < self.num_candidates:
            yield f"{len(self.examples):,} of {self.num_candidates:,} examples were sampled (seed {seed})"
        if self.by_category:
            counts = ", ".join(f"{name} {count:,}" for name, count in sorted(self.by_category.items()))
            yield f"sampled as evenly as the data allow: {counts}"


def sampled(examples: Iterable[Example], size: int | None, seed: int, *, by_category: bool = False) -> Sample:
    """Draw a sample without replacement, which depends only on the seed and the texts.

    The examples with the smallest hashes (with the seed) are taken, so that only the sample (with categories, one for
    each) is in memory at once. With categories each gets the same number; if a category has too few, the others share
    the rest, and a remainder goes to the first categories by name.

    Args:
        examples: All examples.
        size: Size of the sample; all are taken if it is not given, or if there are no more.
        seed: The run's seed.
        by_category: Whether to take the same number of each category.
    """
    total = 0
    kept: dict[str, list[tuple[int, int, Example]]] = defaultdict(list)
    for example in examples:
        total += 1
        # negated: the heap's first element has the largest hash and is removed next; among equal ones, the latest
        entry = (-_hashed("sample", seed, example, example.reference), -total, example)
        heap = kept[example.category or "" if by_category else ""]
        if size is None:
            heap.append(entry)
        elif len(heap) < size:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)
    limit = total if size is None else size
    shares = _even_shares({category: len(heap) for category, heap in kept.items()}, limit)
    chosen = [entry for category, heap in kept.items() for entry in heapq.nlargest(shares[category], heap)]
    chosen.sort(key=lambda entry: -entry[1])
    return Sample(tuple(entry[2] for entry in chosen), total, shares if by_category else {})


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Split examples into training and validation, both in their original order, with no prompt in both.

    Whole groups of examples with the same prompt are held out, in the order of a hash of the prompt with the seed, as
    long as they fit in the rounded share; if there are two examples or more, each side gets at least one.
    """
    target = min(max(1, round(share * len(examples))), len(examples) - 1) if share else 0
    groups: dict[int, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        groups[_hashed("validation", seed, example)].append(index)
    held_out: set[int] = set()
    for _, members in sorted(groups.items()):
        if len(held_out) + len(members) <= target:
            held_out.update(members)
    return (
        tuple(example for index, example in enumerate(examples) if index not in held_out),
        tuple(example for index, example in enumerate(examples) if index in held_out),
    )


def _hashed(use: str, seed: int, example: Example, *more: Any) -> int:
    """Return a number from the texts, without the system prompt."""
    turns = [[message.role, message.content] for message in example.messages if message.role != "system"]
    return int(key_of(use, seed, turns, *more), 16)


def _even_shares(available: Mapping[str, int], total: int) -> dict[str, int]:
    shares = dict.fromkeys(available, 0)
    left = min(total, sum(available.values()))
    while left:
        open_ = sorted(name for name, count in available.items() if shares[name] < count)
        each, rest = divmod(left, len(open_))
        for position, name in enumerate(open_):
            taken = min(available[name] - shares[name], each + (position < rest))
            shares[name] += taken
            left -= taken
    return shares


@dataclass
class _Tally:
    """Findings while rows are read.

    Attributes:
        num_bad: Rows that cannot be used.
        bad: Place and fault of the first ones.
        num_dropped: Rows of published data that were dropped.
        remarks: Remarks, and for how many rows.
    """

    num_bad: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    num_dropped: int = 0
    remarks: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row, fault: str) -> None:
        """Add a bad row."""
        self.num_bad += 1
        if len(self.bad) < MAX_SHOWN:
            self.bad.append((row.place, fault))

    def check(self) -> None:
        """Raise an error if there were bad rows."""
        if not self.bad:
            return
        remedy = "fix or remove them; data.columns maps columns with other names."
        lines = [f"{place}: {fault}" for place, fault in self.bad]
        if self.num_bad == 1:
            raise DataError(lines[0], remedy=remedy)
        if self.num_bad > len(lines):
            lines.append(f"and {self.num_bad - len(lines):,} more")
        raise DataError(f"{self.num_bad:,} rows cannot be used for training:\n  " + "\n  ".join(lines), remedy=remedy)

    def notes(self) -> Iterator[str]:
        """Yield lines for the user."""
        if self.num_dropped:
            yield f"{count_text(self.num_dropped, 'row')} dropped, because a text is empty"
        for remark, count in self.remarks.items():
            yield f"{count_text(count, 'row')}: {remark}"


@dataclass(frozen=True)
class _Found:
    """A data set before its rows are read.

    Attributes:
        name: For messages and the card, without this machine's folders.
        rows: Its rows, or...
        ready: ...examples from a user's code.
        draft: Turns a row into a conversation.
        system: The system prompt for all rows; `None` keeps each row's own, empty removes it.
        drops_blanks: Whether rows with a blank text are dropped rather than refused.
        source, notes: See `TrainingData`.
    """

    name: str
    rows: Iterable[Row] = ()
    ready: Sequence[Example] = ()
    draft: Callable[[Mapping[str, Any]], Draft] = recognised
    system: str | None = None
    num_examples: int | None = None
    is_uniform_by_category: bool = False
    drops_blanks: bool = False
    source: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def examples(self, tally: _Tally) -> Iterator[Example]:
        """Yield examples one by one; record faults and remarks."""
        for example in self.ready:
            yield replace(example, messages=_under(self.system, example.messages))
        for row in self.rows:
            try:
                if row.fault:
                    raise RowError(row.fault)
                draft = self.draft(row.values)
            except RowError as error:
                if error.is_empty and self.drops_blanks:
                    tally.num_dropped += 1
                else:
                    tally.add(row, str(error))
                continue
            if draft.remark:
                tally.remarks[draft.remark] += 1
            yield Example(row.id, _under(self.system, draft.messages), draft.reference, draft.category)


def _under(system: str | None, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the conversation with this system prompt."""
    if system is None:
        return messages
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    return (Message("system", system), *turns) if system.strip() else turns


def _find(name: str, settings: DataSettings, family: str, permissions: Permissions) -> _Found:
    path = Path(name).expanduser()
    if name in DATASETS.entries or (is_plugin(name) and not path.exists()):
        made = resolve(DATASETS, name, permissions)()
        return _of_task(made, settings, family) if isinstance(made, Task) else _of_code(name, made, settings)
    if settings.file is not None:
        raise ConfigError(
            f"data.file is your own copy of a preset's data, and '{name}' is not a preset",
            remedy=f"give the file itself as the data set; presets: {', '.join(sorted(DATASETS.entries))}.",
        )
    _check_columns(settings, NAMES)

    def draft(values: Mapping[str, Any]) -> Draft:
        return recognised(renamed(values, settings.columns), tuple(settings.columns))

    if path.exists():
        rows, source = _of_files(path, settings, ())
        return _Found(path.name, rows, (), draft, settings.system, settings.num_examples, source=source)
    if HUB_ID.fullmatch(name) and path.suffix.lower() not in SUFFIXES and not name.startswith("."):
        hub = HubData(name, settings.revision)
        rows, source, notes = _of_hub(hub)
        return _Found(name, rows, (), draft, settings.system, settings.num_examples, source=source, notes=notes)
    if path.suffix or "/" in name:
        raise DataError(
            f"there is no file '{name}'",
            remedy=f"give a file ({', '.join(SUFFIXES)}), a folder of files, a hub id, or a preset's name.",
        )
    resolve(DATASETS, name)  # raises that there is no such name, and suggests a similar one
    raise AssertionError(name)


def _of_task(task: Task, settings: DataSettings, family: str) -> _Found:
    _check_columns(settings, task.columns)
    notes: tuple[str, ...] = ()
    if settings.file is not None:
        rows, source = _of_files(Path(settings.file).expanduser(), settings, task.tsv_columns)
    elif task.hub is not None:
        rows, source, notes = _of_hub(task.hub._replace(revision=settings.revision or task.hub.revision))
    else:
        raise ConfigError(
            f"the data of '{task.name}' are not on the hub",
            remedy="download them from their authors' page, and give the file as data.file.",
        )
    return _Found(
        name=task.name,
        rows=rows,
        draft=lambda values: task.draft(renamed(values, settings.columns)),
        system=task.system(family) if settings.system is None else settings.system,
        num_examples=settings.num_examples or task.num_examples,
        is_uniform_by_category=task.is_uniform_by_category,
        drops_blanks=True,
        source=source,
        notes=notes,
    )


def _of_code(name: str, made: Iterable[Example], settings: DataSettings) -> _Found:
    for setting, value in (("file", settings.file), ("revision", settings.revision), ("columns", settings.columns)):
        if value:
            raise ConfigError(
                f"data.{setting} cannot be used with '{name}', whose examples are made by code", remedy="remove it."
            )
    ready = tuple(made)
    wrong = next((e for e in ready if not isinstance(e, Example)), None)
    if wrong is not None:
        raise DataError(
            f"'{name}' returned a {type(wrong).__name__}, not an Example",
            remedy="return backmerge.records.Example objects, each with a reference, or a Task.",
        )
    return _Found(name, ready=ready, draft=recognised, system=settings.system, num_examples=settings.num_examples)


def _of_files(path: Path, settings: DataSettings, tsv_columns: Sequence[str]) -> tuple[Iterator[Row], dict[str, Any]]:
    """Return rows, and the card's entry about the files."""
    if settings.revision is not None:
        raise ConfigError(f"data.revision is for the hub, but {path} is a file", remedy="remove it.")
    files = files_of(path)
    rows = (row for file in files for row in read_rows(file, tsv_columns))
    return rows, {"files": {file.name: _digest(file) for file in files}}


def _of_hub(hub: HubData) -> tuple[Iterator[Row], dict[str, Any], tuple[str, ...]]:
    source = {"hub": hub.name, "revision": hub.revision, "file": hub.file, "split": hub.split}
    notes = () if hub.revision else (f"{hub.name} is not pinned: set data.revision to get the same rows later",)
    return hub_rows(hub), source, notes


def _digest(file: Path) -> str:
    """Return the XXH3 (128 bit) of a file's bytes, as `xxhsum -H128` prints it."""
    digest = xxhash.xxh3_128()
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error}", remedy=FORMATS_REMEDY) from error
    return digest.hexdigest()


def _check_columns(settings: DataSettings, known: Sequence[str]) -> None:
    unknown = next((name for name in settings.columns if name not in known), None)
    if unknown is not None:
        raise ConfigError(
            f"data.columns maps '{unknown}', which is not a known column{closest(unknown, known)}",
            remedy=f"map any of {', '.join(dict.fromkeys(known))} to your file's own column.",
        )


HELPFUL = "You are a helpful assistant."


@dataclass(frozen=True)
class Task:
    """The data of one of the paper's tasks: where they are, and how a row becomes an example.

    Attributes:
        name: Its name in the table of data sets.
        hub: Its place on the hub; `None` if there is no reliable copy, and a file must be given.
        columns: The columns that `draft` needs.
        draft: Turns a row into a conversation and its answer, without the system prompt.
        systems: System prompts by model family (`model_type` of its config.json); `""` is for all others. For families
            without a system role (Gemma) the text is put before the user's turn when it is rendered.
        num_examples: How many are sampled.
        is_uniform_by_category: Whether the same number is taken of each category, if it has enough.
        tsv_columns: The columns of its .tsv files, if these have no header.
    """

    name: str
    hub: HubData | None
    columns: tuple[str, ...]
    draft: Callable[[Mapping[str, Any]], Draft]
    systems: Mapping[str, str]
    num_examples: int | None = 10_000
    is_uniform_by_category: bool = False
    tsv_columns: tuple[str, ...] = ()

    def system(self, family: str) -> str:
        """Return the system prompt for a model family; empty for none."""
        return self.systems.get(family, self.systems.get("", ""))
