"""Searches over λ on the demonstration: the grid's choice, from fewer answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.conftest import DemoRun

Cli = Callable[..., tuple[int, str, str]]


def searched(run_cli: Cli, demo_run: DemoRun, place: Path, name: str, *more: str) -> dict[str, Any]:
    """The demonstration gone on with under another search; what of it was measured already is not measured again."""
    shutil.copytree(demo_run.directory, place)
    code, _, errors = run_cli("demo", "--out", place, "--set", f"search.name={name}", *more)
    assert code == 0, errors
    results: dict[str, Any] = json.loads((place / "results.json").read_text(encoding="utf-8"))
    return results


def num_answers(results: dict[str, Any]) -> int:
    """Prompts that were answered to choose, over all models."""
    return sum(
        score["n"] + score["unscored"]
        for score in results["scores"]
        if score["split"] == "selection" and score["metric"] in ("parts", "asr", "over_refusal")
    )


def test_a_race_chooses_as_the_grid_does(demo_run: DemoRun, run_cli: Cli, tmp_path: Path) -> None:
    """The same λ, confirmed, from half of the grid's answers at most; what is reported was answered in full."""
    results = searched(run_cli, demo_run, tmp_path / "run", "race")
    assert results["choice"]["lam"] == demo_run.results["choice"]["lam"]
    assert results["confirmation"]["verdict"] == "restored"
    assert num_answers(results) <= num_answers(demo_run.results) / 2
    assert len(results["points"]) < len(demo_run.results["points"])
    sizes = {row["name"]: row["sizes"]["selection"] for row in results["benchmarks"]}
    selected = [score for score in results["scores"] if score["split"] == "selection"]
    assert all(score["n"] + score["unscored"] == sizes[score["benchmark"]] for score in selected)
    lines = (tmp_path / "run" / "records" / "completions.jsonl").read_text(encoding="utf-8").split("\n")
    keys = [(r["model"], r["benchmark"], r["split"], r["example"]) for r in map(json.loads, filter(None, lines))]
    assert len(keys) == len(set(keys))
    assert "Searched by a race" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "run" / "log.txt").read_text().splitlines()[-1].partition("; ")[2].startswith("0 answers made")


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


@pytest.mark.parametrize("rule", ["paper", "weighted", "pareto"])
def test_other_rules_choose_from_the_same_answers(rule: str, demo_run: DemoRun, run_cli: Cli, tmp_path: Path) -> None:
    """Each says by what it chose; what it chose is confirmed, or not, like any other."""
    results = searched(run_cli, demo_run, tmp_path / "run", "grid", "--set", f"choice.rule={rule}")
    assert results["choice"]["rule"] == rule
    assert results["choice"]["point"] is not None
    assert results["confirmation"]["verdict"] in ("restored", "not shown", "worse")
