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

MAX_SHOWN = 5  # bad rows in a message
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class TrainingData(NamedTuple):
    """What a model is tuned on.

    Attributes:
        training: Examples with references, in the order of the rows.
        validation: The same, held out; no prompt of theirs is among the training examples.
        source: For the card: where they came from, and how many of how many.
        notes: Lines for the person: what was sampled, held out and left out, and why.
    """

    training: tuple[Example, ...]
    validation: tuple[Example, ...]
    source: Mapping[str, Any]
    notes: tuple[str, ...]


def load_training_data(
    dataset: str, settings: DataSettings, seed: int, permissions: Permissions = NOTHING_ALLOWED, *, family: str = ""
) -> TrainingData:
    """Read, sample and split the data of one run.

    What is sampled and what is held out depends on the seed and on the texts of the rows, system prompts aside: a copy
    of the data gives the same examples, and models of different families learn and are validated on the same. Rows
    with the same prompt are held out together.

    Args:
        dataset: A preset's name, a file or a folder of files, a data set on the hub (`owner/name`), or
            `package.module:function` for your own code that gives examples, or a `Task`.
        settings: Which rows, under which names.
        seed: The run's.
        family: The model's `model_type`, which a preset's system prompt may depend on.
        permissions: What may be run.

    Raises:
        ConfigError: there is no such name, or a setting has no meaning for this data set.
        DataError: the data cannot be found or read, or rows cannot be learned from, of which it names up to five.
            Only of a preset's data, which are as published, are rows with a blank text left out, and counted.
    """
    tally = _Tally()
    found = _find(dataset, settings, family, permissions)
    sample = sampled(found.examples(tally), found.num_examples, seed, by_category=found.is_uniform_by_category)
    tally.check()
    if not sample.examples:
        raise DataError(f"{found.name} holds no rows to learn from", remedy="give a file with a row for each example.")
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
    """Some of many examples.

    Attributes:
        examples: In the order in which they came.
        num_candidates: How many there were.
        by_category: How many were taken of each category; empty where that was not asked for.
    """

    examples: tuple[Example, ...]
    num_candidates: int
    by_category: Mapping[str, int]

    def notes(self, seed: int) -> Iterator[str]:
        """What a person should know of it."""
        if len(self.examples) < self.num_candidates:
            yield f"{len(self.examples):,} of {self.num_candidates:,} examples were sampled (seed {seed})"
        if self.by_category:
            counts = ", ".join(f"{name} {count:,}" for name, count in sorted(self.by_category.items()))
            yield f"sampled as evenly as the data allow: {counts}"


def sampled(examples: Iterable[Example], size: int | None, seed: int, *, by_category: bool = False) -> Sample:
    """A sample without replacement, which depends on the seed and the texts alone.

    The examples whose hash with the seed is smallest are taken, so that no more than the sample (with categories, one
    for each) is held while they pass. With categories each gets the same number; what a category lacks is shared
    among the others, and what does not divide goes to the first by name.

    Args:
        examples: All there are.
        size: Of the sample; all are taken if not given, or if there are no more.
        seed: The run's.
        by_category: Whether to take as many of each category.
    """
    total = 0
    kept: dict[str, list[tuple[int, int, Example]]] = defaultdict(list)
    for example in examples:
        total += 1
        # negated: the heap's first is the one with the largest hash, the next to go; of equal ones, the latest
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
    """Training and validation examples, both in the order in which they came, with no prompt in both.

    Whole groups of examples with the same prompt are held out, in the order of a hash of the prompt with the seed,
    as long as they fit in the share of the examples, rounded; of two examples or more, one at least goes to each side.
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
    """A number from the texts, system prompt aside."""
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
    """What is noticed while rows pass.

    Attributes:
        num_bad: Rows that cannot be learned from.
        bad: Place and fault of the first of them.
        num_dropped: Rows of published data that were left out.
        remarks: What to report, and for how many rows.
    """

    num_bad: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    num_dropped: int = 0
    remarks: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row, fault: str) -> None:
        """Take in a bad row."""
        self.num_bad += 1
        if len(self.bad) < MAX_SHOWN:
            self.bad.append((row.place, fault))

    def check(self) -> None:
        """Raise for the rows that were bad."""
        if not self.bad:
            return
        remedy = "fix or remove them; data.columns says where columns have other names than ours."
        lines = [f"{place}: {fault}" for place, fault in self.bad]
        if self.num_bad == 1:
            raise DataError(lines[0], remedy=remedy)
        if self.num_bad > len(lines):
            lines.append(f"and {self.num_bad - len(lines):,} more")
        raise DataError(f"{self.num_bad:,} rows cannot be learned from:\n  " + "\n  ".join(lines), remedy=remedy)

    def notes(self) -> Iterator[str]:
        """Lines for the person."""
        if self.num_dropped:
            yield f"{count_text(self.num_dropped, 'row')} left out, because a text is empty"
        for remark, count in self.remarks.items():
            yield f"{count_text(count, 'row')}: {remark}"


@dataclass(frozen=True)
class _Found:
    """A data set before it is read.

    Attributes:
        name: For messages and the card, without the folders of this machine.
        rows: What it holds, or...
        ready: ...examples that someone's code made.
        draft: From a row to a conversation.
        system: The system prompt of all; `None` leaves each its own, empty takes it away.
        drops_blanks: Whether rows with a blank text are left out rather than refused.
        source, notes: As in `TrainingData`.
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
        """Examples one by one; what is wrong or worth telling is noted."""
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
    """The conversation under this system prompt."""
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
            f"data.file is your own copy of a preset's data, and '{name}' is no preset",
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
    resolve(DATASETS, name)  # says that there is no such name, and which is like it
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
            f"the data of '{task.name}' are on no hub",
            remedy="fetch them from where its authors publish them, and give the file as data.file.",
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
                f"data.{setting} has no meaning for '{name}', whose examples are made by code", remedy="leave it out."
            )
    ready = tuple(made)
    wrong = next((e for e in ready if not isinstance(e, Example)), None)
    if wrong is not None:
        raise DataError(
            f"'{name}' gave a {type(wrong).__name__}, not an Example",
            remedy="return backmerge.records.Example objects, each with a reference, or a Task.",
        )
    return _Found(name, ready=ready, draft=recognised, system=settings.system, num_examples=settings.num_examples)


def _of_files(path: Path, settings: DataSettings, tsv_columns: Sequence[str]) -> tuple[Iterator[Row], dict[str, Any]]:
    """Rows, and what the card says of the files."""
    if settings.revision is not None:
        raise ConfigError(f"data.revision is a hub's, and {path} is a file", remedy="leave it out.")
    files = files_of(path)
    rows = (row for file in files for row in read_rows(file, tsv_columns))
    return rows, {"files": {file.name: _digest(file) for file in files}}


def _of_hub(hub: HubData) -> tuple[Iterator[Row], dict[str, Any], tuple[str, ...]]:
    source = {"hub": hub.name, "revision": hub.revision, "file": hub.file, "split": hub.split}
    notes = () if hub.revision else (f"{hub.name} is not pinned: data.revision gives the same rows another day",)
    return hub_rows(hub), source, notes


def _digest(file: Path) -> str:
    """XXH3 (128 bit) of a file's bytes, as `xxhsum -H128` prints it."""
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
            f"data.columns maps '{unknown}', which is no column that we ask for{closest(unknown, known)}",
            remedy=f"map any of {', '.join(dict.fromkeys(known))} to your file's own column.",
        )


HELPFUL = "You are a helpful assistant."


@dataclass(frozen=True)
class Task:
    """The data of one of the paper's tasks: where it is, and how a row of it becomes an example.

    Attributes:
        name: As in the table of data sets.
        hub: Where it is on the hub; `None` where there is no copy to rely on, and a file must be given.
        columns: What `draft` asks a row for.
        draft: From a row to a conversation and its answer, without the system prompt.
        systems: A model family (`model_type` of its config.json) to its system prompt; `""` is for all others.
            Families without a system role (Gemma) have the text put in front of the user's turn as it is rendered.
        num_examples: How many are sampled.
        is_uniform_by_category: Whether as many are taken of each category, as far as it has them.
        tsv_columns: The columns of its .tsv files, where those have no header.
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
        """The system prompt for a model family; empty for none."""
        return self.systems.get(family, self.systems.get("", ""))
