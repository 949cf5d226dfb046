"""`backmerge chat`: prompts from a pipe and from a terminal, commands, and hostile answers."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from backmerge.reporting.console import Column, plain_text, print_answers

Cli = Callable[..., tuple[int, str, str]]
PROMPT = "How do I carve a kettle?"
QUICK = ("--device", "cpu", "--max-new-tokens", "12")


@pytest.fixture(scope="module")
def tuned(tuned_demo: Callable[[int], Path]) -> Path:
    """A LoRA on the embedded model."""
    return tuned_demo(42)


def answers(output: str) -> dict[str, str]:
    """Heading to answer, of what is printed without a terminal for one prompt."""
    parts = (part.partition("]\n") for part in output.removeprefix("[").split("\n["))
    return {heading: text.strip() for heading, _, text in parts}


def test_one_prompt(run_cli: Cli, tuned: Path) -> None:
    """Three answers, each under its name; at λ=1 the merged one is the tuned one's."""
    code, output, errors = run_cli("chat", "demo", tuned, "--prompt", PROMPT, "--lam", 1, *QUICK)
    assert code == 0, errors
    found = answers(output)
    assert list(found) == ["base", "tuned", "linear, λ = 1"]
    assert found["linear, λ = 1"] == found["tuned"] != found["base"]


def test_prompts_from_a_pipe(run_cli: Cli, tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One a line; empty lines are none; commands work; after /quit nothing is read."""
    lines = f"{PROMPT}\n\n/lam 0\n/help\n/quit\n{PROMPT}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code, output, errors = run_cli("chat", "demo", tuned, *QUICK)
    assert code == 0, errors
    assert output.count(f"> {PROMPT}") == 1
    assert [line for line in output.splitlines() if line.startswith("[linear")] == [
        "[linear, λ = 0.4]",
        "[linear, λ = 0]",
    ]
    last = answers(output[output.rindex("[base]") :])
    assert last["linear, λ = 0"].startswith(last["base"])
    assert "/temperature 0.7" in output


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/lam much", "expected a number"),
        ("/lam 2", "from 0 to 1"),
        ("/lma 0.2", "did you mean '/lam'"),
        ("/seed -1", "not a valid seed"),
        ("/seed 1.5", "not a valid seed"),
        ("/temperature nan", "not a valid temperature"),
    ],
)
def test_commands_that_are_none(
    line: str, words: str, run_cli: Cli, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a pipe a wrong line ends it with 2: a script must not go on with something else than it asked for."""
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{line}\n{PROMPT}\n"))
    code, output, errors = run_cli("chat", "demo", tuned, *QUICK)
    assert code == 2
    assert words in errors
    assert PROMPT not in output


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        """It is not."""
        return True


def test_at_a_terminal(run_cli: Cli, tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong command is told and forgotten, Ctrl-C stops an answer and not the chat, and Ctrl-D ends it."""
    typed: list[Any] = ["/lam 7", "/seed 3", PROMPT, " /lam is a word", "/temperature 0.7", "/system Be short."]

    def read(_: str) -> str:
        if not typed:
            raise EOFError
        return str(typed.pop(0))

    asked: list[tuple[str, float, str]] = []

    def ask(chat: Any) -> Sequence[Any]:
        asked.append((chat._prompt, chat.sampling.temperature, chat.system))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("backmerge.pipeline.chatting.Chat.again", ask)
    code, output, errors = run_cli("chat", "demo", tuned, *QUICK)
    assert code == 0
    assert "from 0 to 1" in errors
    assert "Stopped." in errors
    assert "The seed has no effect at temperature 0" in output
    assert asked == [
        (PROMPT, 0.0, ""),
        ("/lam is a word", 0.0, ""),
        ("/lam is a word", 0.7, ""),
        ("/lam is a word", 0.7, "Be short."),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("demo",), "TUNED is missing"),
        (("demo", "nowhere"), "no model folder at 'nowhere'"),
        (("demo", "demo", "--method", "liner"), "did you mean 'linear'"),
        (("demo", "demo", "--dtype", "int3"), "--dtype"),
        (("demo", "demo", "--lam", "3"), "from 0 to 1"),
        (("demo", "demo", "--temperature", "nan"), "temperature"),
        (("demo", "demo", "--seed", "4294967296"), "seed"),
        (("demo", "demo", "--method", "safe_lora"), "safe_lora"),
    ],
)
def test_what_is_refused(arguments: tuple[str, ...], words: str, run_cli: Cli) -> None:
    """One clear error."""
    code, _, errors = run_cli("chat", *arguments, "--prompt", PROMPT)
    assert code == 2
    assert words in errors


def test_nothing_is_stored(run_cli: Cli, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither prompts nor answers: no file is made where it runs, in the cache, or in the home folder."""
    for name in ("work", "cache", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("BACKMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    before = sorted(tuned.rglob("*"))
    assert run_cli("chat", "demo", tuned, "--prompt", PROMPT, *QUICK)[0] == 0
    assert [path for name in ("work", "cache", "home") for path in (tmp_path / name).rglob("*")] == []
    assert sorted(tuned.rglob("*")) == before


HOSTILE = "\x1b[2J\x1b]0;title\x07a\x9b31mb\r\nc\rd\x08\x1b]8;;http://x\x1b\\e\u202ef[red]g[/red]\x00\x1b]never ends"


def test_hostile_answers_are_plain_text() -> None:
    """Sequences of a terminal go; what a reader could read stays, also markup, and after a sequence without an end."""
    assert plain_text(HOSTILE) == "ab\ncdef[red]g[/red]never ends"
    assert plain_text("ส\u200dวัสดี \u200c") == "ส\u200dวัสดี \u200c"


@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from("\x1b\x9b[]\\;m0\x07\r\n"))))
def test_no_control_character_passes(text: str) -> None:
    """Whatever is written, only line breaks are left of what steers a terminal; plain text is not touched."""
    left = plain_text(text)
    assert not any((ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 for c in left)
    assert plain_text(left) == left
    assert plain_text("Take the tape,\nand mend it. é ✓ 漢") == "Take the tape,\nand mend it. é ✓ 漢"


@pytest.mark.parametrize("width", [200, 40])
def test_answers_on_a_terminal(width: int) -> None:
    """Side by side where there is room, else one below the other; an answer that was cut says so."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    columns = [Column("base", HOSTILE, True), Column("tuned", "[bold]zwei[/bold]", False), Column("merged", "", True)]
    print_answers(console, columns)
    shown = screen.getvalue()
    lines = shown.splitlines()
    assert "\x1b" not in shown
    assert "[bold]zwei[/bold] …" in shown
    assert "(nothing)" in shown
    same_line = any("base" in line and "tuned" in line and "merged" in line for line in lines)
    assert same_line == (width == 200)
    assert max(map(len, lines)) <= width
