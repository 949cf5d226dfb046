"""Guard prompts: the prompts on which a merge by direction should act like the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from backmerge.benchmarks.catalogue import find_of_any_kind, named
from backmerge.benchmarks.protocol import Benchmark, Kind
from backmerge.benchmarks.split import Source, calibration_of, wording_of
from backmerge.config import Settings
from backmerge.errors import ConfigError, DataError
from backmerge.merging.inputs import GuardKind, InputStatistics
from backmerge.records import Example, to_json
from backmerge.registry import BENCHMARKS, Permissions
from backmerge.runs import key_of

OWN = "own"
STATISTICS = ".safetensors"
LEAST_LEFT = 2  # smallest number of prompts of a benchmark: one to choose λ on, one to confirm it


class GuardSettings(Settings):
    """The prompts on which a merge should act like the base, and what is kept of the base's inputs on them.

    Attributes:
        source: A benchmark's name (NAME=DATA with your copy of its data), a .jsonl or .csv file of prompts, `own` for
            prompts that the base writes, or a file that `backmerge inputs` wrote.
        kind: Kind of a file's prompts: `harmful` or `ordinary`; for benchmarks it is known.
        num_prompts: Largest number; they are split off from the measured prompts, with their near-duplicates.
        max_new_tokens: Length of the base's own answers, whose inputs count too; 0 for the prompts alone.
        max_directions: How many directions of each layer's input space are kept; all others share the rest equally.
        seed: Seed of the prompts that the base writes.
    """

    source: str
    kind: Literal["harmful", "ordinary"] | None = None
    num_prompts: Annotated[int, Field(gt=0)] = 64
    max_new_tokens: Annotated[int, Field(ge=0)] = 64
    max_directions: Annotated[int, Field(gt=0)] = 1024
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @property
    def short(self) -> str:
        """Return the guard's name in the name of a series; settings other than the default follow it."""
        name = self.source.partition("=")[0] if self.source.partition("=")[0] in BENCHMARKS.entries else self.source
        return self._called(Path(name).stem if name not in BENCHMARKS.entries else name)

    @property
    def full(self) -> str:
        """Return the source as given, and settings other than the default; no other settings have the same."""
        return self._called(self.source)

    def _called(self, name: str) -> str:
        changed = self.model_dump(exclude={"source"}, exclude_defaults=True)
        return ":".join([name, *(f"{key}={value}" for key, value in sorted(changed.items()))])


class TaskSettings(Settings):
    """Rows of the task on which a merge should act like the tuned model: not those that it is measured on.

    Attributes:
        source: A .jsonl or .csv file of prompts with answers, or a file that `backmerge inputs --task` wrote. None of
            its prompts is measured.
        num_prompts: Largest number that statistics are collected on; the first ones are used.
        max_directions: How many directions of each layer's input space are kept, as for a guard.
    """

    source: str
    num_prompts: Annotated[int, Field(gt=0)] = 64
    max_directions: Annotated[int, Field(gt=0)] = 1024

    @property
    def as_guard(self) -> GuardSettings:
        """Return the same as a guard, without the model's own answers."""
        return GuardSettings(**self.model_dump(), max_new_tokens=0)

    @property
    def short(self) -> str:
        """Return the rows' name, in the form of a guard's."""
        return GuardSettings(**self.model_dump()).short

    @property
    def full(self) -> str:
        """Return the source as given, in the form of a guard's; never equal to a guard's."""
        return f"task:{GuardSettings(**self.model_dump()).full}"


def _by_source(given: Any) -> Any:
    return {"source": given} if isinstance(given, str) else given


Asked = GuardSettings | TaskSettings
GuardChoice = Annotated[GuardSettings, BeforeValidator(_by_source)]
TaskChoice = Annotated[TaskSettings, BeforeValidator(_by_source)]


class Guard(NamedTuple):
    """A guard with its prompts.

    Attributes:
        settings: The user's settings.
        kind: The kind of its prompts.
        prompts: Split off from everything that is measured; empty if the base writes them, or if there is a file.
        statistics: The statistics of a file.
        answers: A task's given answers; the base's own if `None`.
        unused: Digests of a task's further prompts, which are not measured either: the model may be tuned on them.
    """

    settings: GuardSettings
    kind: GuardKind
    prompts: tuple[Example, ...] = ()
    statistics: InputStatistics | None = None
    answers: tuple[str, ...] | None = None
    unused: tuple[str, ...] = ()

    @property
    def digests(self) -> tuple[str, ...]:
        """The digests of all prompts that must not be measured on."""
        if self.statistics is not None:
            return self.statistics.provenance.prompts
        return (*(digest_of_prompt(prompt) for prompt in self.prompts), *self.unused)

    @property
    def description(self) -> str:
        """A description for reports."""
        found = self.statistics.provenance if self.statistics is not None else None
        kind = self.kind if found is None else found.kind
        name = self.settings.short.partition(":")[0] if found is None else found.source
        count = found.num_prompts if found is not None else len(self.prompts) or self.settings.num_prompts
        whose = "prompts that the base wrote" if kind == "own" else f"{kind} prompts of {name}"
        whose = f"rows of {name}" if kind == "task" else whose
        return f"{count} {whose}"

    @property
    def fingerprint(self) -> str:
        """A hash of the prompts, or of the file of statistics; the prompts that the base writes depend on the base."""
        if self.statistics is not None:
            return self.statistics.fingerprint
        return key_of([to_json(prompt) for prompt in self.prompts])


def fingerprints_of(guards: Mapping[Asked, Guard]) -> dict[str, str]:
    """Return a hash of each guard's data by its full settings: two files may have the same short name."""
    return {settings.full: guard.fingerprint for settings, guard in guards.items()}


def digest_of_prompt(example: Example) -> str:
    """Return a hash of a prompt's wording, which identifies it without its text."""
    return key_of(wording_of(example))[:16]


def find_guards(
    asked: Iterable[Asked], benchmarks: Sequence[Benchmark], permissions: Permissions
) -> tuple[dict[Asked, Guard], tuple[Benchmark, ...]]:
    """Return the guards with their prompts, and the benchmarks without these and their near-duplicates.

    A task's rows are similar to its test rows by nature, so benchmarks only lose prompts with the same wording as one
    of them.

    Raises:
        BackmergeError: a guard is unknown, or too few prompts are left to measure.
    """
    guards: dict[Asked, Guard] = {}
    left: dict[str, set[str]] = {b.name: {example.id for example in b.examples} for b in benchmarks}
    sources = [Source(b.name, b.kind, b.examples) for b in benchmarks]
    for settings in dict.fromkeys(asked):
        if settings.source == OWN and isinstance(settings, GuardSettings):
            guards[settings] = Guard(settings, "own")
            continue
        known = _with_known_prompts(settings)
        if known is not None:
            guards[settings] = known
            digests = frozenset(known.digests)
            for source in sources:
                left[source.name] -= {one.id for one in source.examples if digest_of_prompt(one) in digests}
            continue
        assert isinstance(settings, GuardSettings)
        benchmark, kind = _prompts_of(settings, permissions)
        # the near-duplicates of a file's prompts are not known
        guard = Source(benchmark.name, "" if kind == "file" else benchmark.kind, benchmark.examples)
        calibration = calibration_of(guard, sources, settings.num_prompts)
        guards[settings] = Guard(settings, kind, tuple(calibration.prompts))
        for name, kept in calibration.left.items():
            left[name] &= {example.id for example in kept}
    return guards, tuple(_without(b, left[b.name]) for b in benchmarks)


def _with_known_prompts(settings: Asked) -> Guard | None:
    """Return the guard if its prompts are not split off from others: a file of statistics, or a task's rows."""
    plain = settings if isinstance(settings, GuardSettings) else settings.as_guard
    if settings.source.endswith(STATISTICS):
        statistics = InputStatistics(Path(settings.source).expanduser())
        return Guard(plain, statistics.provenance.kind, statistics=statistics)
    if isinstance(settings, GuardSettings):
        return None
    benchmark = find_of_any_kind(named(settings.source), "utility")
    rows, more = benchmark.examples[: settings.num_prompts], benchmark.examples[settings.num_prompts :]
    unused = tuple(digest_of_prompt(row) for row in more)
    return Guard(plain, "task", rows, answers=tuple(row.reference or "" for row in rows), unused=unused)


def _prompts_of(settings: GuardSettings, permissions: Permissions) -> tuple[Benchmark, GuardKind]:
    asked = named(settings.source)
    is_file = asked.name not in BENCHMARKS.entries
    side: Kind = "over_refusal" if settings.kind == "ordinary" else "safety"
    benchmark = find_of_any_kind(asked, side, permissions)
    if not is_file and settings.kind is not None:
        raise ConfigError(
            f"the guard '{asked.name}' has prompts of a known kind, but 'kind' is {settings.kind}",
            remedy="remove 'kind'; it is only for files.",
        )
    if any(example.is_raw for example in benchmark.examples):
        raise ConfigError(
            f"the prompts of '{asked.name}' are texts to continue, not questions", remedy="give prompts for a chat."
        )
    if is_file:
        return benchmark, settings.kind or "file"
    return benchmark, "harmful" if benchmark.kind == "safety" else "ordinary"


def _without(benchmark: Benchmark, kept: set[str]) -> Benchmark:
    examples = tuple(example for example in benchmark.examples if example.id in kept)
    if len(examples) < min(LEAST_LEFT, len(benchmark.examples)):
        raise DataError(
            f"guards and task inputs take nearly all of the {len(benchmark.examples)} prompts of '{benchmark.name}': "
            "prompts that a merge is made with are never used to measure it",
            remedy="use other prompts for a guard, or fewer of them (num_prompts); for task inputs, a file whose rows "
            "are not measured.",
        )
    return replace(benchmark, examples=examples) if len(examples) < len(benchmark.examples) else benchmark
