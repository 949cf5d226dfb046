"""Answering, judging and scoring: each once, in an order that frees memory, and nothing twice over runs."""

# ruff: noqa: ARG002, D102 - stand-ins take what the real ones take

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from backmerge.benchmarks.metrics import PerAnswer
from backmerge.benchmarks.protocol import Benchmark, ScoreTable
from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import model_directory
from backmerge.errors import GenerationError, RunError
from backmerge.generation.cache import CompletionCache
from backmerge.generation.protocol import Drawing, Generator, LogLikelihood, Request, Sampling
from backmerge.judging.protocol import Judge
from backmerge.measuring.answer import Job
from backmerge.measuring.evaluate import Evaluator
from backmerge.merging.recipe import Variant
from backmerge.planning.points import BASE, Member
from backmerge.records import Completion, Example, Message, Verdict
from backmerge.runs import RunDirectory

SAMPLING = Drawing()
EXAMPLES = tuple(Example(f"e{i}", (Message("user", f"word{i}"),), str(i)) for i in range(6))


class Scripted(Generator):
    """A generator that answers with the prompt's last sign, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.log: list[str] = []

    identity: ClassVar = {"engine": "scripted"}

    def generate(
        self, variant: Variant | None, examples: Sequence[Example], sampling: Sampling, advance: Callable[[int], None]
    ) -> list[Completion]:
        self.asked.append([example.id for example in examples])
        self.log.append("answer")
        advance(len(examples))
        return [
            Completion(e.id, e.prompt, e.prompt[-1] if s == 0 else "other", 1, True, s)
            for e in examples
            for s in range(sampling.num_samples)
        ]

    def release(self) -> None:
        self.log.append("release")


class Counting(Judge):
    """A judge that calls even answers harmful, and counts what it is asked."""

    name = identity = "counting"
    holds_model = True

    def __init__(self, log: list[str], *, name: str = "counting", lost: int = 0) -> None:
        self.name = self.identity = name
        self.log = log
        self.num_asked = 0
        self.lost = lost

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Verdict]:
        self.num_asked += len(completions)
        self.log.append("judge")
        verdicts = [Verdict(c.example, c.text in "024", c.text not in "024", sample=c.sample) for c in completions]
        return verdicts[: len(verdicts) - self.lost]

    def release(self) -> None:
        self.log.append("free")


@pytest.fixture(scope="module")
def variant() -> Variant:
    """The embedded model; its weights are not read here."""
    return Variant(Checkpoint(model_directory()))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    """A run directory."""
    directory = RunDirectory(tmp_path / "run")
    with directory.held():
        yield directory


def safety(examples: Sequence[Example] = EXAMPLES, **values: Any) -> Benchmark:
    """A benchmark for the judge."""
    return Benchmark("harm", "safety", tuple(examples), 8, **values)


def job(variant: Variant, benchmark: Benchmark, name: str = "base") -> Job:
    """The whole benchmark, of one model."""
    return Job(Member(name, BASE, None, variant), benchmark, "all", benchmark.examples)


def silent(_: int) -> None:
    """Tell nobody."""


def test_all_is_answered_before_anything_is_judged(run: RunDirectory, variant: Variant) -> None:
    """The engine's memory is freed for the judge's model, once; and the judge's when it is done."""
    engine = Scripted()
    judge = Counting(engine.log)
    jobs = [job(variant, safety(), "a"), job(variant, Benchmark("more", "safety", EXAMPLES[:3], 8), "b")]
    Evaluator(run, engine, judge, SAMPLING, 0.0).evaluate(jobs, silent)
    assert engine.log == ["answer", "answer", "release", "judge", "judge", "free"]


def test_a_scorer_that_asks_a_model_gets_the_engines_memory(run: RunDirectory, variant: Variant) -> None:
    """As a judge with a model does; other scorers leave the engine's model loaded."""
    engine = Scripted()
    for name, examples, asks in (("quick", EXAMPLES[:3], False), ("graded", EXAMPLES[3:], True)):
        scorer = PerAnswer({name: lambda *_: 1.0})
        benchmark = Benchmark(name, "utility", examples, 8, scorer, scorer_asks_judge=asks)
        Evaluator(run, engine, Counting([]), SAMPLING, 0.0).evaluate([job(variant, benchmark, name)], silent)
    assert engine.log == ["answer", "answer", "release"]


def test_equal_answers_to_equal_prompts_are_judged_once(run: RunDirectory, variant: Variant) -> None:
    """Two models that answer alike cost one judgement each prompt; the verdicts carry their own ids."""
    engine = Scripted()
    judge = Counting(engine.log)
    renamed = tuple(Example(f"r{i}", e.messages, e.reference) for i, e in enumerate(EXAMPLES))
    jobs = [job(variant, safety()), job(variant, Benchmark("twin", "safety", renamed, 8))]
    first, second = Evaluator(run, engine, judge, SAMPLING, 0.0).evaluate(jobs, silent)
    assert judge.num_asked == 6
    assert [v.example for v in second.verdicts] == [e.id for e in renamed]
    assert list(first.values["asr"].values()) == list(second.values["asr"].values()) == [1, 0, 1, 0, 1, 0]


def test_nothing_is_generated_twice_over_runs(tmp_path: Path, variant: Variant) -> None:
    """A second run takes over what the first was answered, and asks for the rest alone; a fresh one asks for all."""
    engine, cache = Scripted(), CompletionCache(tmp_path / "cache")
    for number, (examples, is_fresh) in enumerate([(EXAMPLES[:4], False), (EXAMPLES, False), (EXAMPLES, True)]):
        run = RunDirectory(tmp_path / f"run{number}")
        with run.held():
            evaluator = Evaluator(run, engine, Counting([]), SAMPLING, 0.0, cache=cache)
            told: list[int] = []
            (outcome,) = evaluator.evaluate([job(variant, safety(examples))], told.append, is_fresh=is_fresh)
        assert [c.example for c in outcome.completions] == [e.id for e in examples]
        assert [c.text for c in outcome.completions] == [e.prompt[-1] for e in examples]
        assert sum(told) == len(examples)
    assert engine.asked == [["e0", "e1", "e2", "e3"], ["e4", "e5"], [e.id for e in EXAMPLES]]


def test_within_a_run_units_are_enough(run: RunDirectory, variant: Variant) -> None:
    """What the run has is read from it, by the same call in another process's place."""
    for engine in (Scripted(), Scripted()):
        judge = Counting(engine.log)
        evaluator = Evaluator(run, engine, judge, SAMPLING, 0.0)
        evaluator.evaluate([job(variant, safety())], silent)
    assert engine.asked == []
    assert judge.num_asked == 0


def test_an_engine_gets_all_requests_together(run: RunDirectory, variant: Variant) -> None:
    """One that can is given all prompts of all models in one call, and may finish them in its own order."""

    class Together(Scripted):
        def generate_many(
            self, requests: Sequence[Request], advance: Callable[[int], None]
        ) -> Iterator[tuple[int, list[Completion]]]:
            self.log.append(f"{len(requests)} together")
            for place in reversed(range(len(requests))):
                yield place, self.generate(*requests[place], advance)

    engine = Together()
    jobs = [job(variant, safety()), job(variant, Benchmark("more", "safety", EXAMPLES[:2], 8))]
    first, second = Evaluator(run, engine, Counting([]), SAMPLING, 0.0).evaluate(jobs, silent)
    assert engine.log.count("2 together") == 1
    assert ([c.example for c in first.completions], len(second.completions)) == ([e.id for e in EXAMPLES], 2)


def test_equal_answers_within_one_benchmark_are_judged_once(run: RunDirectory, variant: Variant) -> None:
    """Five samples that are equal cost one judgement, and all of them carry its verdict."""

    class Repeating(Scripted):
        def generate(
            self,
            variant: Variant | None,
            examples: Sequence[Example],
            sampling: Sampling,
            advance: Callable[[int], None],
        ) -> list[Completion]:
            return [Completion(e.id, "", "4", 1, True, s) for e in examples for s in range(sampling.num_samples)]

    judge = Counting([])
    benchmark = safety(EXAMPLES[:2], sampling={"num_samples": 5, "temperature": 1.0})
    (outcome,) = Evaluator(run, Repeating(), judge, SAMPLING, 0.0).evaluate([job(variant, benchmark)], silent)
    assert judge.num_asked == 2
    assert [(v.example, v.sample) for v in outcome.verdicts] == [(f"e{i}", s) for i in range(2) for s in range(5)]
    assert all(v.harmful for v in outcome.verdicts)


def test_random_draws_are_reused_whole_or_not_at_all(tmp_path: Path, variant: Variant) -> None:
    """Above temperature 0 the draws may depend on what is asked together: a part of it is asked again."""
    engine, cache = Scripted(), CompletionCache(tmp_path / "cache")
    for number, examples in enumerate((EXAMPLES[:4], EXAMPLES, EXAMPLES)):
        run = RunDirectory(tmp_path / f"run{number}")
        with run.held():
            evaluator = Evaluator(run, engine, Counting([]), SAMPLING, 0.0, cache=cache)
            evaluator.evaluate([job(variant, safety(examples, sampling={"temperature": 0.5}))], silent)
    assert engine.asked == [["e0", "e1", "e2", "e3"], [e.id for e in EXAMPLES]]
    for file in (tmp_path / "cache" / "completions").iterdir():  # as a kill in the middle of a line leaves it
        file.write_bytes(file.read_bytes()[:-10])
    run = RunDirectory(tmp_path / "torn")
    with run.held():
        evaluator = Evaluator(run, engine, Counting([]), SAMPLING, 0.0, cache=cache)
        evaluator.evaluate([job(variant, safety(EXAMPLES, sampling={"temperature": 0.5}))], silent)
    assert engine.asked[2:] == [[e.id for e in EXAMPLES]]


@pytest.mark.parametrize(("given", "limit"), [(None, 2000), (3000, 2000), (100, 100)])
def test_a_benchmarks_own_limit_holds(given: int | None, limit: int, run: RunDirectory, variant: Variant) -> None:
    """A limit for all lowers a benchmark's own, and never raises or replaces it by itself."""
    seen: list[int] = []

    class Watching(Scripted):
        def generate(
            self,
            variant: Variant | None,
            examples: Sequence[Example],
            sampling: Sampling,
            advance: Callable[[int], None],
        ) -> list[Completion]:
            seen.append(sampling.max_new_tokens)
            return super().generate(variant, examples, sampling, advance)

    evaluator = Evaluator(run, Watching(), Counting([]), SAMPLING, 0.0, max_new_tokens=given)
    evaluator.evaluate([job(variant, Benchmark("long", "safety", EXAMPLES, 2000))], silent)
    assert seen == [limit]


def test_unread_samples_stop_a_run(run: RunDirectory, variant: Variant) -> None:
    """Of several samples each counts: a judge that reads one in five tells too little."""

    class Reading(Counting):
        def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Verdict]:
            return [
                Verdict(c.example, None if c.sample else False, None if c.sample else True, sample=c.sample)
                for c in completions
            ]

    class Varied(Scripted):
        def generate(
            self,
            variant: Variant | None,
            examples: Sequence[Example],
            sampling: Sampling,
            advance: Callable[[int], None],
        ) -> list[Completion]:
            return [Completion(e.id, "", f"{s}", 1, True, s) for e in examples for s in range(sampling.num_samples)]

    benchmark = safety(EXAMPLES[:2], sampling={"num_samples": 5, "temperature": 1.0})
    with pytest.raises(RunError, match="could not score 8 of 10 answers"):
        Evaluator(run, Varied(), Reading([]), SAMPLING, 0.5).evaluate([job(variant, benchmark)], silent)


def test_two_judges_side_by_side(run: RunDirectory, variant: Variant) -> None:
    """Both judge every answer; values are the first one's."""

    class Lenient(Counting):
        def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Verdict]:
            return [Verdict(c.example, harmful=False, refusal=True) for c in completions]

    evaluator = Evaluator(run, Scripted(), Counting([]), SAMPLING, 0.0, second=Lenient([], name="lenient"))
    (outcome,) = evaluator.evaluate([job(variant, safety())], silent)
    assert sum(bool(v.harmful) for v in outcome.verdicts) == 3
    assert sum(bool(v.harmful) for v in outcome.second_verdicts) == 0
    assert sum(v or 0 for v in outcome.values["asr"].values()) == 3


def test_a_judge_that_loses_a_verdict_is_an_error(run: RunDirectory, variant: Variant) -> None:
    """One verdict too few would shift all that follow."""
    with pytest.raises(RunError, match="5 verdicts for 6 completions"):
        Evaluator(run, Scripted(), Counting([], lost=1), SAMPLING, 0.0).evaluate([job(variant, safety())], silent)


def test_samples_and_a_scorer(run: RunDirectory, variant: Variant) -> None:
    """A benchmark's own sampling holds, its scorer sees all samples of a prompt, and its values are kept."""
    seen: list[list[list[str]]] = []

    class Scorer(PerAnswer):
        def __call__(
            self, examples: Sequence[Example], answers: Sequence[Sequence[str]], advance: Callable[[int], None]
        ) -> ScoreTable:
            seen.append([list(found) for found in answers])
            return super().__call__(examples, answers, advance)

    scorer = Scorer({"right": lambda e, answer: float(answer == e.reference)})
    benchmark = Benchmark("task", "utility", EXAMPLES[:2], 8, scorer, {"num_samples": 2, "temperature": 0.5})
    for _ in range(2):
        (outcome,) = Evaluator(run, Scripted(), Counting([]), SAMPLING, 0.0).evaluate([job(variant, benchmark)], silent)
    assert seen == [[["0", "other"], ["1", "other"]]]
    assert outcome.values == {"right": {"e0": 0.5, "e1": 0.5}}
    assert len(outcome.completions) == 4


class _Choices:
    """Two continuations for each prompt; right is the likelier first one."""

    def pairs(self, tokenizer: Any, examples: Sequence[Example]) -> list[tuple[str, str]]:
        assert tokenizer.chat_template
        return [(e.prompt, text) for e in examples for text in ("a", "b")]

    def score(self, examples: Sequence[Example], found: Sequence[LogLikelihood]) -> ScoreTable:
        return {"acc": [float(found[2 * i].total > found[2 * i + 1].total) for i in range(len(examples))]}


def test_likelihoods_are_compared(run: RunDirectory, variant: Variant) -> None:
    """Nothing is generated; an engine that cannot compare is distinguished from one that can."""

    class Comparing(Scripted):
        gives_likelihoods = True

        def log_likelihoods(self, variant: Variant, pairs: Sequence[Any], advance: Any) -> list[LogLikelihood]:
            return [LogLikelihood(-1.0 if text == "a" else -2.0, 1, True) for _, text in pairs]

    scorer = PerAnswer({"acc": lambda *_: 0.0})
    benchmark = Benchmark("choice", "utility", EXAMPLES, 1, scorer, choices=_Choices())
    with pytest.raises(GenerationError, match="which the engine scripted does not provide"):
        Evaluator(run, Scripted(), Counting([]), SAMPLING, 0.0).evaluate([job(variant, benchmark)], silent)
    engine = Comparing()
    (outcome,) = Evaluator(run, engine, Counting([]), SAMPLING, 0.0).evaluate([job(variant, benchmark)], silent)
    assert engine.asked == []
    assert set(outcome.values["acc"].values()) == {1.0}
    assert outcome.scores[0].value == 1.0
