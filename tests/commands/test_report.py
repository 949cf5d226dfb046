"""`backmerge report`: one run, several, and suites."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
import yaml
from tests.reporting.several import experiment_of, results_of, written
from tests.reporting.synthetic import enriched, made_results, made_run

from backmerge.commands.report import report
from backmerge.errors import ConfigError, RunError
from backmerge.reporting.user_folder import ADDED

BEST = {"linear": "linear@0.4", "slerp": "slerp@0.4"}
COMPARED = {
    *(f"compared.{form}" for form in ("html", "csv", "md", "tex")),
    *(f"compared_curves.{form}" for form in ("png", "svg", "pdf")),
}


def reported(*arguments: object) -> None:
    """Carry out `backmerge report ...`."""
    app = typer.Typer()
    app.command()(report)
    app([str(argument) for argument in arguments], standalone_mode=False)


def two_runs(folder: Path) -> tuple[Path, Path]:
    """Runs on two tasks."""
    return (
        written(folder / "medical", results_of(title="m", best=BEST), experiment_of(dataset="medical")),
        written(folder / "code", results_of(title="c", best=BEST), experiment_of(dataset="code")),
    )


def a_suite(folder: Path, table: str | None) -> Path:
    """The same two runs as a suite."""
    two_runs(folder)
    names = [{"name": name, "file": "x.yaml", "set": []} for name in ("medical", "code")]
    text = yaml.safe_dump({"name": "Table 2: two tasks", "scale": None, "table": table, "experiments": names})
    (folder / "suite.yaml").write_text(text)
    return folder


def names_in(folder: Path) -> set[str]:
    """The files of a folder, but for the list of them."""
    return {path.name for path in folder.iterdir()} - {ADDED}


def test_one_run_has_its_report_and_tables_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both are written into the run, and said where."""
    run = made_run(tmp_path / "run", enriched(made_results()))
    reported(run)
    assert (run / "report.html").is_file()
    assert names_in(run / "tables") == {
        f"{name}.{form}" for name in ("models", "points", "methods") for form in ("csv", "md", "tex")
    }
    assert capsys.readouterr().out.split() == [str(run / "report.html"), str(run / "tables")]


def test_several_runs_are_compared_next_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the folder that holds them, as it is told from here; the runs themselves are left as they are."""
    runs = two_runs(tmp_path / "runs")
    before = [names_in(run) for run in runs]
    monkeypatch.chdir(tmp_path)
    reported(*runs)
    assert names_in(tmp_path / "runs" / "comparison") == COMPARED
    assert [names_in(run) for run in runs] == before
    assert capsys.readouterr().out.splitlines()[0] == "runs/comparison/compared.html"


def test_out_is_where_it_goes(tmp_path: Path) -> None:
    """Elsewhere if asked, with a table of the paper if asked."""
    reported(*two_runs(tmp_path), "--out", tmp_path / "x" / "y", "--table", "1")
    assert names_in(tmp_path / "x" / "y") == COMPARED | {f"table1.{form}" for form in ("csv", "md", "tex")}
    assert not (tmp_path / "comparison").exists()


@pytest.mark.parametrize("table", ["table2", "figure3", None])
def test_suite_means_all_its_runs_and_adds_its_table(tmp_path: Path, table: str | None) -> None:
    """As `suite.yaml` says; its name is the table's title."""
    suite = a_suite(tmp_path / "suite", table)
    reported(suite)
    forms = () if table is None else ("csv", "md", "tex") if table.startswith("table") else ("csv", "png", "svg", "pdf")
    assert names_in(suite / "comparison") == COMPARED | {f"{table}.{form}" for form in forms}
    if table == "table2":
        text = (suite / "comparison" / "table2.md").read_text(encoding="utf-8")
        assert text.startswith("Table 2: two tasks. ")
        assert all(f"| {task} |" in text for task in ("medical", "code"))


def test_another_table_of_a_suite_has_its_own_title(tmp_path: Path) -> None:
    """The suite's name is of its own table only."""
    suite = a_suite(tmp_path / "suite", "table2")
    reported(suite, "--table", "1")
    text = (suite / "comparison" / "table1.md").read_text(encoding="utf-8")
    assert text.startswith("Table 1: base, fine-tuned model and merge. ")
    assert not (suite / "comparison" / "table2.md").exists()


def test_a_table_of_one_run_goes_among_its_tables(tmp_path: Path) -> None:
    """Beside the run's own."""
    run, _ = two_runs(tmp_path)
    reported(run, "--table", "figure2")
    assert names_in(run / "tables") == COMPARED | {f"figure2.{form}" for form in ("csv", "png", "svg", "pdf")}


def test_a_suite_whose_run_is_not_finished_is_refused(tmp_path: Path) -> None:
    """With the run's name; nothing is written."""
    suite = a_suite(tmp_path / "suite", "table1")
    (suite / "code" / "results.json").unlink()
    with pytest.raises(RunError, match=r"code is not a finished run: it has no results.json"):
        reported(suite)
    assert not (suite / "comparison").exists()


def test_evaluations_are_refused(tmp_path: Path) -> None:
    """Alone and among runs."""
    run, other = two_runs(tmp_path)
    (other / "experiment.yaml").write_text("model: demo\n")
    for arguments in ([other], [run, other]):
        with pytest.raises(RunError, match="holds an evaluation or scored answers"):
            reported(*arguments)


def test_impossible_requests_are_reported(tmp_path: Path) -> None:
    """No such table; a place for one run's report; a run for a place."""
    run, other = two_runs(tmp_path)
    with pytest.raises(ConfigError, match="there is no table '4'"):
        reported(run, "--table", "4")
    with pytest.raises(ConfigError, match="written into the run"):
        reported(run, "--out", tmp_path / "x")
    with pytest.raises(RunError, match="is a run, and a comparison cannot be written there"):
        reported(run, other, "--out", run)
