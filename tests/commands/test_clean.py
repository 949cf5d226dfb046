"""`backmerge clean`: what it says, and that it asks."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with units and records."""
    place = tmp_path / "run"
    for name in ("experiment.yaml", "results.json", "units/a.jsonl", "records/completions.jsonl"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("base: demo\n" if name == "experiment.yaml" else "x" * 2_000_000)
    return place


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        """It is not."""
        return True


def test_dry_run_prints_and_removes_nothing(run: Path, run_cli: Cli) -> None:
    """Every part with its size and its fate, and what goes with it."""
    code, output, _ = run_cli("clean", run, "--dry-run")
    assert code == 0
    assert "2.0 MB  remove  units" in output
    assert "2.0 MB  keep    records" in output
    assert "the same command generates its answers again" in output
    assert (run / "units" / "a.jsonl").exists()


def test_nobody_to_ask(run: Path, run_cli: Cli) -> None:
    """Without a terminal it needs --yes."""
    code, _, errors = run_cli("clean", run)
    assert code == 2
    assert "--yes" in errors
    assert (run / "units" / "a.jsonl").exists()
    code, output, _ = run_cli("clean", run, "--yes")
    assert code == 0
    assert "Removed 2.0 MB" in output
    assert not (run / "units" / "a.jsonl").exists()
    assert (run / "records" / "completions.jsonl").exists()
    code, output, _ = run_cli("clean", run)
    assert code == 0
    assert "nothing to remove" in output


@pytest.mark.parametrize(("answer", "is_removed"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_a_terminal_is_asked(
    answer: str, is_removed: bool, run: Path, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a yes removes."""
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert run_cli("clean", run)[0] == 0
    assert (run / "units" / "a.jsonl").exists() != is_removed


def test_all_but(run: Path, run_cli: Cli) -> None:
    """A list with spaces is one; a wrong name is refused."""
    code, _, errors = run_cli("clean", run, "--all-but", "merged, repor", "--yes")
    assert code == 2
    assert "did you mean 'report'" in errors
    assert run_cli("clean", run, "--all-but", "merged, report", "--yes")[0] == 0
    assert not (run / "records").exists()
    assert (run / "results.json").exists()


def test_the_cache(run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told, and removed when agreed."""
    monkeypatch.setenv("BACKMERGE_CACHE", str(tmp_path))
    assert "No answers are cached" in run_cli("clean", "--cache")[1]
    file = tmp_path / "completions" / ("0" * 32 + ".jsonl")
    file.parent.mkdir()
    file.write_text("x" * 3_000_000)
    assert run_cli("clean", "--cache")[0] == 2
    code, output, _ = run_cli("clean", "--cache", "--dry-run")
    assert (code, file.exists()) == (0, True)
    assert "3.0 MB of cached answers" in output
    assert run_cli("clean", "--cache", "--yes")[0] == 0
    assert not file.exists()


@pytest.mark.parametrize(("arguments", "words"), [((), "which run?"), (("x", "--cache"), "not for a single run")])
def test_what_is_refused(arguments: tuple[str, ...], words: str, run_cli: Cli) -> None:
    """A run, or the cache."""
    code, _, errors = run_cli("clean", *arguments)
    assert code == 2
    assert words in errors
