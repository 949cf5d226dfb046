"""Settings that differ from tensor to tensor: gradients over the layers, tables by module, and what is refused."""

import pytest

from backmerge.errors import MergeError
from backmerge.merging.schedule import GROUPS, Layers, check_patterns, extremes, matches, value_at

NAMES = (
    "model.embed_tokens.weight",
    *(
        f"model.layers.{layer}.{module}.weight"
        for layer in range(5)
        for module in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm", "post_attention_layernorm")
    ),
    "model.norm.weight",
    "lm_head.weight",
)
LAYERS = Layers(NAMES)


def test_a_number_is_the_same_everywhere() -> None:
    """Numbers, words and truths pass through."""
    for setting in (0.3, 2, True, "word"):
        assert {value_at(setting, name, LAYERS) for name in NAMES} == {setting}


@pytest.mark.parametrize(("layer", "value"), [(0, 0.0), (1, 0.5), (2, 1.0), (3, 0.8), (4, 0.6)])
def test_a_gradient_is_linear_between_its_values(layer: int, value: float) -> None:
    """Over five layers, three values lie at the first, the middle and the last."""
    name = f"model.layers.{layer}.mlp.up_proj.weight"
    assert value_at([0.0, 1.0, 0.6], name, LAYERS) == pytest.approx(value)


def test_tensors_outside_the_layers_are_at_the_start() -> None:
    """Embeddings, last norm and head take the first value, as in mergekit; a single layer takes the last."""
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert value_at([0.1, 0.9], name, LAYERS) == 0.1
    single = Layers(["h.0.attn.weight"])
    assert value_at([0.1, 0.9], "h.0.attn.weight", single) == 0.9


def test_the_first_row_that_matches_decides() -> None:
    """Groups, globs and the rest; a row may hold a gradient, or another table."""
    table = {"*q_proj*": [0.0, 1.0], "attention": 0.9, "mlp": {"*.0.*": 0.4, "rest": 0.5}, "rest": 0.2}
    found = {name: value_at(table, name, LAYERS) for name in NAMES}
    assert found["model.layers.1.self_attn.q_proj.weight"] == 0.25
    assert found["model.layers.0.mlp.up_proj.weight"] == 0.4
    assert found["model.layers.3.mlp.up_proj.weight"] == 0.5
    assert found["model.layers.3.post_attention_layernorm.weight"] == 0.2


def test_groups_are_modules() -> None:
    """A norm after attention is no attention; every tensor but none twice among embeddings, attention and mlp."""
    assert not matches("attention", "model.layers.0.post_attention_layernorm.weight")
    assert matches("norms", "model.layers.0.post_attention_layernorm.weight")
    for name in NAMES:
        assert sum(matches(group, name) for group in GROUPS) == 1


def test_what_no_row_matches_is_an_error() -> None:
    """Without a rest, a tensor that is left over is named."""
    with pytest.raises(MergeError, match=r"matches the tensor 'lm_head\.weight'"):
        value_at({"attention": 0.5}, "lm_head.weight", LAYERS)


def test_a_pattern_of_nothing_is_an_error() -> None:
    """A misspelt pattern would do nothing: it is refused, however deep."""
    check_patterns({"mlp": {"*.4.*": 1.0, "rest": 0}, "rest": 0}, "λ", LAYERS)
    for table in ({"mpl": 0.1, "rest": 0}, {"mlp": {"*.5.*": 1.0, "rest": 0}, "rest": 0}):
        with pytest.raises(MergeError, match="no tensor of the base matches"):
            check_patterns(table, "λ", LAYERS)


@pytest.mark.parametrize("gradient", [[], ["a"], [True, 0.5], [0.5, None]])
def test_a_gradient_is_of_numbers(gradient: list[object]) -> None:
    """Anything else is named."""
    with pytest.raises(MergeError, match="is not a gradient"):
        value_at(gradient, NAMES[1], LAYERS)


def test_extremes_are_found_anywhere() -> None:
    """The least and the greatest number, through tables and gradients."""
    assert extremes({"mlp": [0.2, 0.9], "rest": {"*": -0.5}}) == (-0.5, 0.9)
