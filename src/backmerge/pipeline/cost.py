"""What an experiment will cost, before it begins: answers, tokens, and bytes read and written.

Counted with the models at hand: their tokenizer, their files. `workload` reckons hours for what is not there yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from backmerge.benchmarks.protocol import Benchmark
from backmerge.benchmarks.split import Split, limited
from backmerge.checkpoints.files import num_bytes
from backmerge.checkpoints.reader import Weights
from backmerge.generation.chat import load_tokenizer
from backmerge.generation.protocol import Generator, Sampling
from backmerge.measuring.answer import sampling_of
from backmerge.measuring.prompt_lengths import prompt_lengths
from backmerge.merging.plan import checkpoint_bytes
from backmerge.merging.recipe import Variant
from backmerge.pipeline.preparation import Prepared
from backmerge.pipeline.validation import num_validation_answers
from backmerge.pipeline.workload import confirmed_points, num_models, num_searched
from backmerge.planning.points import Point
from backmerge.progress import count_text, size_text
from backmerge.records import Example

SAMPLE = 500  # prompts of a benchmark's split whose tokens are counted; of more, a sample stands for all


class Plan(NamedTuple):
    """What there is to do at most, as if nothing had been done before; tuning apart.

    Attributes:
        num_models: Models that are measured to choose λ.
        num_answers: Their answers.
        num_validating: Answers, or likelihoods, on rows that the tuning held out; not in the tokens.
        num_confirming: Answers of the confirmation.
        num_prompt_tokens: Of all prompts, each once for each model that is asked it.
        max_new_tokens: Generated, if every answer went to its limit.
        num_judged: Answers for the judge, of both.
        num_merged: Merged models among those measured to choose λ.
        bytes_read: Of weights.
        bytes_written: Of weights: adapters for the engine, the checkpoints that it needs, and the chosen models.
        is_at_most: Whether the search may leave some of the answers out.
        num_refined: λs beyond the grid, of each series, that are measured at most; they are part of the counts above.
    """

    num_models: int
    num_answers: int
    num_validating: int
    num_confirming: int
    num_prompt_tokens: int
    max_new_tokens: int
    num_judged: int
    num_merged: int
    bytes_read: int
    bytes_written: int
    is_at_most: bool
    num_refined: int = 0

    @property
    def sentence(self) -> str:
        """For the person at the terminal."""
        at_most = "at most " if self.is_at_most else ""
        held_out = f" and {self.num_validating:,} on held-out rows" if self.num_validating else ""
        refined = f" (with up to {self.num_refined} beyond the grid)" if self.num_refined else ""
        return (
            f"To make: {at_most}{count_text(self.num_answers, 'answer')} of {count_text(self.num_models, 'model')} to "
            f"choose λ{refined}"
            f"{held_out}, {self.num_confirming:,} to confirm it; {at_most or 'about '}{self.num_prompt_tokens:,} "
            f"prompt tokens, at most {self.max_new_tokens:,} generated. Weights: about "
            f"{size_text(self.bytes_read)} to read, {size_text(self.bytes_written)} to write. "
            "What was done before is reused."
        )


class _Asked(NamedTuple):
    """One model's share of a split: answers, tokens of prompts, most tokens of answers, answers for the judge."""

    num_answers: int = 0
    num_prompt_tokens: int = 0
    max_new_tokens: int = 0
    num_judged: int = 0

    def times(self, num_models: int) -> _Asked:
        return _Asked(*(count * num_models for count in self))

    def plus(self, other: _Asked) -> _Asked:
        return _Asked(*(ours + theirs for ours, theirs in zip(self, other, strict=True)))


def plan_of(prepared: Prepared, points: Sequence[Point], num_tuned: int, engine: Generator | None = None) -> Plan:
    """What the experiment costs at most.

    Args:
        prepared: The experiment.
        points: All that may be measured.
        num_tuned: Tuned models, those that are still to be made included.
        engine: Says how merges reach it; all are merged in memory without one, or before the tuned models are there.
    """
    experiment = prepared.experiment
    asked = {split: _asked(prepared, split) for split in ("selection", "confirmation")}
    merged = [point for point in points if point.role == "merged"]
    num_measured = num_searched(experiment, points, num_tuned)
    num_merged = num_measured - num_models([point for point in points if point.role != "merged"], num_tuned)
    num_confirmed = num_models(confirmed_points(points, compares=experiment.choice.compare), num_tuned)
    total = asked["selection"].times(num_measured).plus(asked["confirmation"].times(num_confirmed))
    moved = _moved(prepared, merged, num_merged, num_tuned, engine)
    return Plan(
        num_measured,
        asked["selection"].num_answers * num_measured,
        num_validation_answers(prepared, points),
        asked["confirmation"].num_answers * num_confirmed,
        total.num_prompt_tokens,
        total.max_new_tokens,
        total.num_judged * (1 if prepared.second_judge is None else 2),
        num_merged,
        *moved,
        experiment.searched_by != "grid" or experiment.num_refined > 0,
        experiment.num_refined,
    )


def _asked(prepared: Prepared, split: Split) -> _Asked:
    tokenizer = load_tokenizer(prepared.base.directory, needs_template=False)
    settings = prepared.experiment.evaluate
    total = _Asked()
    for benchmark in prepared.benchmarks:
        examples = prepared.splits[benchmark.name][split]
        sampling = sampling_of(benchmark, settings.sampling, settings.max_new_tokens)
        total = total.plus(_of_benchmark(benchmark, examples, sampling, tokenizer))
    return total


def _of_benchmark(benchmark: Benchmark, examples: Sequence[Example], sampling: Sampling, tokenizer: Any) -> _Asked:
    sample = limited(examples, SAMPLE)
    if benchmark.choices is not None:
        # likelihoods are compared: every pair is read, nothing is generated
        texts = [context + more for context, more in benchmark.choices.pairs(tokenizer, sample)]
        read = sum(map(len, tokenizer(texts)["input_ids"])) if texts else 0
        return _Asked(len(examples), _scaled(read, len(examples), len(sample)))
    num_answers = len(examples) * sampling.num_samples
    return _Asked(
        num_answers,
        _scaled(sum(prompt_lengths(tokenizer, sample)), len(examples), len(sample)),
        num_answers * sampling.max_new_tokens,
        num_answers if benchmark.is_judged else 0,
    )


def _scaled(count: int, num_all: int, num_sample: int) -> int:
    return round(count * num_all / num_sample) if num_sample else 0


def _moved(
    prepared: Prepared, merged: Sequence[Point], num_merged: int, num_tuned: int, engine: Generator | None
) -> tuple[int, int]:
    """Bytes read and written of weights.

    Merged in memory, base and tuned model are read for each; an adapter is written and read, and the base once. What
    is chosen is written, and the confirmation reads it, beside base and tuned model.
    """
    base = sum(num_bytes(name, info) for name, info in prepared.base.infos.items())
    tuned = _tuned_bytes(prepared, base)
    whole = checkpoint_bytes(Variant(prepared.base, dtype=prepared.output.dtype))
    ways = _ways(prepared, merged, engine)
    num_adapters, num_checkpoints = ways.count("adapter"), ways.count("checkpoint")
    num_live = num_merged - num_adapters - num_checkpoints
    read = base + num_tuned * (base + tuned)  # measured to choose λ, unmerged
    read += num_live * (base + tuned) + num_adapters * 2 * tuned + num_checkpoints * (base + tuned + whole)
    read += base + num_tuned * (base + tuned) + num_tuned * (base + tuned + whole)  # confirmed
    written = num_adapters * tuned + num_checkpoints * whole + num_tuned * whole
    return read, written


def _ways(prepared: Prepared, merged: Sequence[Point], engine: Generator | None) -> list[str]:
    if engine is None or not prepared.tuned:
        return []
    return [
        engine.realisation(member.local_variant)
        for point in merged
        for member in prepared.members_at(point, prepared.tuned)
    ]


def _tuned_bytes(prepared: Prepared, base: int) -> int:
    """Of one tuned model; where it is still to be made, a checkpoint is of the base's size, an adapter next to none."""
    if prepared.tuned:
        return round(sum(_bytes_on_disk(weights) for weights in prepared.tuned.values()) / len(prepared.tuned))
    finetune = prepared.experiment.finetune
    return base if finetune is not None and finetune.mode == "full" else 0


def _bytes_on_disk(weights: Weights) -> int:
    return sum(_size(file) for file in weights.directory.glob("*.safetensors"))


def _size(file: Path) -> int:
    return file.stat().st_size
