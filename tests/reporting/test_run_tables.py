"""A run's own tables: what stands in them is what the run found."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from backmerge.errors import RunError
from backmerge.reporting.run_tables import methods_table, models_table, points_table, write_tables
from backmerge.reporting.tables import csv_rows, text_of

from .several import VALUES as FIGURES
from .several import of_models, results_of, written
from .synthetic import enriched, made_results, made_run, texts, typed

BEST = {"linear": "linear@0.4", "slerp": "slerp@0.4", "model_stock": None}


def test_models_by_hand() -> None:
    """Base, tuned and chosen merge, a row for each metric, as means over the tuned models."""
    table = models_table(typed(results_of()))
    assert [column.heading for column in table.columns] == ["benchmark", "metric", "base", "tuned", "merged", "prompts"]
    assert texts(table) == [
        ["task", "accuracy", "20.0 [15.0, 25.0]", "85.0 ± 7.1 [80.0, 90.0]", "65.0 ± 7.1 [60.0, 70.0]", "100"],
        [
            "advbench",
            "attack success rate",
            "1.0 [-4.0, 6.0]",
            "32.0 ± 2.8 [27.0, 37.0]",
            "3.0 ± 1.4 [-2.0, 8.0]",
            "100",
        ],
        ["hexphi", "attack success rate", "2.0 [-3.0, 7.0]", "45.0 ± 7.1 [40.0, 50.0]", "5.0 ± 1.4 [0.0, 10.0]", "100"],
    ]
    assert table.notes[0] == "Merged: linear@0.4. Verdict: restored."


def test_without_a_merge_its_column_is_empty() -> None:
    """Where nothing passed, the table says so, and shows no figures for a merge."""
    table = models_table(typed(results_of(chosen=None)))
    assert {text_of(row[4]) for row in table.rows} == {"–"}
    assert table.notes[0] == "Nothing was merged: no recipe passed."


def test_points_are_all_there_in_order() -> None:
    """Base first, tuned last; λ where there is one; the chosen one is marked."""
    table = points_table(typed(results_of()))
    assert [(row[0], row[1], row[-1]) for row in table.rows] == [
        ("base", 0.0, ""),
        ("linear@0.4", 0.4, "chosen"),
        ("linear@0.6", 0.6, ""),
        ("slerp@0.4", 0.4, ""),
        ("model_stock", None, ""),
        ("tuned", 1.0, ""),
    ]
    assert text_of(table.rows[2][2]) == "75.0 ± 7.1 [70.0, 80.0]"
    assert text_of(table.rows[4][2]) == "50.0 [45.0, 55.0]"


def test_methods_only_where_they_were_compared() -> None:
    """A row for each series, and why one has none; no such table without a comparison."""
    assert methods_table(typed(results_of())) is None
    table = methods_table(typed(results_of(best=BEST)))
    assert table is not None
    assert texts(table) == [
        ["linear", "0.4", "2", *["50.0 [40.0, 60.0]"] * 2, "–", "+1.0 [+0.0, +2.0]", "–", "–", "restored"],
        ["slerp", "0.4", "2", *["50.0 [40.0, 60.0]"] * 2, "–", "+1.0 [+0.0, +2.0]", "–", "–", "restored"],
        ["model_stock", "–", "0", *["–"] * 6, "not shown"],
    ]
    assert "model_stock: None passed." in table.notes


def test_setting_with_many_lams_is_shown() -> None:
    """Where each layer has its own λ, the table says which."""
    results = results_of(best=BEST)
    results["comparison"]["rows"][0] |= {"lam": None, "setting": [0.2, 0.6]}
    table = methods_table(typed(results))
    assert table is not None
    assert table.rows[0][1] == "[0.2, 0.6]"


def test_the_files_hold_the_results_numbers(tmp_path: Path) -> None:
    """Every table in three forms; the CSV's means are the summary's, to the last digit."""
    run = made_run(tmp_path / "run", enriched(made_results(with_slerp=True, unscored=2)))
    files = write_tables(run)
    assert [str(file.relative_to(run)) for file in files] == [
        f"tables/{name}.{form}" for name in ("models", "points", "methods") for form in ("csv", "md", "tex")
    ]
    summary = {
        (entry["point"], entry["benchmark"]): entry
        for entry in made_results(with_slerp=True, unscored=2)["summary"]
        if entry["split"] == "selection"
    }
    with (run / "tables" / "points.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 5
    for row in rows:
        for name in ("task", "harmful", "harmless"):
            entry = summary[row["point"], name]
            assert float(row[name]) == entry["mean"]
            for field in ("low", "high", "n", "unscored", "num_models"):
                assert float(row[f"{name}_{field}"]) == entry[field]
            assert row[f"{name}_covers"] == ("prompts and seeds" if entry["num_models"] > 1 else "prompts")


def test_unscored_answers_are_shown_next_to_the_rate(tmp_path: Path) -> None:
    """In every form."""
    run = made_run(tmp_path / "run", made_results(unscored=2))
    write_tables(run)
    for form in ("md", "tex"):
        assert "4 unscored" in (run / "tables" / f"models.{form}").read_text(encoding="utf-8")
    with (run / "tables" / "models.csv").open() as stream:
        assert {row["tuned_unscored"] for row in csv.DictReader(stream)} == {"0", "4"}


def test_tables_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    """No time and no path is in them."""
    made = [written(tmp_path / name / "run", results_of(best=BEST)) for name in ("a", "b")]
    for one, other in zip(*(write_tables(run) for run in made), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_an_unfinished_run_has_no_tables(tmp_path: Path) -> None:
    """The way on is given, and nothing is written."""
    run = written(tmp_path / "run", results_of())
    (run / "results.json").unlink()
    with pytest.raises(RunError, match=re.escape("has no results.json")):
        write_tables(run)
    assert not (run / "tables").exists()


def test_one_tuned_model_has_no_spread() -> None:
    """A single model's figure is reported without ±, and the note says what is unknown."""
    table = models_table(typed(results_of(of_models(FIGURES, 0), tuned=("seed-1",))))
    assert text_of(table.rows[0][3]) == "80.0 [75.0, 85.0]"
    assert csv_rows(table)[0]["tuned_spread"] is None
    assert any("its seed" in note for note in table.notes)


@pytest.mark.parametrize(("num_models", "words"), [(1, "over prompts, not seeds"), (2, "over prompts and tuned")])
def test_every_form_says_what_the_intervals_cover(num_models: int, words: str, tmp_path: Path) -> None:
    """Captions of Markdown and LaTeX."""
    results = made_results()
    results["tuned"] = (results["tuned"] * 2)[:num_models]
    run = made_run(tmp_path / "run", results)
    write_tables(run)
    for form in ("md", "tex"):
        assert words in (run / "tables" / f"models.{form}").read_text()
