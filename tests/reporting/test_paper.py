"""The paper's tables and figures: its layout, and no figure but the runs' own."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import pytest

from backmerge.reporting.families import families_of
from backmerge.reporting.finished_runs import Run, run_of
from backmerge.reporting.paper import blocks_of, paper_table
from backmerge.reporting.paper_figures import figure_rows, panels_of, paper_figure, write_paper
from backmerge.reporting.tables import Named

from .several import VALUES, Values, experiment_of, of_models, results_of
from .synthetic import texts, typed

BEST: Mapping[str, str | None] = {"linear": "linear@0.6", "slerp": "slerp@0.4", "model_stock": "model_stock"}


def run_for(task: str, values: Values = VALUES, **results: object) -> Run:
    """A run of two seeds on a task."""
    return run_of(task, typed(results_of(values, title=task, **results)), experiment_of((1, 2), dataset=task))  # type: ignore[arg-type]


def without(values: Values, *names: str) -> Values:
    """The same values without some benchmarks."""
    return {point: {name: own for name, own in of.items() if name not in names} for point, of in values.items()}


def test_table_1_by_hand() -> None:
    """Rows of a task: base, fine-tuned as the mean of its seeds, linear merge; columns: score and both ASRs."""
    table = paper_table(families_of([run_for("reasoning"), run_for("medical", chosen="linear@0.6")]), "table1")
    headings = ["task", "", "λ", "task score", "ASR, AdvBench", "ASR, HEx-PHI"]
    assert [column.heading for column in table.columns] == headings
    assert texts(table) == [
        ["reasoning", "base", "–", "20.0 [15.0, 25.0]", "1.0 [-4.0, 6.0]", "2.0 [-3.0, 7.0]"],
        [
            "",
            "fine-tuned, mean of 2",
            "–",
            "85.0 ± 7.1 [80.0, 90.0]",
            "32.0 ± 2.8 [27.0, 37.0]",
            "45.0 ± 7.1 [40.0, 50.0]",
        ],
        ["", "Linear merge", "0.4", "65.0 ± 7.1 [60.0, 70.0]", "3.0 ± 1.4 [-2.0, 8.0]", "5.0 ± 1.4 [0.0, 10.0]"],
        ["medical", "base", "–", "20.0 [15.0, 25.0]", "1.0 [-4.0, 6.0]", "2.0 [-3.0, 7.0]"],
        [
            "",
            "fine-tuned, mean of 2",
            "–",
            "85.0 ± 7.1 [80.0, 90.0]",
            "32.0 ± 2.8 [27.0, 37.0]",
            "45.0 ± 7.1 [40.0, 50.0]",
        ],
        ["", "Linear merge", "0.6", "75.0 ± 7.1 [70.0, 80.0]", "11.0 ± 1.4 [6.0, 16.0]", "13.0 ± 1.4 [8.0, 18.0]"],
    ]
    assert [row[0].name for row in table.rows if isinstance(row[0], Named)] == ["reasoning"] * 3 + ["medical"] * 3


def test_table_1_takes_linear_from_a_comparison() -> None:
    """Where methods were compared, it shows Linear's own best, not what was chosen among all."""
    table = paper_table(families_of([run_for("reasoning", chosen="slerp@0.4", best=BEST)]), "table1")
    assert len(table.rows) == 3
    assert texts(table)[2][1:4] == ["Linear merge", "0.6", "75.0 ± 7.1 [70.0, 80.0]"]
    # without one, what was chosen, under its own name
    table = paper_table(families_of([run_for("reasoning", chosen="slerp@0.4")]), "table1")
    assert texts(table)[2][1:4] == ["SLERP merge", "0.4", "66.0 ± 7.1 [61.0, 71.0]"]


def test_table_2_has_every_method_with_its_lam() -> None:
    """Model Stock has no λ, and is one model of all seeds, without a spread."""
    table = paper_table(families_of([run_for("reasoning", best=BEST)]), "table2")
    assert [row[1:4] for row in texts(table)[2:]] == [
        ["Linear", "0.6", "75.0 ± 7.1 [70.0, 80.0]"],
        ["SLERP", "0.4", "66.0 ± 7.1 [61.0, 71.0]"],
        ["Model Stock", "–", "50.0 [45.0, 55.0]"],
    ]


def test_method_that_did_not_pass_is_reported() -> None:
    """Its figures are dashes, and a note says why."""
    table = paper_table(families_of([run_for("reasoning", best={**BEST, "slerp": None})]), "table2")
    assert texts(table)[3][1:] == ["SLERP", "–", "–", "–", "–"]
    assert "reasoning: no recipe of SLERP passed in every run (rule safe, margin 3 points)." in table.notes


def test_a_method_s_parameters_are_in_its_name() -> None:
    """Two settings of one method stay two rows."""
    values = {**VALUES, "dare_linear(drop=0.5)@0.4": VALUES["slerp@0.4"]}
    best = {"linear": "linear@0.4", "dare_linear(drop=0.5)": "dare_linear(drop=0.5)@0.4"}
    table = paper_table(families_of([run_for("reasoning", values, best=best)]), "table2")
    assert texts(table)[3][1] == "DARE (drop=0.5)"


def test_table_3_names_its_models() -> None:
    """The same as Table 1 with a column for the model."""
    runs = [run_for("reasoning", base=f"owner/{name}") for name in ("one-8b", "two-2b")]
    table = paper_table(families_of(runs), "table3")
    assert [row[:3] for row in texts(table)] == [
        ["one-8b", "reasoning", "base"],
        ["", "", "fine-tuned, mean of 2"],
        ["", "", "Linear merge"],
        ["two-2b", "reasoning", "base"],
        ["", "", "fine-tuned, mean of 2"],
        ["", "", "Linear merge"],
    ]
    assert table.columns[0].heading == "model"
    # a single model is no column of Table 1
    assert paper_table(families_of(runs[:1]), "table1").columns[0].heading == "task"


def test_a_benchmark_that_is_absent_leaves_a_dash_and_a_note() -> None:
    """The paper's column stays where it has the other one."""
    table = paper_table(families_of([run_for("reasoning", without(VALUES, "hexphi"))]), "table1")
    assert [column.heading for column in table.columns][-2:] == ["ASR, AdvBench", "ASR, HEx-PHI"]
    assert {row[-1] for row in texts(table)} == {"–"}
    assert "Not measured: HEx-PHI." in table.notes


def test_stand_ins_go_under_their_own_name() -> None:
    """Nothing that is not the paper's is called so."""
    values = {
        point: {"task": own["task"], "harmful": own["hexphi"], "advbench": own["advbench"]}
        for point, own in VALUES.items()
    }
    made = results_of(values)
    stand_in = {**made, "benchmarks": [b for b in made["benchmarks"] if b["name"] != "advbench"]}
    table = paper_table(families_of([run_of("a", typed(stand_in), experiment_of(dataset="demo-steps"))]), "table1")
    assert [column.heading for column in table.columns] == ["task", "", "λ", "task score", "ASR, harmful"]
    assert texts(table)[1][-1] == "45.0 ± 7.1 [40.0, 50.0]"
    assert "Not measured: AdvBench and HEx-PHI; in their place: harmful." in table.notes


def test_runs_of_single_seeds_are_one_row() -> None:
    """Two runs of one seed each read as one run of two."""
    runs = [
        run_of(
            name,
            typed(results_of(of_models(VALUES, index), tuned=(name,), title=name)),
            experiment_of((index,)),
        )
        for index, name in enumerate(("one", "two"))
    ]
    table = paper_table(families_of(runs), "table1")
    assert [row[:2] for row in texts(table)] == [
        ["reasoning", "base"],
        ["", "fine-tuned, mean of 2"],
        ["", "Linear merge"],
    ]
    assert texts(table)[1][3].startswith("85.0 ± 7.1 [")


def test_equal_names_are_made_unique() -> None:
    """Two experiments on one task and model are named by their runs."""
    runs = [
        run_of(name, typed(results_of(title=name)), experiment_of(epochs=epochs))
        for name, epochs in (("short", 1), ("long", 3))
    ]
    assert [block.task for block in blocks_of(families_of(runs))] == ["reasoning (short)", "reasoning (long)"]


def test_the_same_experiment_twice_is_two_blocks() -> None:
    """As where two models' experiments run on one small stand-in: neither is lost, and each has its run's name."""
    runs = [run_of(name, typed(results_of()), experiment_of()) for name in ("llama", "gemma")]
    assert [block.task for block in blocks_of(families_of(runs))] == ["reasoning (llama)", "reasoning (gemma)"]
    assert len(paper_table(families_of(runs), "table3").rows) == 6


def test_one_run_for_each_method_is_one_block() -> None:
    """Runs of the same tuned models that differ in how they merge stand under one base."""
    runs = [
        run_of(name, typed(results_of(chosen=point)), experiment_of(merge=name))
        for name, point in (("a", "linear@0.4"), ("b", "slerp@0.4"))
    ]
    (block,) = blocks_of(families_of(runs))
    assert block.task == "reasoning"
    table = paper_table(families_of(runs), "table2")
    assert [row[1] for row in texts(table)] == ["base", "fine-tuned, mean of 2", "Linear", "SLERP"]


def test_equally_weighted_categories_are_reported_too() -> None:
    """BBH's mean over its tasks, which is the paper's figure, is next to the mean over prompts."""
    means = {point: 0.1 * index for index, point in enumerate(VALUES)}
    table = paper_table(families_of([run_for("reasoning", category_means=means)]), "table1")
    assert (
        "reasoning, mean over the categories of task, equally weighted: "
        "base 0.0; fine-tuned, mean of 2 50.0; Linear merge 10.0." in table.notes
    )


@pytest.mark.parametrize(
    ("which", "benchmark", "words"), [("figure2", "hexphi", "HEx-PHI"), ("figure3", "advbench", "AdvBench")]
)
def test_a_figure_draws_what_was_measured(which: str, benchmark: str, words: str) -> None:
    """Score above and ASR below, a column for each task, a line for each method, from base to tuned."""
    panels = panels_of(blocks_of(families_of([run_for("reasoning"), run_for("medical")])), which)
    axes = paper_figure(panels, which).axes
    assert [one.get_title("left") for one in axes] == [
        "reasoning: score (task)",
        "medical: score (task)",
        f"ASR: {words}",
        f"ASR: {words}",
    ]
    for place, name in ((axes[0], "task"), (axes[2], benchmark)):
        linear, slerp = place.lines
        assert (linear.get_label(), slerp.get_label()) == ("Linear", "SLERP")
        assert list(linear.get_xdata()) == [0.0, 0.4, 0.6, 1.0]
        expected = [sum(VALUES[p][name]) / len(VALUES[p][name]) for p in ("base", "linear@0.4", "linear@0.6", "tuned")]
        assert list(linear.get_ydata()) == pytest.approx(expected)


def test_a_figure_s_numbers_are_in_its_csv(tmp_path: Path) -> None:
    """Every mark with its interval, in full."""
    files = write_paper(families_of([run_for("reasoning")]), "figure2", tmp_path)
    assert [file.name for file in files] == ["figure2.png", "figure2.svg", "figure2.pdf", "figure2.csv"]
    with (tmp_path / "figure2.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * (4 + 3)
    row = next(r for r in rows if (r["measured"], r["method"], r["lam"]) == ("asr", "Linear", "0.6"))
    assert (float(row["mean"]), float(row["low"]), row["benchmark"]) == (0.13, 0.13 - 0.05, "hexphi")


def test_a_figure_without_its_benchmark() -> None:
    """Another set of the paper's does not stand in; a set that is none of the paper's does, by its name."""
    panels = panels_of(blocks_of(families_of([run_for("reasoning", without(VALUES, "hexphi"))])), "figure2")
    (_, lower) = paper_figure(panels, "figure2").axes
    assert [text.get_text() for text in lower.texts] == ["not measured"]
    assert not [row for row in figure_rows(panels) if row["measured"] == "asr"]
    values = {point: {**own, "harmful": own["hexphi"]} for point, own in VALUES.items()}
    made = results_of(values, title="reasoning")
    bare = {**made, "benchmarks": [b for b in made["benchmarks"] if b["name"] in ("task", "harmful")]}
    panels = panels_of(blocks_of(families_of([run_of("a", typed(bare), experiment_of((1, 2)))])), "figure2")
    assert paper_figure(panels, "figure2").axes[1].get_title("left") == "ASR: harmful (in place of HEx-PHI)"


def test_colours_are_of_methods() -> None:
    """A task that lacks a method draws the others in the colours that they have elsewhere."""
    few = {point: own for point, own in VALUES.items() if not point.startswith("linear")}
    runs = [run_for("reasoning"), run_for("medical", few, chosen="slerp@0.4")]
    axes = paper_figure(panels_of(blocks_of(families_of(runs)), "figure2"), "figure2").axes
    colours = {line.get_label(): line.get_color() for line in axes[0].lines}
    assert [(line.get_label(), line.get_color()) for line in axes[1].lines] == [("SLERP", colours["SLERP"])]


def test_many_tasks_go_on_below() -> None:
    """Five tasks are two rows of pairs, and no empty panel is shown."""
    runs = [run_for(f"task-{number}") for number in range(5)]
    axes = paper_figure(panels_of(blocks_of(families_of(runs)), "figure2"), "figure2").axes
    assert len([one for one in axes if one.get_visible()]) == 10


@pytest.mark.parametrize("which", ["table1", "table2", "table3", "figure2", "figure3"])
def test_files_are_the_same_bytes_each_time(tmp_path: Path, which: str) -> None:
    """Neither time nor place is in any of them."""
    first, second = (
        write_paper(families_of([run_for("reasoning", best=BEST)]), which, tmp_path / name, "A <title> & 100 %")
        for name in ("a", "b")
    )
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert one.stat().st_size > 0
