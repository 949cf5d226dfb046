"""Where the examples to tune on come from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from backmerge.demo.tuning import plan_examples
from backmerge.errors import BackmergeError, ConfigError, DataError
from backmerge.finetuning.datasets import load_examples
from backmerge.finetuning.settings import FinetuneSettings, LoraSettings
from backmerge.records import Message
from backmerge.registry import DATASETS


@pytest.mark.parametrize("name", DATASETS.entries)
def test_named_data_sets_have_answers(name: str) -> None:
    """Every data set of the table gives examples with unique ids, ending with the user's turn, each with an answer."""
    examples = load_examples(name)
    assert examples
    assert len({example.id for example in examples}) == len(examples)
    assert all(example.reference and example.messages[-1].role == "user" for example in examples)


def test_the_demos_set_goes_by_its_name() -> None:
    """`demo-plans` is the demonstration's tuning set."""
    assert tuple(load_examples("demo-plans")) == plan_examples()


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "plain"])
def test_files(tmp_path: Path, name: str) -> None:
    """JSON Lines, also without a suffix, and CSV give prompts, answers and system texts."""
    lines = '{"system": "Be brief.", "instruction": "Hi", "output": "Ho"}\n\n{"instruction": "λ?", "output": " 0"}\n'
    rows = 'system,instruction,output\nBe brief.,Hi,Ho\n,λ?," 0"\n'
    path = tmp_path / name
    path.write_text(rows if name.endswith(".csv") else lines, encoding="utf-8")
    first, second = load_examples(str(path))
    assert first.messages == (Message("system", "Be brief."), Message("user", "Hi"))
    assert (first.reference, second.reference) == ("Ho", " 0")
    assert second.messages == (Message("user", "λ?"),)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no rows"),
        ('{"prompt": "Hi"}\n', "line 1: no expected answer"),
        ('{"prompt": "Hi", "answer": "Ho"}\n{"answer": "Ho"}\n', "line 2: no prompt"),
        ('{"prompt": "Hi", "answer": "Ho"}\nnonsense\n', "line 2: not JSON"),
    ],
)
def test_rows_that_cannot_be_learned_are_errors(tmp_path: Path, text: str, reason: str) -> None:
    """The file and the line are named."""
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=reason) as caught:
        load_examples(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("missing.jsonl", DataError, "there is no file"),
        ("no/such/file", DataError, "there is no file"),
        ("demo-plan", ConfigError, "did you mean 'demo-plans'"),
        ("my_code:examples", ConfigError, "--allow-plugins"),
    ],
)
def test_names_that_lead_nowhere_are_errors(name: str, kind: type[BackmergeError], reason: str) -> None:
    """A missing file, a misspelt name and code without leave are told apart."""
    with pytest.raises(kind, match=reason):
        load_examples(name)


def test_a_users_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With leave, `module:function` gives the examples."""
    code = "from backmerge.demo.tuning import plan_examples\n\ndef few():\n    return plan_examples()[:3]\n"
    (tmp_path / "my_examples.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_examples", raising=False)
    assert tuple(load_examples("my_examples:few", allow_plugins=True)) == plan_examples()[:3]
    monkeypatch.delitem(sys.modules, "my_examples")


def test_the_defaults_are_the_papers() -> None:
    """LoRA of rank 8 and alpha 16, learning rate 1e-4, three epochs, the paper's seeds."""
    settings = FinetuneSettings(dataset="x")
    assert settings.lora == LoraSettings(r=8, alpha=16, dropout=0)
    assert (settings.learning_rate, settings.epochs, settings.steps) == (1e-4, 3, None)
    assert (settings.batch_size, settings.warmup, settings.cutoff) == (8, 0.1, 1024)
    assert settings.seeds == (42, 1024, 48763)


@pytest.mark.parametrize(
    "wrong",
    [
        {"seeds": ()},
        {"steps": 0},
        {"epochs": 0},
        {"learning_rate": 0},
        {"warmup": 1},
        {"weight_decay": -1},
        {"cutoff": 0},
        {"lora": {"r": 0}},
        {"lora": {"dropout": 1}},
        {"learning_rte": 1},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    """Values out of range, and names that are none, are refused before anything is loaded."""
    with pytest.raises(ValidationError):
        FinetuneSettings.model_validate({"dataset": "x", **wrong})
