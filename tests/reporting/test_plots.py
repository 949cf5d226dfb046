"""Plots: what is drawn is what was measured."""

from __future__ import annotations

import re

import pytest

from backmerge.records import Estimate
from backmerge.reporting.drawing import VARIABLES, as_bytes, inline_svg
from backmerge.reporting.pareto import Front, contenders_of, front, pareto, pareto_places, spots, undominated
from backmerge.reporting.plots import MOST_STEPS, curve, curves, training_loss

from .synthetic import enriched, made_results, typed


def test_a_curve_goes_from_base_over_every_lam_to_tuned() -> None:
    """Base stands at 0 and tuned at 1 of the same line."""
    results = made_results()
    (axes,) = curve(typed(results), typed(results).benchmarks[0]).axes
    (line,) = [line for line in axes.lines if line.get_label() == "linear"]
    assert list(line.get_xdata()) == [0.0, 0.25, 0.5, 1.0]
    assert list(line.get_ydata()) == pytest.approx([0.10, 0.405, 0.825, 0.905])


def test_each_series_has_its_own_curve() -> None:
    """Several methods are distinguished, in the order of the experiment."""
    results = made_results(with_slerp=True)
    (axes,) = curve(typed(results), typed(results).benchmarks[1]).axes
    assert axes.get_legend_handles_labels()[1] == ["linear", "slerp"]
    assert len({line.get_color() for line in axes.lines if line.get_label() in {"linear", "slerp"}}) == 2


def test_a_mark_of_the_confirmation_is_inside_the_axes() -> None:
    """Also of a tuned model that a race stopped measuring on the selection prompts."""
    results = made_results()
    results["summary"] = [row for row in results["summary"] if (row["point"], row["split"]) != ("tuned", "selection")]
    (axes,) = curve(typed(results), typed(results).benchmarks[1]).axes
    confirmed = [y for line in axes.lines if line.get_marker() == "D" for y in line.get_ydata()]
    assert max(confirmed) > 0.3
    assert axes.get_ylim()[1] > max(confirmed)


def test_the_margin_and_the_chosen_lam_are_marked() -> None:
    """The dashed line is the base's rate plus the margin; the dotted one is the choice."""
    results = made_results()
    (axes,) = curve(typed(results), typed(results).benchmarks[1]).axes
    level = [line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()) == [0, 1]]
    assert level == [pytest.approx(0.01 + 0.03)]
    assert [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == ":"] == [[0.5, 0.5]]


@pytest.mark.parametrize("chosen", [None, "tuned"])
def test_nothing_is_marked_where_no_merge_was_chosen(chosen: str | None) -> None:
    """Without a chosen merge there is no line at its λ."""
    results = made_results(chosen=chosen, verdict="not shown")
    (axes,) = curve(typed(results), typed(results).benchmarks[0]).axes
    assert [line for line in axes.lines if line.get_linestyle() == ":"] == []


def test_every_benchmark_has_its_panel() -> None:
    """The file holds a panel for each benchmark, and no empty one where over-refusal was not measured."""
    assert len(curves(typed(made_results())).axes) == 3
    assert len(curves(typed(made_results(with_over_refusal=False))).axes) == 2


def test_the_pareto_plot_pools_prompts() -> None:
    """ASR over two benchmarks is weighted by their prompts, as in the choice; utility is the mean of benchmarks."""
    results = made_results(tuned=("seed-1",))
    results["benchmarks"].append({**results["benchmarks"][1], "name": "harmful-2"})
    results["summary"] += [
        {**entry, "benchmark": "harmful-2", "mean": 1.0, "n": 600}
        for entry in results["summary"]
        if entry["benchmark"] == "harmful"
    ]
    (tuned,) = [place for place in pareto_places(typed(results)) if place.point == "tuned"]
    assert tuned.asr == pytest.approx((0.30 * 200 + 1.0 * 600) / 800)
    assert tuned.utility == pytest.approx(0.90)


def test_points_that_coincide_share_a_label() -> None:
    """Every λ is labelled, and none is drawn over another."""
    results = made_results(with_slerp=True)
    texts = [text.get_text() for text in pareto(typed(results)).axes[0].texts]
    labels = [label for text in texts for label in text.split(", ")]
    assert {"0 (base)", "linear 0.25", "linear 0.5", "slerp 0.5", "1 (tuned)"} <= set(labels)
    assert "linear 0.5, slerp 0.5" in texts


def test_a_label_has_the_colour_of_its_series() -> None:
    """So that whose λ it is can be seen where a name is too long to be written."""
    axes = pareto(typed(made_results(with_slerp=True))).axes[0]
    by_series = {line.get_label(): line.get_color() for line in axes.lines}
    colours = {text.get_text(): text.get_color() for text in axes.texts}
    assert colours["linear 0.25"] == by_series["linear"]
    assert colours["linear 0.5, slerp 0.5"] not in by_series.values()


def test_a_name_with_dollars_is_a_name() -> None:
    """A benchmark's name is never set as a formula, which an odd one would make fail."""
    results = made_results()
    results["benchmarks"][0]["name"] = "$\\frac{$"
    assert b"$\\frac{$" in as_bytes(curve(typed(results), typed(results).benchmarks[0]), "svg")


def test_what_was_not_scored_is_not_drawn() -> None:
    """A point whose answers could all not be scored leaves a gap, and the plots are still made."""
    results = made_results()
    for entry in results["summary"]:
        if entry["point"] == "linear@0.25":
            entry |= {"mean": None, "lowest": None, "highest": None, "spread": None, "n": 0}
    (axes,) = curve(typed(results), typed(results).benchmarks[0]).axes
    (line,) = [line for line in axes.lines if line.get_label() == "linear"]
    assert list(line.get_xdata()) == [0.0, 0.5, 1.0]
    assert [place.point for place in pareto_places(typed(results))] == ["base", "linear@0.5", "tuned"]


@pytest.mark.parametrize("form", ["png", "svg"])
def test_the_same_results_give_the_same_bytes(form: str) -> None:
    """A plot holds no date and no random id."""
    assert as_bytes(curves(typed(made_results())), form) == as_bytes(curves(typed(made_results())), form)


def test_an_inline_figure_follows_the_page() -> None:
    """Its colours are the page's variables, its ids its own, and nothing in it is loaded from elsewhere."""
    figure = training_loss({"seed-1": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]})
    svg = inline_svg(figure, "loss", 'falls "quickly" <fast>')
    assert 'aria-label="falls &quot;quickly&quot; &lt;fast&gt;"' in svg
    assert not [colour for colour in VARIABLES if colour in svg]
    assert "var(--tuned)" in svg
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert ids
    assert all(name.startswith("loss-") for name in ids)
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', svg)) <= set(ids)
    assert "metadata" not in svg


def test_what_has_no_lam_is_a_level() -> None:
    """A recipe without a λ is drawn across the panel, and not at some λ."""
    results = made_results(with_stock=True, chosen="model_stock")
    (axes,) = curve(typed(results), typed(results).benchmarks[0]).axes
    (level,) = [line for line in axes.lines if line.get_label() == "model_stock"]
    assert level.get_linestyle() == "-."
    assert list(level.get_ydata()) == pytest.approx([0.705, 0.705])
    assert [line for line in axes.lines if line.get_linestyle() == ":"] == []


def test_of_many_recipes_without_a_lam_the_chosen_one_is_drawn() -> None:
    """A search by layer tries dozens; in the curves only what came of it is seen."""
    results = made_results(chosen="linear@0.5")
    rows = [row for row in results["summary"] if row["point"] == "linear@0.5"]
    for number in range(3):
        name = f"linear by layer #{number}"
        place = {"point": name, "series": "linear by layer", "lam": None}
        results["points"].append({**results["points"][1], **place, "role": "merged", "setting": [0.1, 0.2]})
        results["summary"] += [{**row, **place} for row in rows]
    (axes,) = curve(typed(results), typed(results).benchmarks[0]).axes
    assert [line for line in axes.lines if line.get_linestyle() == "-."] == []
    results["choice"] |= {"point": "linear by layer #1", "series": "linear by layer", "lam": None}
    (axes,) = curve(typed(results), typed(results).benchmarks[0]).axes
    assert [line.get_label() for line in axes.lines if line.get_linestyle() == "-."] == ["linear by layer #1"]
    assert {"linear by layer #0", "linear by layer #2"} <= {place.point for place in pareto_places(typed(results))}


def test_one_merge_of_all_ends_at_itself() -> None:
    """A series with a λ of 1 of its own does not end at the tuned models, whose mean is another model."""
    results = made_results()
    for rows in (results["points"], results["summary"]):
        for row in rows:
            if row["point"] == "linear@0.5":
                row |= {"point": "linear@1", "lam": 1.0}
    results["choice"]["point"] = None
    (axes,) = curve(typed(results), typed(results).benchmarks[0]).axes
    (line,) = [line for line in axes.lines if line.get_label() == "linear"]
    assert list(line.get_ydata()) == pytest.approx([0.10, 0.405, 0.825])


def test_every_recipe_is_described() -> None:
    """Each mark of the Pareto plot has a spot with its figures; marks that cover each other tell of both."""
    results = made_results(with_slerp=True)
    for row in results["summary"]:
        if row["point"] == "slerp@0.5":
            row["mean"] = next(
                other["mean"]
                for other in results["summary"]
                if other["point"] == "linear@0.5" and all(other[key] == row[key] for key in ("benchmark", "split"))
            )
    places = pareto_places(typed(results))
    told = spots(places)
    assert list(told) == [f"spot-{number}" for number in range(5)]
    assert told["spot-0"].splitlines()[0] == "base"
    assert "task, accuracy: 10.0 % [9.0, 11.0]" in told["spot-0"]
    (both,) = {words for words in told.values() if "slerp@0.5" in words}
    assert "linear@0.5 (chosen)" in both
    svg = inline_svg(pareto(typed(results)), "pareto", "all", told)
    assert svg.count('class="spot" tabindex="0"') == 5
    assert 'id="pareto-spot-4" class="spot"' in svg


def test_a_spot_s_words_are_escaped() -> None:
    """Names are others' words, in titles and labels too."""
    results = made_results()
    results["benchmarks"][0]["name"] = hostile = '"><script>alert(1)</script>'
    for row in results["summary"]:
        row["benchmark"] = hostile if row["benchmark"] == "task" else row["benchmark"]
    svg = inline_svg(pareto(typed(results)), "pareto", "all", spots(pareto_places(typed(results))))
    assert "<script" not in svg
    assert "&lt;script&gt;" in svg


def test_front_has_no_dominated_candidate() -> None:
    """Of the methods, those beaten in one thing and better in none are off the line; ties stay."""
    results = enriched(made_results(with_slerp=True, with_stock=True))
    contenders = contenders_of(typed(results))
    assert [each.name for each in contenders] == ["linear@0.5", "slerp@0.5", "model_stock", "base", "tuned"]
    # linear has the least ASR and the most utility of the three; the base still less ASR, the tuned more utility
    assert [each.name for each in undominated(contenders)] == ["base", "linear@0.5", "tuned"]
    assert len(front(typed(results)).axes[0].containers) == 5


def test_a_tie_in_one_thing_is_decided_by_the_other() -> None:
    """The same ASR for less utility is beaten; the same in both is not."""

    def contender(name: str, asr: float, utility: float) -> Front:
        return Front(name, "", Estimate(asr, asr, asr), Estimate(utility, utility, utility))

    found = undominated([contender("a", 0.1, 0.8), contender("b", 0.1, 0.7), contender("c", 0.1, 0.8)])
    assert [each.name for each in found] == ["a", "c"]


def test_a_long_training_is_thinned() -> None:
    """The page does not grow with the number of steps."""
    losses = {"seed-1": [{"step": step, "loss": 1 / step} for step in range(1, 20_001)]}
    (line,) = training_loss(losses).axes[0].lines
    assert MOST_STEPS / 2 < len(line.get_xdata()) <= MOST_STEPS
