"""Answers, verdicts and values of models on benchmarks, each kept as a unit of the run.

Three passes over all that is to be measured, so that the model that answers and the one that judges need not fit the
device together, and an engine that serves many variants at once gets all prompts of all of them: answer, judge, score.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from backmerge.benchmarks.protocol import Benchmark
from backmerge.benchmarks.scoring import Values, over_refusal_values, safety_values, score
from backmerge.errors import GenerationError, RunError
from backmerge.execution import ExecutionSettings, Work, carry_out
from backmerge.generation.cache import CompletionCache, cache_directory, tokenizer_identity
from backmerge.generation.protocol import (
    Drawing,
    EngineSettings,
    Generator,
    Request,
    Sampling,
)
from backmerge.judging.protocol import Judge
from backmerge.measuring.remote import completions_of, spec_of
from backmerge.measuring.usage import Spent
from backmerge.pipeline.prompt_lengths import REFUSING, check_prompts_fit, context_of, prompt_lengths
from backmerge.planning.points import Member
from backmerge.planning.settings import EvaluateSettings
from backmerge.progress import Advance, Bar, Part, bar_of
from backmerge.records import Completion, Example, Score, Value, Verdict, to_json
from backmerge.registry import Permissions, is_plugin
from backmerge.runs import RunDirectory, key_of


class Elsewhere(NamedTuple):
    """Other processes, here or on other machines, that answer.

    Attributes:
        settings: Which.
        engine: What each of them runs.
        permissions: What may be run.
    """

    settings: ExecutionSettings
    engine: EngineSettings
    permissions: Permissions

    @property
    def plugins(self) -> list[str]:
        """Code that is shipped to them."""
        return [self.engine.name] if is_plugin(self.engine.name) else []

    def spec_of(self, request: Request) -> dict[str, Any]:
        """A request as plain data."""
        return spec_of(request, self.engine, self.permissions)


REFUSALS = ("non_refusal", "over_refusal")  # metrics that rest on the finding of refusals alone


class Job(NamedTuple):
    """One model on one benchmark's split."""

    member: Member
    benchmark: Benchmark
    split: str
    examples: Sequence[Example]

    @property
    def ids(self) -> list[str]:
        """The examples' ids."""
        return [example.id for example in self.examples]


def inputs_of(settings: Any, jobs: Sequence[Job], judges: Sequence[Judge | None], environment: Any) -> dict[str, Any]:
    """Return hashes of all that the scores of these jobs depend on, for `RunDirectory.begin`."""
    return {
        "settings": key_of(settings),
        "models": key_of(sorted({key_of(job.member.name, job.member.variant.identity) for job in jobs})),
        "benchmarks": key_of([[job.benchmark.name, job.split, *map(to_json, job.examples)] for job in jobs]),
        "judges": [None if judge is None else judge.identity for judge in judges],
        "environment": environment,
    }


@dataclass(frozen=True)
class Outcome:
    """What one model did on one benchmark's split.

    Attributes:
        completions: In the order of the examples, each one's samples in a row; none where likelihoods are compared.
        verdicts: Of the judge, one for each completion; empty for utility.
        second_verdicts: Of the second judge, if there is one.
        values: Metric to each example's value.
    """

    member: Member
    benchmark: Benchmark
    split: str
    examples: tuple[Example, ...]
    completions: tuple[Completion, ...]
    verdicts: tuple[Verdict, ...]
    second_verdicts: tuple[Verdict, ...]
    values: Mapping[str, Values]

    @property
    def scores(self) -> list[Score]:
        """One score per metric."""
        return [
            score(self.member.name, self.benchmark.name, self.split, metric, self.examples, values)
            for metric, values in self.values.items()
        ]


def sampling_of(benchmark: Benchmark, drawing: Drawing, max_new_tokens: int | None) -> Sampling:
    """How a benchmark's answers are drawn: as it says itself, else as the settings do; the lower limit holds."""
    limit = benchmark.max_new_tokens if max_new_tokens is None else min(benchmark.max_new_tokens, max_new_tokens)
    return Sampling(**{**drawing.model_dump(), **benchmark.sampling, "max_new_tokens": limit})


class Evaluator:
    """Measures models, and never the same one twice: what is in the run's units is read from there.

    Args:
        run: Where units are kept.
        engine: Answers prompts.
        judge: Finds refusals and harm.
        drawing: How answers are drawn where a benchmark does not say.
        max_unscored: Share of a benchmark that the judge may leave unscored.
        second: Another judge, whose verdicts stand beside the first one's.
        cache: Answers of earlier runs; none are looked for without it.
        max_new_tokens: A generation limit for all benchmarks, where it is lower than their own.
        elsewhere: Where answers are made, if not in this process; the engine is then asked only what it is.
        spent: Where answers, verdicts and seconds are counted.
    """

    def __init__(
        self,
        run: RunDirectory,
        engine: Generator,
        judge: Judge,
        drawing: Drawing,
        max_unscored: float,
        *,
        second: Judge | None = None,
        cache: CompletionCache | None = None,
        max_new_tokens: int | None = None,
        elsewhere: Elsewhere | None = None,
        spent: Spent | None = None,
    ) -> None:
        self.run = run
        self.engine = engine
        self.judge = judge
        self.drawing = drawing
        self.max_new_tokens = max_new_tokens
        self.elsewhere = elsewhere
        self.max_unscored = max_unscored
        self.second = second
        self.cache = cache
        self.spent = spent if spent is not None else Spent()
        self._judged: dict[tuple[str, str, str], Verdict] = {}
        self._num_tokens: dict[str, int] = {}  # of prompts that a model's context holds
        engine.answer_log = run.path / "answered.jsonl"

    @property
    def num_generated(self) -> int:
        """Answers that were made."""
        return self.spent.num_generated

    @property
    def num_from_cache(self) -> int:
        """Answers taken over from other runs."""
        return self.spent.num_from_cache

    def evaluate(
        self, jobs: Sequence[Job], advance: Advance, *, is_fresh: bool = False, is_partial: bool = False
    ) -> list[Outcome]:
        """Generate, judge and score, as far as it is not done yet.

        Args:
            jobs: What is measured.
            advance: Told of examples that are answered.
            is_fresh: Whether answers of other runs are not looked for: a confirmation is what was measured now.
            is_partial: Whether the jobs are parts of benchmarks, too small to say how much stays unscored.

        Raises:
            GenerationError: a prompt leaves no room for an answer in a model's context; nothing was generated then.
            RunError: the judge left too many answers unscored.
        """
        shown = bar_of(advance)
        with self.spent.timed("answering"):
            completions = self._answer(jobs, shown, is_fresh=is_fresh)
            likelihoods = {place: self._compare(job, shown) for place, job in enumerate(jobs) if job.benchmark.choices}
        release_before_judging = any(judge is not None and judge.holds_model for judge in (self.judge, self.second))
        if release_before_judging and any(job.benchmark.is_judged for job in jobs):
            self.engine.release()
        shown(0, "judging and scoring")
        with self.spent.timed("judging"):
            verdicts = self._verdicts(self.judge, jobs, completions)
            second = self._verdicts(self.second, jobs, completions) if self.second is not None else [[] for _ in jobs]
        outcomes = []
        for place, job in enumerate(jobs):
            with self.spent.timed("scoring"):
                values = likelihoods.get(place) or self._values(job, completions[place], verdicts[place])
            outcome = Outcome(
                job.member,
                job.benchmark,
                job.split,
                tuple(job.examples),
                tuple(completions[place]),
                tuple(verdicts[place]),
                tuple(second[place]),
                values,
            )
            if not is_partial:
                self._check_unscored(outcome)
            outcomes.append(outcome)
        return outcomes

    def _sampling(self, benchmark: Benchmark) -> Sampling:
        return sampling_of(benchmark, self.drawing, self.max_new_tokens)

    def _key(self, job: Job) -> str:
        asked = key_of([to_json(example) for example in job.examples])
        sampling = self._sampling(job.benchmark).model_dump()
        return key_of(job.member.variant.identity, self.engine.identity, sampling, asked)

    def _scope(self, job: Job) -> str:
        variant = job.member.variant
        sampling = self._sampling(job.benchmark)
        # what is drawn may depend on the prompts that are asked together
        together = [to_json(example) for example in job.examples] if sampling.temperature > 0 else []
        return key_of(
            variant.identity,
            self.engine.realisation(variant),
            tokenizer_identity(variant.base.directory),
            self.engine.identity,
            sampling.model_dump(),
            together,
            "thoughts apart",  # answers that were kept before thoughts were told apart hold both
        )

    def _answer(self, jobs: Sequence[Job], shown: Bar, *, is_fresh: bool) -> list[list[Completion]]:
        """Each job's completions, what is missing generated together."""
        cache = None if is_fresh else self.cache
        keys = [self._key(job) for job in jobs]
        kept: dict[int, dict[str, list[Completion]]] = {}
        requests: list[Request] = []
        places: list[int] = []
        for place, job in enumerate(jobs):
            if job.benchmark.choices is not None:
                continue
            if self.run.has_unit("completions", keys[place]):
                shown.skip(len(job.examples))
                self.spent.num_kept += len(job.examples) * self._sampling(job.benchmark).num_samples
                continue
            kept[place], missing = self._found(job, cache)
            self.spent.num_from_cache += sum(map(len, kept[place].values()))
            shown.skip(len(kept[place]))
            if missing:
                requests.append(Request(job.member.variant, missing, self._sampling(job.benchmark)))
                places.append(place)
            else:
                self._keep(job, keys[place], kept[place])

        read = self._check_prompts(jobs, places, requests)
        if not any(job.benchmark.choices for job in jobs):  # likelihoods have no answers to estimate the time from
            parts = [_part(jobs[place], one, tokens) for place, one, tokens in zip(places, requests, read, strict=True)]
            shown.expect(parts, self.spent.meter)

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
            self._keep(jobs[place], keys[place], found)

        if self.elsewhere is None:
            for number, made in self.engine.generate_many(requests, shown):
                take(number, made)
        else:
            works = [
                Work(f"{number}-{keys[places[number]]}", self.elsewhere.spec_of(request))
                for number, request in enumerate(requests)
            ]
            numbers = {work.key: number for number, work in enumerate(works)}
            carry_out(
                "backmerge.measuring.remote:answer",
                works,
                self.elsewhere.settings,
                advance=shown,
                on_done=lambda work, result: take(numbers[work.key], completions_of(result)),
                shared=self.run.path.absolute(),
                plugins=self.elsewhere.plugins,
            )
        return [
            []
            if job.benchmark.choices is not None
            else self.run.unit("completions", keys[place], Completion, lambda: (), job.ids)
            for place, job in enumerate(jobs)
        ]

    def missing(self, jobs: Sequence[Job], *, is_fresh: bool = False) -> list[tuple[Job, Part]]:
        """Return what `evaluate` would generate for these jobs: neither this run nor, unless fresh, the cache has it.

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
        """The answers that the cache has, and the prompts that it has none to."""
        kept = cache.find(self._scope(job), job.examples) if cache is not None else {}
        missing = [example for example in job.examples if example.id not in kept]
        if missing and self._sampling(job.benchmark).temperature > 0:
            return {}, list(job.examples)
        return kept, missing

    def _count(self, request: Request, num_tokens: int, num_answers: int) -> None:
        way = "live" if request.variant is None else self.engine.realisation(request.variant)
        self.spent.answered(request.variant, way, num_answers, num_tokens)

    def _check_prompts(self, jobs: Sequence[Job], places: Sequence[int], requests: Sequence[Request]) -> list[int]:
        """Check that a model's context holds each prompt, of all jobs before the first is begun.

        Returns:
            The tokens of each request's prompts; 0 where the engine renders them elsewhere.
        """
        if self.engine.identity["engine"] not in REFUSING:
            return [0] * len(requests)
        from backmerge.generation.chat import load_tokenizer

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

    def _keep(self, job: Job, key: str, found: Mapping[str, Sequence[Completion]]) -> None:
        """Write a job's completions as a unit, in the order of its examples."""
        self.run.unit("completions", key, Completion, lambda: [c for e in job.examples for c in found[e.id]])

    def _compare(self, job: Job, shown: Bar) -> dict[str, Values]:
        """The values of a benchmark that compares likelihoods."""
        choices = job.benchmark.choices
        assert choices is not None
        assert job.benchmark.scorer is not None

        def make() -> Iterator[Value]:
            from backmerge.generation.chat import load_tokenizer

            if not self.engine.gives_likelihoods:
                raise GenerationError(
                    f"'{job.benchmark.name}' compares likelihoods, which the engine {self.engine.identity['engine']} "
                    "does not give",
                    remedy="measure it on another engine: --engine transformers.",
                )
            tokenizer = load_tokenizer(job.member.variant.companions.folder(), needs_template=False)
            pairs = choices.pairs(tokenizer, job.examples)
            found = self.engine.log_likelihoods(job.member.variant, pairs, lambda _: None)
            self.spent.answered(job.member.variant, "live", len(job.examples), 0)
            for metric, values in choices.score(job.examples, found).items():
                for example, value in zip(job.examples, values, strict=True):
                    yield Value(example.id, metric, value)

        key = key_of(self._key(job), job.benchmark.scorer.identity)
        if self.run.has_unit("values", key):
            shown.skip(len(job.examples))
            self.spent.num_kept += len(job.examples)
            return _by_metric(self.run.unit("values", key, Value, make, job.ids))
        records = self.run.unit("values", key, Value, make, job.ids)
        shown(len(job.examples))
        return _by_metric(records)

    def _verdicts(
        self, judge: Judge, jobs: Sequence[Job], completions: Sequence[Sequence[Completion]]
    ) -> list[list[Verdict]]:
        """Each job's verdicts; an answer that was judged before to the same prompt is not judged again."""
        found: list[list[Verdict]] = []
        for job, given in zip(jobs, completions, strict=True):
            if not job.benchmark.is_judged:
                found.append([])
                continue
            key = key_of(self._key(job), judge.identity)
            by_id = {example.id: example for example in job.examples}
            asked = [by_id[completion.example] for completion in given]
            self.spent.num_verdicts_kept += len(given) if self.run.has_unit("verdicts", key) else 0
            make = partial(self._judge, judge, asked, given)
            verdicts = self.run.unit("verdicts", key, Verdict, make, job.ids if given else ())
            for example, completion, verdict in zip(asked, given, verdicts, strict=True):
                self._judged[_pair(judge, example, completion)] = verdict
            found.append(verdicts)
        judge.release()
        return found

    def _judge(self, judge: Judge, examples: Sequence[Example], given: Sequence[Completion]) -> list[Verdict]:
        """One verdict per completion, as far as there is none from this run asked of the judge."""
        pairs = [_pair(judge, example, completion) for example, completion in zip(examples, given, strict=True)]
        # of equal answers to a prompt the first is judged
        first = {pair: place for place, pair in reversed(list(enumerate(pairs))) if pair not in self._judged}
        new = sorted(first.values())
        self.spent.num_judged += len(new)
        self.spent.num_judged_once += len(given) - len(new)
        made = judge([examples[place] for place in new], [given[place] for place in new])
        if len(made) != len(new):
            raise RunError(
                f"the judge {judge.name} gave {len(made)} verdicts for {len(new)} completions",
                remedy="a judge gives one verdict for each completion, in order; None where it cannot tell.",
            )
        for place, verdict in zip(new, made, strict=True):
            self._judged[pairs[place]] = verdict
        return [
            replace(self._judged[pair], example=completion.example, sample=completion.sample)
            for pair, completion in zip(pairs, given, strict=True)
        ]

    def _values(self, job: Job, completions: Sequence[Completion], verdicts: Sequence[Verdict]) -> dict[str, Values]:
        if job.benchmark.kind == "safety":
            return safety_values(verdicts, self.judge)
        if job.benchmark.kind == "over_refusal":
            return over_refusal_values(verdicts)
        scorer = job.benchmark.scorer
        assert scorer is not None

        def make() -> Iterator[Value]:
            samples: dict[str, list[str]] = {example.id: [] for example in job.examples}
            for completion in completions:
                samples[completion.example].append(completion.text)
            table = scorer(job.examples, list(samples.values()), lambda _: None)
            for metric, values in table.items():
                for example, value in zip(job.examples, values, strict=True):
                    yield Value(example.id, metric, value)

        key = key_of(self._key(job), scorer.identity)
        return _by_metric(self.run.unit("values", key, Value, make, job.ids))

    def _check_unscored(self, outcome: Outcome) -> None:
        """That few enough of a benchmark's answers stayed unscored."""
        is_judged = outcome.benchmark.is_judged
        for metric, values in outcome.values.items():
            unscored, of = sum(value is None for value in values.values()), len(values)
            if is_judged and len(outcome.verdicts) > of:  # several samples of a prompt: each of them counts
                of = len(outcome.verdicts)
                unscored = sum(v.refusal is None if metric in REFUSALS else v.harmful is None for v in outcome.verdicts)
            if unscored > self.max_unscored * of:
                who = f"the judge {self.judge.name}" if is_judged else f"the metric {metric}"
                raise RunError(
                    f"{who} could tell nothing of {unscored} of {of} answers of {outcome.member.name} on "
                    f"{outcome.benchmark.name} ({metric}), more than the {self.max_unscored:.0%} allowed: its rates "
                    "would mean little",
                    remedy=f"look at the verdicts and values in {self.run.units}, take another judge, or raise "
                    "evaluate.max_unscored.",
                )


def evaluator_of(
    run: RunDirectory,
    engine: Generator,
    judges: tuple[Judge, Judge | None],
    settings: EvaluateSettings,
    execution: ExecutionSettings,
    *,
    permissions: Permissions,
    spent: Spent | None = None,
) -> Evaluator:
    """What measures as the settings say, with the answers of earlier runs if they are wanted."""
    return Evaluator(
        run,
        engine,
        judges[0],
        settings.sampling,
        settings.max_unscored,
        second=judges[1],
        cache=CompletionCache(cache_directory()) if settings.cache else None,
        max_new_tokens=settings.max_new_tokens,
        elsewhere=elsewhere(execution, settings.engine, permissions),
        spent=spent,
    )


def elsewhere(settings: ExecutionSettings, engine: EngineSettings, permissions: Permissions) -> Elsewhere | None:
    """Where answers are made; nothing for this process."""
    return None if settings.executor == "in-process" else Elsewhere(settings, engine, permissions)


def _part(job: Job, request: Request, num_tokens: int) -> Part:
    """What a request asks for, to estimate its time from; `num_tokens` are those of its prompts."""
    samples = request.sampling.num_samples
    return Part(
        job.benchmark.name, len(request.examples) * samples, num_tokens * samples, request.sampling.max_new_tokens
    )


def _pair(judge: Judge, example: Example, completion: Completion) -> tuple[str, str, str]:
    asked = key_of([[m.role, m.content] for m in example.messages], dict(example.facts))
    return judge.identity, asked, completion.text


def _by_metric(records: Sequence[Value]) -> dict[str, Values]:
    values: dict[str, Values] = {}
    for record in records:
        values.setdefault(record.metric, {})[record.example] = record.value
    return values
