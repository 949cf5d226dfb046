"""The search for a λ of each part: what it asks for, that it learns, and that a killed one asks the same."""

from pathlib import Path

import pytest

from backmerge.merging.schedule import Layers, value_at
from backmerge.selection import LayersSettings
from backmerge.selection.layers import LayerSearch, Recipe, parts_of, setting_of

pytest.importorskip("optuna", reason="the search by layer needs the extra 'search'")

NAMES = [f"model.layers.{layer}.{part}.weight" for layer in range(4) for part in ("self_attn.q_proj", "mlp.up_proj")]


def asked(settings: LayersSettings, journal: Path, *, most: int = 100) -> list[Recipe]:
    """Recipes until the search ends, or `most` of this session; utility grows and ASR grows with the mean λ."""
    search = LayerSearch(settings, 0.4, journal, "study")
    found: list[Recipe] = []
    while len(found) < most and (recipe := search.ask()) is not None:
        mean = sum(recipe.values.values()) / len(recipe.values)
        search.tell(mean, mean**2)
        found.append(recipe)
    return found


@pytest.mark.parametrize("by", ["layer", "module", "both"])
def test_one_value_everywhere_is_the_single_lam(by: str) -> None:
    """With the same λ in every part, each tensor gets that λ."""
    settings = LayersSettings.model_validate({"by": by})
    setting = setting_of(settings, dict.fromkeys(parts_of(settings), 0.4))
    names = [*NAMES, "model.norm.weight"]
    assert {round(value_at(setting, name, Layers(names)), 12) for name in names} == {0.4}


def test_attention_knots_do_not_change_the_rest() -> None:
    """By `both`, attention follows its own gradient, and the rest another."""
    settings = LayersSettings(by="both", num_knots=2)
    setting = setting_of(settings, {"attention-0": 0.0, "attention-1": 0.6, "rest-0": 1.0, "rest-1": 1.0})
    layers = Layers(NAMES)
    assert [value_at(setting, name, layers) for name in NAMES[::2]] == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert {value_at(setting, name, layers) for name in NAMES[1::2]} == {1.0}


def test_the_first_recipe_is_the_best_single_lam(tmp_path: Path) -> None:
    """The search begins where the search over λ ended, and asks for as many recipes as it may."""
    found = asked(LayersSettings(num_trials=5), tmp_path / "journal")
    assert found[0].setting == [0.4] * 4
    assert [recipe.number for recipe in found] == [0, 1, 2, 3, 4]
    assert len({tuple(recipe.setting) for recipe in found}) == 5
    assert all(0 <= value <= 1 for recipe in found for value in recipe.values.values())


def test_resumed_search_measures_the_same_points(tmp_path: Path) -> None:
    """Three recipes, a question left open, and the rest in another session: the same nine as in one."""
    settings = LayersSettings(num_trials=9)
    whole = asked(settings, tmp_path / "whole")
    first = asked(settings, tmp_path / "parts", most=3)
    LayerSearch(settings, 0.4, tmp_path / "parts", "study").ask()  # killed while this one was measured
    again = LayerSearch(settings, 0.4, tmp_path / "parts", "study")
    assert [recipe for recipe, _ in again.told()] == first
    assert first + asked(settings, tmp_path / "parts") == whole


def test_a_search_that_is_done_asks_for_nothing(tmp_path: Path) -> None:
    """All recipes measured, the next session only reads them."""
    settings = LayersSettings(num_trials=3)
    found = asked(settings, tmp_path / "journal")
    assert asked(settings, tmp_path / "journal") == []
    told = LayerSearch(settings, 0.4, tmp_path / "journal", "study").told()
    assert [recipe for recipe, _ in told] == found
    mean = sum(found[2].values.values()) / 4
    assert told[2][1] == pytest.approx((mean, mean**2), abs=1e-4)


def test_another_seed_asks_for_other_recipes(tmp_path: Path) -> None:
    """The seed decides what is drawn after the first."""
    one = asked(LayersSettings(num_trials=3), tmp_path / "one")
    two = asked(LayersSettings(num_trials=3, seed=1), tmp_path / "two")
    assert one[0] == two[0]
    assert one[1:] != two[1:]


def test_killed_between_two_writes_the_start_is_not_measured_twice(tmp_path: Path) -> None:
    """Where only the wish for the first recipe was written down, it is asked for once all the same."""
    settings = LayersSettings(num_trials=3)
    whole = asked(settings, tmp_path / "whole")
    search = LayerSearch(settings, 0.4, tmp_path / "parts", "study")
    search._study.enqueue_trial(dict.fromkeys(parts_of(settings), 0.4))
    assert asked(settings, tmp_path / "parts") == whole


def test_torn_journal_is_started_again(tmp_path: Path) -> None:
    """A half-written line is no end of the search: what was measured is in the units."""
    settings = LayersSettings(num_trials=2)
    whole = asked(settings, tmp_path / "journal")
    content = (tmp_path / "journal").read_bytes()
    (tmp_path / "journal").write_bytes(content[:-20])
    assert asked(settings, tmp_path / "journal")[-1] == whole[-1]
