"""Searches and rules on the demonstration: what cannot go together, and rules that choose from the same answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import demonstration

Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("search.name=race", "choice.rule=target", "choice.target=0.1"), "does not work with rule 'target'"),
        (("choice.rule=target",), "needs 'target'"),
        (("search.name=guess",), "search.name"),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: tuple[str, ...], words: str, run_cli: Cli, tmp_path: Path
) -> None:
    """Before anything is tuned or written."""
    given = [part for option in options for part in ("--set", option)]
    code, _, errors = run_cli("demo", "--out", tmp_path / "run", *given)
    assert code == 2
    assert words in errors
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory, tuned_demo: Callable[[int], Path]) -> Path:
    """The demonstration with few prompts, and with them few λs."""
    place = tmp_path_factory.mktemp("small") / "run"
    demonstration(place, [tuned_demo(42)], *SMALL)
    return place


SMALL = ("evaluate.limit=24", "merge.0.lam=[0.2, 0.4, 0.6]")


@pytest.mark.parametrize("rule", ["paper", "weighted", "pareto"])
def test_other_rules_choose_from_the_same_answers(
    rule: str, small_run: Path, tuned_demo: Callable[[int], Path], tmp_path: Path
) -> None:
    """Each says by what it chose; what it chose is confirmed, or not, like any other."""
    place = tmp_path / "run"
    shutil.copytree(small_run, place)
    demonstration(place, [tuned_demo(42)], *SMALL, f"choice.rule={rule}")
    results = json.loads((place / "results.json").read_text(encoding="utf-8"))
    assert results["choice"]["rule"] == rule
    assert results["choice"]["point"] is not None
    assert results["confirmation"]["verdict"] in ("restored", "not shown", "worse")
