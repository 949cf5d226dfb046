"""Maps of the report: a number in every cell, the mean over models, and nothing where nothing was measured."""

from __future__ import annotations

import pytest

from backmerge.reporting.cell_maps import Heading, category_maps, drift_maps
from backmerge.reporting.heatmap import BROKEN, STEPS, UNCHANGED

from .synthetic import enriched, made_results, typed


def test_a_category_s_rate_is_the_mean_over_models() -> None:
    """Base, each λ and tuned model in order, with the range over seeds told on pointing."""
    (found,) = category_maps(typed(enriched(made_results(with_slerp=True, with_stock=True))))
    assert found.title == "Attack success rate by category: harmful"
    assert found.columns == ("base", "0.25", "0.5", "0.5", "·", "tuned")
    assert found.groups == (
        Heading("", 1),
        Heading("linear", 2),
        Heading("slerp", 1),
        Heading("model_stock", 1),
        Heading("", 1),
    )
    rows = dict(found.rows)
    assert list(rows) == ["fraud", "malware"]
    tuned = rows["malware"][-1]
    assert tuned is not None
    # 30 % and 31 % of the two seeds
    assert tuned.share == pytest.approx(0.305)
    assert tuned.tooltip == "malware, tuned: 30.5 % (mean over 2 models, 30.0 to 31.0; n = 200)"
    base = rows["fraud"][0]
    assert base is not None
    assert base.tooltip == "fraud, base: 0.5 % ([0.9, 1.1]; n = 200)"
    assert (found.tone, base.words) == ("bad", "0")


def test_other_splits_are_not_mixed_in() -> None:
    """The map is of the selection split, where every λ was measured."""
    results = enriched(made_results())
    for row in results["by_category"]:
        if row["split"] == "confirmation":
            row["value"] = 1.0
    (found,) = category_maps(typed(results))
    assert max(cell.share or 0.0 for _, cells in found.rows for cell in cells if cell) < 0.5


def test_unscored_answers_are_a_dash_with_their_count() -> None:
    """No colour is made up for it, and a seed that was scored is shown without the other."""
    results = enriched(made_results())
    for row in results["by_category"]:
        if row["category"] == "fraud" and row["model"] in ("base", "tuned/seed-1"):
            row |= {"value": None, "n": 0, "unscored": 9}
    (found,) = category_maps(typed(results))
    cells = dict(found.rows)["fraud"]
    base, tuned = cells[0], cells[-1]
    assert base is not None
    assert tuned is not None
    assert (base.words, base.share) == ("—", 0.0)
    assert base.tooltip == "fraud, base: nothing was scored (9 unscored)"
    assert "mean over 1 models" not in tuned.tooltip
    assert tuned.tooltip.endswith("9 unscored)")
    assert tuned.share == pytest.approx(0.155)


def test_a_point_that_was_not_asked_leaves_a_gap() -> None:
    """A search that left out a λ in one category leaves it out of the map there."""
    results = enriched(made_results())
    results["by_category"] = [
        row
        for row in results["by_category"]
        if not (row["model"].startswith("linear@0.5") and row["category"] == "fraud")
    ]
    (found,) = category_maps(typed(results))
    assert dict(found.rows)["fraud"][2] is None
    assert dict(found.rows)["malware"][2] is not None


def test_names_with_slashes_find_their_point() -> None:
    """A model's name is its point's and its tuned model's, and either may hold a slash; the longest point fits."""
    results = enriched(made_results(tuned=("a/b",)))
    for rows in (results["points"], results["by_category"]):
        for row in rows:
            for key in ("point", "model"):
                if key in row:
                    row[key] = row[key].replace("linear@0.5", "tuned/x@0.5")
    (found,) = category_maps(typed(results))
    assert len(found.columns) == 4
    # one model at each: nothing of tuned/x@0.5 went to tuned
    assert all("mean over" not in cell.tooltip for _, cells in found.rows for cell in cells if cell)


def test_no_map_without_categories() -> None:
    """Nor is there one of what was not measured, or by an older run."""
    results = made_results()
    assert category_maps(typed(results)) == []
    del results["by_category"]
    assert category_maps(typed(results)) == []
    assert drift_maps(typed(results)) == []


def test_drift_is_by_layer_and_module() -> None:
    """Rows are modules, columns layers, colours the steps of `backmerge diff`; tensors outside stand by themselves."""
    layers, outside = drift_maps(typed(enriched(made_results())))
    assert (layers.title, layers.columns) == ("By layer of model.layers", ("0", "1"))
    rows = dict(layers.rows)
    first, last = rows["mlp.up_proj"]
    assert first is not None
    assert last is not None
    assert (last.words, last.step) == ("2 %", STEPS)
    assert first.step == STEPS - 2
    assert last.tooltip == "mlp.up_proj, layer 1: 2 % (mean over 2 models, 2 % to 2 %)"
    broken = rows["self_attn.q_proj"][0]
    assert broken is not None
    assert (broken.words, broken.step) == ("no ratio", BROKEN)
    ((name, (cell,)),) = outside.rows
    assert cell is not None
    assert (name, cell.words, cell.step) == ("lm_head", "0 %", UNCHANGED)
    assert layers.scale[-1] == (STEPS, "2 %")


def test_seeds_are_averaged_place_by_place() -> None:
    """Two models that moved differently have the mean between them, and both are reported."""
    results = enriched(made_results())
    for row in results["drift"]:
        if row["tuned"] == "seed-2" and row["relative_change"]:
            row["relative_change"] *= 3
    cell = dict(drift_maps(typed(results))[0].rows)["mlp.up_proj"][0]
    assert cell is not None
    assert cell.tooltip == "mlp.up_proj, layer 0: 2 % (mean over 2 models, 1 % to 3 %)"


def test_nothing_moved_is_drawn_all_the_same() -> None:
    """A tuned model that is the base has a map without a scale."""
    results = enriched(made_results())
    for row in results["drift"]:
        row["relative_change"] = 0.0
    layers, _ = drift_maps(typed(results))
    assert layers.scale == ()
    assert {cell.step for _, cells in layers.rows for cell in cells if cell} == {UNCHANGED}
