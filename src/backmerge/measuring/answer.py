"""Answers of models to benchmarks; each model's answers to a benchmark's split are stored as a unit of the run.

An engine that can serve many variants at once gets all prompts of all of them. Nothing is asked twice: answers are read
from the run's units, and those of earlier runs from the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from backmerge.benchmarks.protocol import Benchmark
from backmerge.benchmarks.scoring import Values
from backmerge.checkpoints.reader import context_length
from backmerge.errors import GenerationError
from backmerge.execution import Work
from backmerge.generation.cache import CompletionCache, tokenizer_identity
from backmerge.generation.protocol import (
    Drawing,
    Generator,
    Request,
    Sampling,
    realised,
)
from backmerge.judging.protocol import Judge
from backmerge.measuring.remote import RemoteWorkers, completions_of
from backmerge.measuring.usage import Usage
from backmerge.merging.served import Realisation
from backmerge.planning.points import Member
from backmerge.progress import Advance, Bar, Part, bar_of
from backmerge.records import Completion, Example, Value, to_json
from backmerge.runs import RunDirectory, key_of

# engines that refuse a prompt beyond the model's context; others may cut it, or know the context better
REFUSING = frozenset({"transformers", "vllm"})


class Job(NamedTuple):
    """One model on one benchmark's split."""

    member: Member
    benchmark: Benchmark
    split: str
    examples: Sequence[Example]

    @property
    def ids(self) -> list[str]:
        """The ids of the examples."""
        return [example.id for example in self.examples]


@dataclass(frozen=True)
class Answered:
    """One model's answers to one benchmark's split, from an engine, an earlier run or a file.

    Attributes:
        completions: In the order of the examples, each one's samples in a row; empty for benchmarks that compare
            likelihoods.
        key: A hash of everything that the answers depend on; verdicts and values are stored under it.
        realisation: How the model was measured; `None` for answers from a file.
        likelihoods: Each example's value by metric, for a benchmark that compares likelihoods.
    """

    member: Member
    benchmark: Benchmark
    split: str
    examples: Sequence[Example]
    completions: Sequence[Completion]
    key: str
    realisation: Realisation | None = None
    likelihoods: Mapping[str, Values] | None = None

    @property
    def ids(self) -> list[str]:
        """The ids of the examples."""
        return [example.id for example in self.examples]

    def to(self, examples: Sequence[Example]) -> Answered:
        """Return the answers to some of the prompts only."""
        ids = {example.id for example in examples}
        completions = [completion for completion in self.completions if completion.example in ids]
        return replace(self, examples=examples, completions=completions, key=key_of(self.key, sorted(ids)))


def inputs_of(
    settings: Any, asked: Sequence[Job | Answered], judges: Sequence[Judge | None], environment: Any
) -> dict[str, Any]:
    """Return hashes of everything that the scores of these jobs and answers depend on, for `RunDirectory.begin`."""
    models = {key_of(one.member.name, one.key if isinstance(one, Answered) else _identity(one.member)) for one in asked}
    return {
        "settings": key_of(settings),
        "models": key_of(sorted(models)),
        "benchmarks": key_of(
            [
                [one.benchmark.name, one.split, *map(to_json, one.examples), *filter(None, [one.benchmark.code])]
                for one in asked
            ]
        ),
        "judges": [None if judge is None else judge.identity for judge in judges],
        "environment": environment,
    }


class Answerer:
    """Gets answers from one engine, and never the same one twice: answers in the run's units are read from there.

    Args:
        run: Stores the units.
        engine: Answers prompts.
        drawing: How answers are drawn if a benchmark does not say.
        cache: Answers of earlier runs; without it they are not used.
        max_new_tokens: A generation limit for all benchmarks, if it is lower than their own.
        remote: Processes that make the answers, if not this one; the engine is then only asked for its identity.
        usage: Counts answers and seconds.
        log: The file in the run for a server's answers, one by one; each file has one writer.
    """

    def __init__(
        self,
        run: RunDirectory,
        engine: Generator,
        drawing: Drawing,
        *,
        cache: CompletionCache | None = None,
        max_new_tokens: int | None = None,
        remote: RemoteWorkers | None = None,
        usage: Usage | None = None,
        log: str = "answered.jsonl",
    ) -> None:
        self.run = run
        self.engine = engine
        self.drawing = drawing
        self.max_new_tokens = max_new_tokens
        self.remote = remote
        self.cache = cache
        self.usage = usage if usage is not None else Usage()
        self._num_tokens: dict[str, int] = {}  # tokens of prompts that fit in a model's context
        engine.answer_log = run.path / log

    def answer(self, jobs: Sequence[Job], advance: Advance, *, is_fresh: bool = False) -> list[Answered]:
        """Return the answers to all jobs; generate missing ones together.

        Args:
            jobs: The models and the examples to ask them.
            advance: Called with the number of examples that are answered.
            is_fresh: Whether answers of other runs are ignored: a confirmation is always measured again.

        Raises:
            GenerationError: a prompt leaves no room for an answer in a model's context; nothing was generated then.
        """
        shown = bar_of(advance)
        keys = [self._key(job) for job in jobs]
        with self.usage.timed("answering"):
            completions = self._completions(jobs, keys, shown, is_fresh=is_fresh)
            likelihoods = [
                self._compare(job, key, shown) if job.benchmark.choices else None
                for job, key in zip(jobs, keys, strict=True)
            ]
        return [
            Answered(
                *job[:3], tuple(job.examples), tuple(found), key, realised(self.engine, job.member.variant), values
            )
            for job, found, key, values in zip(jobs, completions, keys, likelihoods, strict=True)
        ]

    def _sampling(self, benchmark: Benchmark) -> Sampling:
        return benchmark.sampling_as(self.drawing, self.max_new_tokens)

    def _key(self, job: Job) -> str:
        asked = key_of([to_json(example) for example in job.examples])
        sampling = self._sampling(job.benchmark).model_dump()
        return key_of(_identity(job.member), self.engine.identity, sampling, asked)

    def _scope(self, job: Job) -> str:
        variant = job.member.variant
        assert variant is not None, "answers of a server's models are only stored in the run"
        sampling = self._sampling(job.benchmark)
        # random draws may depend on the prompts that are asked together
        together = [to_json(example) for example in job.examples] if sampling.temperature > 0 else []
        return key_of(
            variant.identity,
            self.engine.realisation(variant),
            tokenizer_identity(variant.base.directory),
            self.engine.identity,
            sampling.model_dump(),
            together,
            "thoughts apart",  # answers stored before thoughts were separated contain both
        )

    def _completions(
        self, jobs: Sequence[Job], keys: Sequence[str], shown: Bar, *, is_fresh: bool
    ) -> list[list[Completion]]:
        """Return each job's completions; missing ones are generated together."""
        cache = None if is_fresh else self.cache
        whole: list[list[Completion]] = [[] for _ in jobs]
        kept: dict[int, dict[str, list[Completion]]] = {}
        requests: list[Request] = []
        places: list[int] = []
        for place, job in enumerate(jobs):
            if job.benchmark.choices is not None:
                continue
            if self.run.has_unit("completions", keys[place]):
                whole[place] = self.run.read_unit("completions", keys[place], Completion, job.ids)
                shown.skip(len(job.examples))
                self.usage.num_kept += len(job.examples) * self._sampling(job.benchmark).num_samples
                continue
            kept[place], missing = self._found(job, cache)
            self.usage.num_from_cache += sum(map(len, kept[place].values()))
            shown.skip(len(kept[place]))
            if missing:
                requests.append(Request(job.member.variant, missing, self._sampling(job.benchmark)))
                places.append(place)
            else:
                whole[place] = self._keep(job, keys[place], kept[place])

        read = self._check_prompts(jobs, places, requests)
        if not any(job.benchmark.choices for job in jobs):  # likelihoods have no answers to time
            parts = [_part(jobs[place], one, tokens) for place, one, tokens in zip(places, requests, read, strict=True)]
            shown.expect(parts, self.usage.meter)

        def take(number: int, made: Sequence[Completion]) -> None:
            place, request = places[number], requests[number]
            num_tokens = sum(completion.num_tokens for completion in made)
            shown.finish(number, num_tokens)
            self._count(request, num_tokens, len(made))
            if cache is not None:
                cache.keep(self._scope(jobs[place]), request.examples, made)
            found = kept[place]
            for completion in made:
                found.setdefault(completion.example, []).append(completion)
            whole[place] = self._keep(jobs[place], keys[place], found)

        if self.remote is None:
            for number, made in self.engine.generate_many(requests, shown):
                take(number, made)
        elif requests:
            self.engine.release()  # a model that it compared likelihoods with; the workers need the memory
            works = [
                Work(f"{number}-{keys[places[number]]}", self.remote.spec_of(request))
                for number, request in enumerate(requests)
            ]
            numbers = {work.key: number for number, work in enumerate(works)}
            self.remote.executor.carry_out(
                works,
                advance=shown,
                on_done=lambda work, result: take(numbers[work.key], completions_of(result)),
            )
        return whole

    def release(self) -> None:
        """Free the memory that the engine has, here and in other processes, until the next answer."""
        self.engine.release()
        if self.remote is not None:
            self.remote.executor.release()

    def missing(self, jobs: Sequence[Job], *, is_fresh: bool = False) -> list[tuple[Job, Part]]:
        """Return what `evaluate` would generate for these jobs: what neither this run nor, unless fresh, the cache has.

        Raises:
            GenerationError: a prompt leaves no room for an answer in a model's context.
        """
        cache = None if is_fresh else self.cache
        asked: list[Job] = []
        requests: list[Request] = []
        for job in jobs:
            if job.benchmark.choices is None and not self.run.has_unit("completions", self._key(job)):
                _, missing = self._found(job, cache)
                if missing:
                    asked.append(job)
                    requests.append(Request(job.member.variant, missing, self._sampling(job.benchmark)))
        read = self._check_prompts(asked, range(len(asked)), requests)
        return [(job, _part(job, one, tokens)) for job, one, tokens in zip(asked, requests, read, strict=True)]

    def _found(self, job: Job, cache: CompletionCache | None) -> tuple[dict[str, list[Completion]], list[Example]]:
        """Return the answers in the cache, and the prompts without one."""
        kept = cache.find(self._scope(job), job.examples) if cache is not None else {}
        missing = [example for example in job.examples if example.id not in kept]
        if missing and self._sampling(job.benchmark).temperature > 0:
            return {}, list(job.examples)
        return kept, missing

    def _count(self, request: Request, num_tokens: int, num_answers: int) -> None:
        way = "live" if request.variant is None else self.engine.realisation(request.variant)
        self.usage.answered(request.variant, way, num_answers, num_tokens)

    def _check_prompts(self, jobs: Sequence[Job], places: Sequence[int], requests: Sequence[Request]) -> list[int]:
        """Check that each prompt of all jobs fits in the model's context, before the first job starts.

        Returns:
            The tokens of each request's prompts; 0 if the engine renders them elsewhere.
        """
        if self.engine.identity["engine"] not in REFUSING:
            return [0] * len(requests)
        from backmerge.generation.chat import load_tokenizer, prompt_lengths

        tokenizers: dict[Path, Any] = {}
        found = []
        for place, request in zip(places, requests, strict=True):
            assert request.variant is not None
            directory, benchmark = request.variant.companions.folder(), jobs[place].benchmark
            known = key_of(str(directory), benchmark.name, [example.id for example in request.examples])
            if known not in self._num_tokens:
                if directory not in tokenizers:
                    tokenizers[directory] = load_tokenizer(directory, needs_template=False)
                lengths = prompt_lengths(tokenizers[directory], request.examples)
                check_prompts_fit(benchmark, request.examples, lengths, context_of(directory, self.engine))
                self._num_tokens[known] = sum(lengths)
            found.append(self._num_tokens[known])
        return found

    def _keep(self, job: Job, key: str, found: Mapping[str, Sequence[Completion]]) -> list[Completion]:
        """Write a job's completions as a unit, in the order of its examples."""
        made = [completion for example in job.examples for completion in found.get(example.id, ())]
        return self.run.keep_unit("completions", key, Completion, made, job.ids)

    def _compare(self, job: Job, key: str, shown: Bar) -> dict[str, Values]:
        """Return the values of a benchmark that compares likelihoods."""
        choices = job.benchmark.choices
        assert choices is not None
        assert job.benchmark.scorer is not None

        def make() -> Iterator[Value]:
            from backmerge.generation.chat import load_tokenizer

            if not self.engine.gives_likelihoods:
                raise GenerationError(
                    f"'{job.benchmark.name}' compares likelihoods, which the engine {self.engine.identity['engine']} "
                    "does not provide",
                    remedy="measure it on another engine: --engine transformers.",
                )
            variant = job.member.variant
            assert variant is not None, "a server's model is not asked for likelihoods"
            tokenizer = load_tokenizer(variant.companions.folder(), needs_template=False)
            pairs = choices.pairs(tokenizer, job.examples)
            if self.remote is not None:  # likelihoods are compared here
                self.remote.executor.release()
            found = self.engine.log_likelihoods(variant, pairs, lambda _: None)
            self.usage.answered(variant, "live", len(job.examples), 0)
            for metric, values in choices.score(job.examples, found).items():
                for example, value in zip(job.examples, values, strict=True):
                    yield Value(example.id, metric, value)

        scored = key_of(key, job.benchmark.scored_by)
        if self.run.has_unit("values", scored):
            shown.skip(len(job.examples))
            self.usage.num_kept += len(job.examples)
            return values_by_metric(self.run.read_unit("values", scored, Value, job.ids))
        records = self.run.keep_unit("values", scored, Value, make(), job.ids)
        shown(len(job.examples))
        return values_by_metric(records)


def _part(job: Job, request: Request, num_tokens: int) -> Part:
    """Describe a request to estimate its time; `num_tokens` is the total of its prompts."""
    samples = request.sampling.num_samples
    return Part(
        job.benchmark.name, len(request.examples) * samples, num_tokens * samples, request.sampling.max_new_tokens
    )


def _identity(member: Member) -> Any:
    """Return the identity of a model's weights; `None` for a server's model, which is in the engine's identity."""
    return None if member.variant is None else member.variant.identity


def values_by_metric(records: Sequence[Value]) -> dict[str, Values]:
    """Return each example's value by metric."""
    values: dict[str, Values] = {}
    for record in records:
        values.setdefault(record.metric, {})[record.example] = record.value
    return values


def context_of(directory: Path, engine: Generator) -> int | None:
    """Return a model's context in tokens, prompt and answer together; `None` if config and engine do not say."""
    limits = [context_length(directory), engine.max_length]
    known = [limit for limit in limits if isinstance(limit, int)]
    return min(known) if known else None


def check_prompts_fit(
    benchmark: Benchmark, examples: Sequence[Example], lengths: Sequence[int], context: int | None
) -> None:
    """Check that each prompt leaves room for an answer.

    Raises:
        GenerationError: some don't; names the first.
    """
    if context is None:
        return
    long = [(e, length) for e, length in zip(examples, lengths, strict=True) if length + 1 > context]
    if not long:
        return
    example, length = long[0]
    more = f", and {len(long) - 1} more are too long" if len(long) > 1 else ""
    raise GenerationError(
        f"prompt '{example.id}' of {benchmark.name} has {length:,} tokens, but the model's context is {context:,}"
        f"{more}: nothing was generated",
        remedy=f"use a model with a longer context, or remove {benchmark.name} from evaluate.{benchmark.kind}; in your "
        "own file, remove the line.",
        example=example.id,
    )
