"""What is tuned on: rows in the form of the base's family, compared with the safety benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from backmerge.benchmarks.protocol import Benchmark
from backmerge.checkpoints.reader import Checkpoint, read_json
from backmerge.finetuning.datasets import TrainingData, load_training_data
from backmerge.finetuning.encoding import cutoff_for, leaves_no_answer
from backmerge.finetuning.overlap import overlaps, without_overlap
from backmerge.finetuning.settings import FinetuneSettings
from backmerge.generation.chat import load_tokenizer
from backmerge.progress import count_text, say
from backmerge.registry import NOTHING_ALLOWED, Permissions

SHOWN = 5  # rows that a warning names


def load_for(
    base: Checkpoint, settings: FinetuneSettings, seed: int, permissions: Permissions = NOTHING_ALLOWED
) -> TrainingData:
    """The rows that a seed is tuned on and those held out, with the system prompt of the base's family.

    Raises:
        DataError: they cannot be read.
        ConfigError: there is no data set of that name.
    """
    family = str(read_json(base.directory / "config.json").get("model_type", ""))
    data = load_training_data(settings.dataset, settings.data, seed, permissions, family=family)
    tokenizer, cutoff = load_tokenizer(base.directory), cutoff_for(base, settings)
    too_long = [e.id for e in (*data.training, *data.validation) if leaves_no_answer(tokenizer, e, cutoff)]
    if not too_long:
        return data
    gone = frozenset(too_long)
    training, validation = (
        tuple(example for example in part if example.id not in gone) for part in (data.training, data.validation)
    )
    note = (
        f"{count_text(len(too_long), 'example')} left out, because prompts fill the cut-off of {cutoff} tokens "
        f"({', '.join(too_long[:SHOWN])}{', ...' if len(too_long) > SHOWN else ''})"
    )
    return TrainingData(training, validation, {**data.source, "num_without_room": len(too_long)}, (*data.notes, note))


def with_notes(
    training: Mapping[int, TrainingData], benchmarks: Iterable[Benchmark], *, is_dropped: bool
) -> dict[int, TrainingData]:
    """The same data, compared with the safety benchmarks; all that a person should know of it is said, once."""
    against = [benchmark for benchmark in benchmarks if benchmark.kind == "safety"]
    kept: dict[int, TrainingData] = {}
    told: set[str] = set()
    for seed, data in training.items():
        kept[seed], lines = compared(data, against, is_dropped=is_dropped)
        for line in (*data.notes, *lines):
            if line not in told:
                told.add(line)
                say(line)
    return kept


def compared(
    data: TrainingData, benchmarks: Iterable[Benchmark], *, is_dropped: bool
) -> tuple[TrainingData, list[str]]:
    """The data, without what a benchmark also asks if that is to be dropped; and lines that tell of it.

    What was tuned on is no measure: a model that has seen a benchmark's prompts is neither as safe nor as unsafe as
    it looks there.
    """
    lines: list[str] = []
    for benchmark in benchmarks:
        rows = (*data.training, *data.validation)
        found = overlaps(rows, benchmark.name, benchmark.examples)
        if not found:
            continue
        ids = sorted({overlap.example for overlap in found})
        num_exact = len({overlap.example for overlap in found if overlap.is_exact})
        named = ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")
        lines.append(
            f"Overlap: {len(ids)} of {len(rows)} rows to tune on ask what {benchmark.name} asks too ({num_exact} word "
            f"for word): {named}. "
            + ("They are left out." if is_dropped else "What it measures may be off; --drop-overlap leaves them out.")
        )
        if is_dropped:
            data = without_overlap(data, found)
    return data, lines
