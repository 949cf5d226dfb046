"""Completion in the shell: the scripts, and what they are reported, without anything heavy being imported."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from backmerge import registry
from backmerge.cli import app
from backmerge.commands.completion import COMPLETED, matching

# as the installed command: completion goes by the program's name
AS_COMMAND = "import sys; sys.argv[0] = 'backmerge'; from backmerge.cli import main; main()"


def told(shell: str, typed: str) -> list[str]:
    """What the command answers to a shell that asks how a line may go on."""
    words = typed.split(" ")
    asked = {
        "bash": {"COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": typed},
    }[shell]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", AS_COMMAND],
        env={**os.environ, **asked, "_BACKMERGE_COMPLETE": f"complete_{shell}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "transformers"}
    return done.stdout.split("\n")


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("backmerge restore a b --judge wi", ["wildguard"]),
        ("backmerge restore a b --method linear,sl", ["linear,slerp"]),
        ("backmerge restore a b --rule p", ["paper", "pareto"]),
        ("backmerge restore a b --search r", ["race"]),
        ("backmerge evaluate m --engine ", ["openai", "transformers", "vllm"]),
        ("backmerge evaluate m --safety adv", ["advbench"]),
        ("backmerge evaluate m --executor ", ["in-process", "pool", "ray"]),
        ("backmerge finetune m --task me", ["medical"]),
        ("backmerge check m --second-judge r", ["refusal-phrases", "rubric"]),
        ("backmerge list j", ["judges"]),
        ("backmerge clea", ["clean"]),
    ],
)
def test_bash_gets_names(typed: str, names: list[str]) -> None:
    """Of the tables, by what is typed."""
    assert told("bash", typed) == [*names, ""]


def test_zsh_gets_names() -> None:
    """In its own form."""
    (first, *_) = told("zsh", "backmerge restore a b --judge wi")
    assert '"wildguard"' in first


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_scripts_are_installed(shell: str, tmp_path: Path) -> None:
    """`--install-completion` leaves a script that the shell's own file reads; bash finds it sound."""
    done = subprocess.run(
        [sys.executable, "-c", AS_COMMAND, "--install-completion", shell],
        env={**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    place = {"bash": tmp_path / ".bash_completions" / "backmerge.sh", "zsh": tmp_path / ".zfunc" / "_backmerge"}[shell]
    assert "_BACKMERGE_COMPLETE=complete_" in place.read_text()
    assert (tmp_path / f".{shell}rc").exists()
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(place)], check=True, timeout=60)


def test_names_are_those_of_the_tables() -> None:
    """Every entry is offered, and a comma continues only where several are taken."""
    for parameter, table in {"method": registry.METHODS, "judge": registry.JUDGES, "engine": registry.ENGINES}.items():
        assert set(matching(parameter, "")) == table.entries.keys()
    assert matching("judge", "wildguard,") == []
    assert matching("method", "slerp,ti") == ["slerp,ties"]
    assert all(names() for names in COMPLETED.values())


def test_what_is_completed_is_an_option_somewhere() -> None:
    """A name that no command takes any longer is no use."""
    taken = {
        name
        for info in app.registered_commands
        if info.callback
        for name in inspect.signature(info.callback).parameters
    }
    assert COMPLETED.keys() <= taken
