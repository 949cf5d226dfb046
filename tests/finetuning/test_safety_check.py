"""The trainers' callback: what it runs and when, and that a training survives a check that fails."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from backmerge.errors import ConfigError
from backmerge.finetuning.safety_check import Checked, SafetyCheck

ROWS = [{"input_ids": torch.arange(6), "labels": torch.arange(6)} for _ in range(4)]


class Commands(list[list[str]]):
    """In place of backmerge's own process: records each command, and leaves the results of a check."""

    def __init__(self, *verdicts: str, code: int = 0) -> None:
        super().__init__()
        self.verdicts = list(verdicts)
        self.code = code

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        """Run one."""
        words = command[3:]
        self.append(words)
        if self.code == 0 and words[0] == "check":
            out = Path(words[words.index("--out") + 1])
            out.mkdir(parents=True)
            (out / "results.json").write_text(json.dumps({"check": {"verdict": self.verdicts.pop(0)}}))
        return subprocess.CompletedProcess(command, self.code)


@pytest.fixture
def train(make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`train(commands, callback, **arguments)`: train a tiny model for up to four steps; how many were made."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    def run(commands: Commands, callback: SafetyCheck, **arguments: Any) -> int:
        monkeypatch.setattr(subprocess, "run", commands)
        model = AutoModelForCausalLM.from_pretrained(make_model("llama"), dtype=torch.float32)
        settings = TrainingArguments(
            tmp_path / "out", max_steps=4, per_device_train_batch_size=1, use_cpu=True, report_to=[], disable_tqdm=True,
            **{"save_strategy": "no", **arguments},
        )  # fmt: skip
        trainer = Trainer(model, settings, train_dataset=ROWS, callbacks=[callback])
        trainer.train()
        return int(trainer.state.global_step)

    return run


def test_the_final_model_is_checked_against_its_base(train: Callable[..., int], tmp_path: Path) -> None:
    """One that the Trainer did not save is saved for it; restore follows, if asked."""
    commands = Commands("worse")
    callback = SafetyCheck(
        "owner/base", safety=["advbench"], utility=["mine.jsonl"], limit=9, restore=True, options=("--device", "cpu")
    )
    assert train(commands, callback) == 4
    place = tmp_path / "out" / "backmerge"
    measured = ["--safety", "advbench", "--judge", "refusal-phrases", "--margin", "0.03", "--limit", "9"]
    measured += ["--device", "cpu"]
    model, utility = str(place / "model"), ["--utility", "mine.jsonl"]
    assert commands == [
        ["check", model, "--against", "owner/base", *utility, "--out", str(place / "step-4"), *measured],
        ["restore", "owner/base", model, *utility, "--out", str(place / "restored"), *measured],
    ]
    assert (place / "model" / "model.safetensors").is_file()
    assert callback.checked == [Checked(4, place / "step-4", "worse")]


def test_training_stops_at_a_checkpoint_that_is_worse(train: Callable[..., int], tmp_path: Path) -> None:
    """The Trainer's own checkpoints are checked, each once; one that is only not shown continues."""
    commands = Commands("not shown", "worse")
    callback = SafetyCheck("b", safety=["advbench"], each_checkpoint=True, stop_if_worse=True, out=tmp_path / "checks")
    assert train(commands, callback, save_strategy="steps", save_steps=1) == 2
    assert [words[1] for words in commands] == [str(tmp_path / "out" / f"checkpoint-{step}") for step in (1, 2)]
    assert [found.verdict for found in callback.checked] == ["not shown", "worse"]


def test_a_check_that_fails_does_not_end_the_training(
    train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said, and there is no verdict."""
    callback = SafetyCheck("b", safety=["advbench"], each_checkpoint=True)
    assert train(Commands(code=2), callback, save_strategy="steps", save_steps=2) == 4
    assert [found.verdict for found in callback.checked] == [None, None]
    assert "backmerge check failed (exit code 2)" in capsys.readouterr().err


def test_settings_that_would_do_nothing_are_refused() -> None:
    """Before the training begins."""
    with pytest.raises(ConfigError, match="utility"):
        SafetyCheck("b", safety=["advbench"], restore=True)
    with pytest.raises(ConfigError, match="each_checkpoint"):
        SafetyCheck("b", safety=["advbench"], stop_if_worse=True)
    with pytest.raises(ConfigError, match="options has --judge") as caught:
        SafetyCheck("b", safety=["advbench"], options=("--judge", "wildguard"))
    assert caught.value.remedy == "use its argument: judge."
