"""Answers graded by a chat model: right, wrong, empty, unread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from backmerge.benchmarks import graded
from backmerge.benchmarks.files import from_file
from backmerge.benchmarks.protocol import BenchmarkSettings
from backmerge.demo import model_directory
from backmerge.errors import ConfigError
from backmerge.judging.protocol import JudgeSettings
from backmerge.records import Completion, Example, Message, Verdict

EXAMPLES = [Example(f"e{i}", (Message("user", f"{i} + 1?"),), str(i + 1)) for i in range(4)]


class Exact:
    """In a judge's place: finds wrong what is not the expected answer, and cannot read question marks."""

    identity = "exact"
    released = False

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Verdict]:
        """Wrong is `harmful`, as the rubric says; an empty answer is neither, as of every judge."""
        return [
            Verdict(
                c.example,
                None if "?" in c.text else False if not c.text else c.text != e.prompt.rpartition(": ")[2],
                refusal=False,
            )
            for e, c in zip(examples, completions, strict=True)
        ]

    def release(self) -> None:
        """Say that the memory was freed."""
        Exact.released = True


def test_right_wrong_empty_and_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """1, 0, 0 and unscored; the mean over samples, unscored with the first that is."""
    monkeypatch.setattr(graded, "rubric", Exact)
    scorer = graded.Graded({"model": "x"})
    found = scorer(EXAMPLES, [["1"], ["no"], [""], ["?"]], lambda _: None)
    assert found == {"graded": [1.0, 0.0, 0.0, None]}
    found = scorer(EXAMPLES[:2], [["1", "2"], ["2", "?"]], lambda _: None)
    assert found == {"graded": [0.5, None]}
    assert Exact.released


def test_it_is_a_metric_of_a_file(tmp_path: Path) -> None:
    """Named in the settings with its model, it is asked for by the embedded one; garbage is unscored, never right."""
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "What is 2 + 3?", "answer": "5"}\n')
    options = {"judge": {"model": str(model_directory()), "engine": {"device": "cpu"}}}
    settings = BenchmarkSettings(name=str(file), metrics=("graded",), options=options)
    benchmark = from_file(file, "utility", settings)
    assert benchmark.scorer is not None
    assert benchmark.scorer.metrics == ("graded",)
    assert "rubric" in benchmark.scorer.identity
    assert benchmark.scorer(benchmark.examples, [["five"]], lambda _: None) == {"graded": [None]}


def test_a_judge_without_a_model_is_refused(tmp_path: Path) -> None:
    """The rubric needs a model, and says so before anything is generated."""
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "What is 2 + 3?", "answer": "5"}\n')
    with pytest.raises(ConfigError):
        from_file(file, "utility", BenchmarkSettings(name=str(file), metrics=("graded",)))
