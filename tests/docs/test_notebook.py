"""The notebook of the quickstart runs from its first cell to its last, and shows what it promises."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from backmerge.results import EvaluateResults, RestoreResults

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"


def cells() -> list[str]:
    """The source of each code cell, in order."""
    document = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert document["nbformat"] == 4
    return ["".join(cell["source"]) for cell in document["cells"] if cell["cell_type"] == "code"]


def executed(source: str, names: dict[str, Any]) -> Any:
    """Run a cell as a notebook does: the value of a last line that is an expression is shown."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(NOTEBOOK), "exec"), names)  # noqa: S102 - our own file
    if last is None:
        return None
    assert isinstance(last, ast.Expr)
    return eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)  # noqa: S307 - our own file


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, in a clean folder: the tuned model is harmful, the merged one is not, and all of it can be shown."""
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = [executed(source, names) for source in cells()]
    figures = [value for value in shown if type(value).__name__ == "Figure"]
    assert len(figures) == 2
    assert all(figure.axes for figure in figures)
    results, mine = names["results"], names["mine"]
    assert isinstance(results, RestoreResults)
    asr = {row.point: row.mean for row in results.summary if (row.metric, row.split) == ("asr", "confirmation")}
    assert asr[str(results.choice.point)] < 0.1 < asr["tuned"]
    assert results.confirmation.verdict == "restored"  # the first run that a reader sees comes to a decision
    assert all((tmp_path / "restored" / model.directory / "README.md").is_file() for model in results.merged)
    assert isinstance(mine, EvaluateResults)
    assert "<table>" in mine._repr_html_()


def test_the_notebook_is_stored_without_outputs() -> None:
    """Outputs would differ from machine to machine, and say nothing that the run does not."""
    document = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in document["cells"])
