"""Runs next to each other, on a page and in files."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from backmerge.reporting.families import families_of
from backmerge.reporting.finished_runs import Run, read_runs, run_of
from backmerge.reporting.runs_compared import compared_curves, comparison_rows, comparison_table, write_comparison
from backmerge.reporting.tables import text_of

from .chromium import PROGRAM, Chromium
from .several import VALUES, experiment_of, of_models, results_of, written
from .synthetic import texts, typed
from .test_report import Page

HOSTILE = "<script>document.title='broken'</script></table>&lt;b&gt;{{7*7}}\u202e|$x$"
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="neither chromium nor google-chrome is installed")


def three_runs() -> list[Run]:
    """Two seeds of one experiment, and another task without one of the benchmarks."""
    first = run_of("a", typed(results_of(of_models(VALUES, 0), tuned=("one",), title="a")), experiment_of((1,)))
    second = run_of("b", typed(results_of(of_models(VALUES, 1), tuned=("two",), title="b")), experiment_of((2,)))
    code = {
        point: {"code-task": own["task"], "advbench": own["advbench"], "harmless": [0.1] * len(own["task"])}
        for point, own in VALUES.items()
    }
    other = run_of("c", typed(results_of(code, title="c", chosen=None)), experiment_of((1, 2), dataset="code"))
    return [first, second, other]


def test_a_row_for_each_run_and_one_for_its_seeds() -> None:
    """By hand: what each chose and found; below runs of one experiment, their means."""
    table = comparison_table(families_of(three_runs()))
    assert [len(block) for block in table.blocks] == [3, 1]
    assert texts(table, 10) == [
        *(
            [
                name,
                "aligned-7b",
                "reasoning (task, accuracy)",
                tuned,
                "0.4",
                "restored",
                *figures,
            ]
            for name, tuned, figures in (
                ("a", "1", ("+1.0 [+0.0, +2.0]", "20.0 [15.0, 25.0]", "80.0 [75.0, 85.0]", "60.0 [55.0, 65.0]")),
                ("b", "1", ("+3.0 [+2.0, +4.0]", "20.0 [15.0, 25.0]", "90.0 [85.0, 95.0]", "70.0 [65.0, 75.0]")),
                (
                    "all 2",
                    "2",
                    (
                        "+2.0 ± 1.4 [-10.7, +14.7]",
                        "20.0 [15.0, 25.0]",
                        "85.0 ± 7.1 [21.5, 100.0]",
                        "65.0 ± 7.1 [1.5, 100.0]",
                    ),
                ),
            )
        ),
        [
            *("c", "aligned-7b", "code (code-task, accuracy)", "2", "–", "not shown", "–"),
            *("20.0 [15.0, 25.0]", "85.0 ± 7.1 [80.0, 90.0]", "–"),
        ],
    ]


def test_benchmarks_stand_under_each_other() -> None:
    """All that any run has, in separate columns; a dash where a run has none such."""
    table = comparison_table(families_of(three_runs()))
    assert [group for group, _ in table.groups if group] == [
        "score",
        "advbench: ASR",
        "hexphi: ASR",
        "harmless: over-refusal",
    ]
    at = {column.name: index for index, column in enumerate(table.columns)}
    assert text_of(table.rows[3][at["asr_advbench_tuned"]]) == "32.0 ± 2.8 [27.0, 37.0]"
    assert {text_of(table.rows[3][at[f"asr_hexphi_{role}"]]) for role in ("base", "tuned", "merged")} == {"–"}
    assert text_of(table.rows[0][at["over_refusal_harmless_base"]]) == "–"


def test_differences_between_runs_are_reported() -> None:
    """Another judge, rule or split makes figures hard to compare, and is said with the runs."""
    runs = three_runs()
    changed = json.loads(runs[2].results.model_dump_json().replace('"a-judge"', '"another"')) | {"split": "whole"}
    notes = comparison_table(families_of([runs[0], run_of("c", typed(changed), runs[2].experiment)])).notes
    assert any("differ in judge" in note and "a-judge (a); another (c)" in note for note in notes)
    assert any("differ in prompts" in note for note in notes)
    assert not any("differ" in note and "rule" in note for note in notes)


def test_the_csv_has_every_figure_in_full(tmp_path: Path) -> None:
    """One a row, with its run, or none for the seeds together; read back, they are the runs' own."""
    runs = three_runs()
    write_comparison(runs, tmp_path)
    with (tmp_path / "compared.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(comparison_rows(families_of(runs)))
    own = [row for row in rows if (row["run"], row["benchmark"], row["role"]) == ("b", "task", "merged")]
    assert [(float(row["mean"]), float(row["low"]), row["lam"]) for row in own] == [(0.7, 0.7 - 0.05, "0.4")]
    both = [row for row in rows if (row["run"], row["role"]) == ("", "merged less base")]
    assert [(row["num_runs"], row["family"]) for row in both] == [("2", "a, b")]
    assert float(both[0]["mean"]) == pytest.approx(0.02)
    # nothing was chosen in this one
    assert not [row for row in rows if row["run"] == "c" and row["role"].startswith("merged")]


def test_every_run_has_its_curve() -> None:
    """A row of panels for each base and task, a line for each run and method, from base to tuned."""
    axes = compared_curves(three_runs()).axes
    assert len(axes) == 2 * 4
    assert [line.get_label() for line in axes[0].lines] == ["a: linear", "a: slerp", "b: linear", "b: slerp"]
    assert list(axes[0].lines[0].get_xdata()) == [0.0, 0.4, 0.6, 1.0]
    assert list(axes[0].lines[0].get_ydata()) == pytest.approx([0.2, 0.6, 0.7, 0.8])
    assert list(axes[4].lines[0].get_ydata()) == pytest.approx([0.2, 0.65, 0.75, 0.85])
    # neither of these was measured in both
    assert [text.get_text() for text in axes[3].texts] == ["not measured"]
    assert [text.get_text() for text in axes[6].texts] == ["not measured"]


def test_everything_is_written_the_same_each_time(tmp_path: Path) -> None:
    """Page, tables and figures, with neither time nor place in them."""
    first, second = (write_comparison(three_runs(), tmp_path / name) for name in ("a", "b/c"))
    assert [file.name for file in first] == [
        *(f"compared.{form}" for form in ("html", "csv", "md", "tex")),
        *(f"compared_curves.{form}" for form in ("png", "svg", "pdf")),
    ]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    assert b"CreationDate" not in (tmp_path / "a" / "compared_curves.pdf").read_bytes()


def test_hostile_names_are_text(tmp_path: Path) -> None:
    """Names from a user's files add no tag, and nothing is loaded from elsewhere."""
    tame, hostile = (
        run_of(
            words, typed(json.loads(json.dumps(results_of()).replace('"advbench"', json.dumps(words)))), experiment_of()
        )
        for words in ("advbench", HOSTILE)
    )
    pages = []
    for run in (tame, hostile):
        write_comparison([run], tmp_path)
        pages.append(Page((tmp_path / "compared.html").read_text(encoding="utf-8")))
    body = [[tag for tag in page.tags if tag in {"table", "tr", "td", "/table", "script", "b"}] for page in pages]
    assert body[0] == body[1]
    assert "script" not in pages[1].tags
    # as the run's name, twice, and over its columns
    assert pages[1].text.count(HOSTILE.replace("\u202e", "\ufffd")) >= 3
    policy = next(value for tag, name, value in pages[1].attributes if tag == "meta" and "default-src" in value)
    assert policy.startswith("default-src 'none'; ")
    assert "script-src" not in policy
    assert not [value for _, name, value in pages[1].attributes if name in {"src", "srcset"}]


@needs_browser
@pytest.mark.parametrize("is_phone", [False, True])
def test_a_browser_shows_it(tmp_path: Path, is_phone: bool) -> None:
    """Without a word on the console, a request, or a page that is wider than the window."""
    runs = three_runs()
    runs[1] = runs[1]._replace(name=HOSTILE)
    write_comparison(runs, tmp_path)
    with Chromium(tmp_path / "profile") as browser:
        width = 390 if is_phone else 1280
        browser.look_as(width, 900, is_phone=is_phone, is_dark=is_phone)
        browser.open(tmp_path / "compared.html")
        assert browser.value("document.title") == "Runs compared"
        assert browser.value("document.documentElement.scrollWidth") <= width
        assert browser.value("document.querySelectorAll('.runs tbody tr').length") == 4
        assert browser.console == []
        assert [request for request in browser.requests if not request.startswith("file:")] == []


def test_a_run_from_the_disk_is_the_run(tmp_path: Path) -> None:
    """What was read compares as what was made."""
    written(tmp_path / "a", results_of(), experiment_of())
    (run,) = read_runs([tmp_path / "a"])
    made = run_of("a", typed(results_of()), experiment_of())
    assert comparison_rows(families_of([run])) == comparison_rows(families_of([made]))
    assert all(math.isfinite(row["mean"]) for row in comparison_rows(families_of([run])))
