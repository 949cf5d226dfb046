"""The heat map of a change: where each tensor goes, the scale's steps, and the three ways to show it."""

import io
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from backmerge.merging.changes import Change
from backmerge.reporting.heatmap import (
    Heatmap,
    Table,
    figure,
    heatmap_of,
    limit_of,
    module_type,
    page,
    print_heatmap,
    step_of,
)


def change(norm: float) -> Change:
    """A tensor that moved by so much of its norm."""
    return Change(10, 0.0 if norm else 1.0, base_square=1.0, tuned_square=1.0, delta_square=norm**2)


@pytest.fixture
def heatmap() -> Heatmap:
    """Three layers of two modules, and a head."""
    changes = {
        f"model.layers.{layer}.{module}.weight": change(norm * (layer + 1))
        for layer in range(3)
        for module, norm in (("mlp.up_proj", 0.01), ("self_attn.q_proj", 0.0))
    }
    return heatmap_of({**changes, "lm_head.weight": change(0.06)})


def test_tensors_go_to_their_places(heatmap: Heatmap) -> None:
    """By module type and layer; attention comes before MLP, and tensors outside the layers apart."""
    (panel,) = heatmap.panels
    assert panel.prefix == "model.layers"
    assert panel.layers == (0, 1, 2)
    assert list(panel.rows) == ["self_attn.q_proj", "mlp.up_proj"]
    assert panel.rows["mlp.up_proj"] == pytest.approx((0.01, 0.02, 0.03))
    assert heatmap.outside == pytest.approx({"lm_head": 0.06})
    assert heatmap.top == pytest.approx(0.06)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "self_attn.q_proj"),
        ("model.layers.0.mlp.experts.3.w1.weight", "mlp.experts.*.w1"),
        ("model.layers.0.self_attn.q_proj.bias", "self_attn.q_proj.bias"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_a_module_type_has_no_layer(name: str, kind: str) -> None:
    """The layer's number goes, an expert's becomes a star."""
    assert module_type(name) == kind


def test_the_scale_halves_every_two_steps() -> None:
    """9 from the largest over √2 on, 7 half of that, 1 for all below, 0 for nothing, -1 for what is not a number."""
    assert [step_of(value, 8.0) for value in (8.0, 5.7, 5.6, 4.1, 3.9, 0.001, 0.0, math.nan, math.inf)] == [
        9, 9, 8, 8, 7, 1, 0, -1, 9,
    ]  # fmt: skip
    assert limit_of(9, 8.0) == 8.0
    assert limit_of(7, 8.0) == pytest.approx(4.0)


def test_a_plain_terminal_gets_digits(heatmap: Heatmap) -> None:
    """Without colours each cell is a digit of the scale, which is explained below."""
    stream = io.StringIO()
    print_heatmap(heatmap, Console(file=stream, width=80))
    lines = stream.getvalue().splitlines()
    (row,) = (line for line in lines if line.startswith("mlp.up_proj"))
    assert row.split()[1:] == ["4", "6", "7"]
    (row,) = (line for line in lines if line.startswith("self_attn.q_proj"))
    assert row.split()[1:] == [".", ".", "."]
    assert any("unchanged" in line for line in lines)
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_colours(heatmap: Heatmap) -> None:
    """Where there are enough of them, each cell is a block in its step's colour; elsewhere it is a digit."""
    shown = {}
    for colours in ("truecolor", "256", "standard"):
        stream = io.StringIO()
        print_heatmap(
            heatmap, Console(file=stream, width=80, force_terminal=True, color_system=colours, no_color=False)
        )
        (shown[colours],) = (line for line in stream.getvalue().splitlines() if line.startswith("mlp.up_proj"))
    assert shown["truecolor"].count("██") == shown["256"].count("██") == 3
    assert "\x1b[38;2;44;114;142m██" in shown["truecolor"]  # the fourth of the palette
    assert shown["standard"].split()[1:] == ["4", "6", "7"]


def test_many_layers_are_wrapped() -> None:
    """More layers than the terminal has room for go on below, none is lost, and no line is too long."""
    stream = io.StringIO()
    changes = {f"model.layers.{layer}.mlp.up_proj.weight": change(0.01) for layer in range(126)}
    print_heatmap(heatmap_of(changes), Console(file=stream, width=60))
    rows = [line.split()[1] for line in stream.getvalue().splitlines() if line.startswith("mlp.up_proj")]
    assert "".join(rows) == "9" * 126
    assert len(rows) > 1
    assert max(map(len, stream.getvalue().splitlines()[1:-1])) <= 60


def test_two_stacks_of_layers_are_distinguished() -> None:
    """A vision tower next to a language model has a separate panel, and a layer without a module leaves a gap."""
    changes = {f"{tower}.layers.{layer}.mlp.weight": change(0.01) for tower in ("text", "vision") for layer in (0, 1)}
    del changes["vision.layers.0.mlp.weight"]
    changes["vision.layers.0.norm.weight"] = change(math.nan)
    made = heatmap_of(changes)
    assert [panel.prefix for panel in made.panels] == ["text.layers", "vision.layers"]
    assert made.panels[1].rows["mlp"][0] is None
    stream = io.StringIO()
    print_heatmap(made, Console(file=stream, width=80))
    assert "!" in stream.getvalue()  # what is not a number is no step of the scale
    assert len(figure(made).axes) == 3  # and the scale


def test_experts_of_a_layer_are_one_cell() -> None:
    """Four experts, two of which did not change."""
    changes = {f"model.layers.0.mlp.experts.{n}.w1.weight": change(0.02 if n < 2 else 0.0) for n in range(4)}
    (panel,) = heatmap_of(changes).panels
    assert panel.rows["mlp.experts.*.w1"] == pytest.approx((0.02 / math.sqrt(2),))


def test_nothing_changed_is_drawn_all_the_same() -> None:
    """Without a largest value there is no scale."""
    made = heatmap_of({"model.layers.0.mlp.weight": change(0.0), "lm_head.weight": change(0.0)})
    assert made.top == 0
    figure(made)
    print_heatmap(made, Console(file=io.StringIO()))


def test_the_figure_has_a_cell_for_each(heatmap: Heatmap, tmp_path: Path) -> None:
    """It can be saved, and shows the rows by name."""
    made = figure(heatmap)
    labels = {text.get_text() for axes in made.axes for text in axes.get_yticklabels()}
    assert {"mlp.up_proj", "self_attn.q_proj", "lm_head"} <= labels
    made.savefig(tmp_path / "heat.png")
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


def test_page_is_safe_and_self_contained(heatmap: Heatmap) -> None:
    """What others named is escaped, nothing is loaded from elsewhere, and no script can be smuggled in."""
    evil = "<script>alert(1)</script>"
    document = {
        "base": evil, "tuned": "b", "dtype": "BF16", "sample": 1.0, "verdict": "child", "headline": evil,
        "reasons": [evil], "advice": [evil], "differences": [{"topic": "config", "line": evil}],
        "overall": {}, "module_types": {}, "tensors": {}, "backmerge": "0", "schema_version": 1,
    }  # fmt: skip
    text = page(document, heatmap, Table(("module",), ((evil,),), evil))
    assert evil not in text
    assert "Content-Security-Policy" in text
    assert "&lt;script&gt;" in text
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
