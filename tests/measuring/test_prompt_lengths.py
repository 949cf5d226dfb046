"""A prompt beyond a model's context is found before anything is generated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from backmerge.benchmarks.protocol import Benchmark
from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import model_directory
from backmerge.errors import GenerationError
from backmerge.generation.chat import load_tokenizer, prompt_lengths
from backmerge.generation.protocol import Drawing, EngineSettings, Sampling
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.measuring.answer import Job, context_of
from backmerge.measuring.evaluate import Evaluator
from backmerge.merging.recipe import Variant
from backmerge.planning.points import BASE, Member
from backmerge.records import Completion, Example, Message
from backmerge.runs import RunDirectory

from .test_evaluate import Counting, Scripted

CONTEXT = 40


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, whose context is said to be short."""
    directory = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(model_directory(), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return directory


def example(name: str, num_words: int) -> Example:
    """A prompt of so many words."""
    return Example(name, (Message("user", " ".join(["kite"] * num_words)),))


class Real(TransformersEngine):
    """The engine, which counts what it is asked."""

    def __init__(self) -> None:
        super().__init__(EngineSettings(device="cpu", dtype="float32"))
        self.num_asked = 0

    def generate(
        self, variant: Variant, examples: Sequence[Example], sampling: Sampling, advance: Callable[[int], None]
    ) -> list[Completion]:
        """As the engine."""
        self.num_asked += len(examples)
        return super().generate(variant, examples, sampling, advance)


def evaluate(run: RunDirectory, directory: Path, engine: Any, *benchmarks: Benchmark) -> None:
    """Measure a model on these, in this order."""
    member = Member("base", BASE, None, Variant(Checkpoint(directory)))
    jobs = [Job(member, benchmark, "all", benchmark.examples) for benchmark in benchmarks]
    Evaluator(run, engine, Counting([]), Drawing(), 1.0).evaluate(jobs, lambda *_: None)


def test_a_long_prompt_stops_all_before_the_first(short: Path, tmp_path: Path) -> None:
    """The prompt, the benchmark and the remedy are named, and the benchmark before it was not begun."""
    fine = Benchmark("fine", "safety", (example("a", 2),), 4)
    long = Benchmark("long", "safety", (example("b", 2), example("c", 90), example("d", 90)), 4)
    run, engine = RunDirectory(tmp_path / "run"), Real()
    with run.held():
        with pytest.raises(GenerationError, match=r"prompt 'c' of long .* context is 40, and 1 more") as found:
            evaluate(run, short, engine, fine, long)
        assert "evaluate.safety" in str(found.value)
        assert found.value.example == "c"
        assert engine.num_asked == 0
        assert list(run.units.iterdir()) == []
        evaluate(run, short, engine, fine)
        assert engine.num_asked == 1


def test_the_last_prompt_that_fits(short: Path, tmp_path: Path) -> None:
    """One token of room is enough, here as in the engine; no room is none in both."""
    tokenizer = load_tokenizer(short)
    exact = next(
        e for e in (example("x", n) for n in range(CONTEXT)) if prompt_lengths(tokenizer, [e]) == [CONTEXT - 1]
    )
    over = next(e for e in (example("y", n) for n in range(CONTEXT)) if prompt_lengths(tokenizer, [e]) == [CONTEXT])
    engine, run = Real(), RunDirectory(tmp_path / "run")
    with run.held():
        evaluate(run, short, engine, Benchmark("fits", "safety", (exact,), 1))
        with pytest.raises(GenerationError, match="nothing was generated"):
            evaluate(run, short, engine, Benchmark("over", "safety", (over,), 1))
    with pytest.raises(GenerationError, match="context"):
        engine.generate(Variant(Checkpoint(short)), [over], Sampling(max_new_tokens=1), lambda *_: None)


def test_an_engine_of_ones_own_decides_itself(short: Path, tmp_path: Path) -> None:
    """Another engine may cut prompts, or know a longer context: it is not spoken for."""
    run, engine = RunDirectory(tmp_path / "run"), Scripted()
    with run.held():
        evaluate(run, short, engine, Benchmark("long", "safety", (example("c", 90),), 4))
    assert engine.asked == [["c"]]


class _Limited(Scripted):
    """An engine whose cache holds less than the model's context."""

    max_length = 16


def test_the_shorter_of_model_and_engine_holds(short: Path, tmp_path: Path) -> None:
    """An engine may be given less than the model's own; a model with text and images says it of its text."""
    engine, limited = Scripted(), _Limited()
    assert context_of(short, engine) == CONTEXT
    assert context_of(short, limited) == 16
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 7}}))
    assert context_of(tmp_path, limited) == 7
    (tmp_path / "config.json").write_text("{}")
    assert context_of(tmp_path, engine) is None
