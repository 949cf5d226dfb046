"""mergekit's YAML: what it says in our words, tensor for tensor, and what is refused by key and line."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backmerge.checkpoints.reader import Checkpoint
from backmerge.errors import ConfigError
from backmerge.merging.engine import merged_tensors
from backmerge.merging.mergekit.recipe import variant_from_mergekit
from backmerge.merging.method import find_method
from backmerge.merging.recipe import Variant
from backmerge.merging.schedule import Layers, value_at

Factory = Callable[..., Path]


@pytest.fixture
def models(make_model: Factory) -> dict[str, Path]:
    """A base and three tuned models."""
    return {name: make_model("llama", seed=seed) for seed, name in enumerate(("base", "one", "two", "three"))}


@pytest.fixture
def read(models: dict[str, Path], tmp_path: Path) -> Callable[[str], Variant]:
    """The variant of a YAML text, in which {base}, {one}, {two} and {three} stand for folders."""

    def read_text(text: str) -> Variant:
        for name, path in models.items():
            text = text.replace("{" + name + "}", str(path))
        (tmp_path / "mergekit.yml").write_text(text)
        return variant_from_mergekit(tmp_path / "mergekit.yml")

    return read_text


def at(setting: Any, name: str) -> Any:
    """A setting's value for a tensor of the tiny models."""
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    layers = [f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.up_proj")]
    return value_at(setting, name, Layers([*names, *layers]))


SLERP = """
merge_method: slerp
base_model: "{base}"
models:
  - model: "{base}"
  - model: "{one}"
parameters:
  t:
    - {filter: self_attn, value: [0, 1]}
    - {filter: mlp, value: 0.25}
    - {value: 0.5}
dtype: bfloat16
"""


def test_slerp_with_filters_and_gradients(read: Callable[[str], Variant], models: dict[str, Path]) -> None:
    """T is λ; a filter is part of a name, a gradient runs over the layers, and a value alone is for all others."""
    variant = read(SLERP)
    assert (variant.method.name, variant.dtype) == ("slerp", "BF16")
    assert [weights.directory for weights in (variant.base, *variant.tuned_models)] == [models["base"], models["one"]]
    values = {
        "model.layers.0.self_attn.q_proj.weight": 0.0,
        "model.layers.1.self_attn.q_proj.weight": 1.0,
        "model.layers.1.mlp.up_proj.weight": 0.25,
        "model.norm.weight": 0.5,
    }
    assert {name: at(variant.lam, name) for name in values} == values
    merged = dict(merged_tensors(variant))
    assert torch.equal(
        merged["model.layers.0.self_attn.q_proj.weight"],
        variant.base.tensor("model.layers.0.self_attn.q_proj.weight").bfloat16(),
    )


def test_linear_weights_are_shares(read: Callable[[str], Variant]) -> None:
    """Weights of 3 and 1 are λ = ¼, by tensor where they differ; of several models, task arithmetic on shares."""
    text = """
merge_method: linear
models:
  - {model: "{base}", parameters: {weight: 3}}
  - {model: "{one}", parameters: {weight: 1}}
"""
    variant = read(text)
    assert (variant.method.name, variant.lam, dict(variant.parameters)) == ("linear", 0.25, {})
    gradient = read(text.replace("{weight: 1}", "{weight: [1, 3]}"))
    assert at(gradient.lam, "model.layers.0.mlp.up_proj.weight") == 0.25
    assert at(gradient.lam, "model.layers.1.mlp.up_proj.weight") == 0.5
    several = read(text + '  - {model: "{two}", parameters: {weight: 4}}\n')
    assert (several.method.name, several.parameters["weight"]) == ("task_arithmetic", [0.125, 0.5])
    base, one, two = (weights.tensor("model.norm.weight") for weights in (several.base, *several.tuned_models))
    expected = (3 * base.double() + one.double() + 4 * two.double()) / 8
    assert torch.allclose(dict(merged_tensors(several))["model.norm.weight"].double(), expected, atol=1e-6)


def test_a_models_own_parameter_goes_before_the_merges(read: Callable[[str], Variant]) -> None:
    """What a model's filters leave open is taken from the merge's parameters, then from the default."""
    variant = read("""
merge_method: ties
base_model: "{base}"
models:
  - model: "{base}"
  - model: "{one}"
    parameters:
      weight: 0.7
      density: [{filter: mlp, value: 0.2}]
  - model: "{two}"
parameters: {weight: 0.5, density: [{filter: self_attn, value: 0.4}], lambda: 0.9, normalize: false}
""")
    assert (variant.method.name, variant.lam, variant.parameters["weight"]) == ("ties", 0.9, [0.7, 0.5])
    assert variant.parameters["normalize"] is False
    first, second = variant.parameters["density"]
    mlp, attention, norm = (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.norm.weight",
    )
    assert [at(first, name) for name in (mlp, attention, norm)] == [0.2, 0.4, 1.0]
    assert [at(second, name) for name in (mlp, attention, norm)] == [1.0, 0.4, 1.0]


GIVEN = {
    "task_arithmetic": ("{weight: 0.5}", "{lambda: 0.8}", {"weight": [0.5, 0.5], "normalize": False}, 0.8),
    "dare_ties": ("{weight: 0.5, density: 0.3}", "{}",
                  {"weight": [0.5, 0.5], "drop": [0.7, 0.7], "normalize": False}, 1.0),
    "della": ("{weight: 1, density: 0.5, epsilon: 0.1}", "{rescale: true}",
              {"weight": [1, 1], "density": [0.5, 0.5], "epsilon": [0.1, 0.1], "normalize": True}, 1.0),
    "breadcrumbs": ("{weight: 1, density: 0.5, gamma: 0.02}", "{int8_mask: true}",
                    {"weight": [1, 1], "density": [0.5, 0.5], "gamma": [0.02, 0.02], "normalize": False}, 1.0),
    "nuslerp": ("{weight: 2}", "{nuslerp_flatten: true}", {"weight": [2, 2]}, 1.0),
    "multislerp": ("{weight: 2}", "{}", {"weight": [2, 2]}, 1.0),
    "model_stock": ("{}", "{filter_wise: false}", {}, 1.0),
    "karcher": ("{}", "{tol: 1.0e-5}", {}, 2 / 3),
}  # fmt: skip


@pytest.mark.parametrize("method", GIVEN)
def test_every_method_in_our_words(read: Callable[[str], Variant], method: str) -> None:
    """Parameters and λ of each, and the merge goes through."""
    own, shared, parameters, lam = GIVEN[method]
    variant = read(f"""
merge_method: {method}
base_model: "{{base}}"
models:
  - {{model: "{{base}}"}}
  - {{model: "{{one}}", parameters: {own}}}
  - {{model: "{{two}}", parameters: {own}}}
parameters: {shared}
""")
    assert (variant.method.name, variant.lam) == (method, lam)
    found = dict(variant.parameters)
    assert found.keys() == parameters.keys()
    for name, value in parameters.items():
        assert found[name] == (pytest.approx(value) if isinstance(value, list) else value)
    assert len(dict(merged_tensors(variant))) == len(variant.base.infos)


def test_dare_of_one_model(read: Callable[[str], Variant]) -> None:
    """Its weight is part of λ, and divided out again where it is normalised."""
    text = """
merge_method: dare_linear
base_model: "{base}"
models: [{model: "{one}", parameters: {weight: 0.5, density: 0.25}}]
parameters: {lambda: 0.8}
"""
    variant = read(text)
    assert (variant.method.name, variant.lam, variant.parameters["drop"]) == ("dare_linear", 0.4, 0.75)
    assert read(text.replace("lambda: 0.8", "lambda: 0.8, normalize: true")).lam == 0.8


@pytest.mark.parametrize(
    ("method", "given", "parameters"), [("nearswap", "{t: 1.0e-3}", {"t": 1e-3}), ("arcee_fusion", "{}", {})]
)
def test_methods_without_a_lam_of_one_model(
    read: Callable[[str], Variant], method: str, given: str, parameters: dict[str, float]
) -> None:
    """What mergekit has no share for is taken whole, λ = 1; a second tuned model is refused, as there."""
    text = f"""
merge_method: {method}
base_model: "{{base}}"
models: [{{model: "{{one}}"}}]
parameters: {given}
"""
    variant = read(text)
    assert (variant.method.name, variant.lam, dict(variant.parameters)) == (method, 1.0, parameters)
    assert len(dict(merged_tensors(variant))) == len(variant.base.infos)
    with pytest.raises(ConfigError, match="takes 1"):
        read(text.replace("{one}", '{one}"}, {model: "{two}'))


def test_an_adapter_on_the_base(read: Callable[[str], Variant], models: dict[str, Path], make_adapter: Factory) -> None:
    """BASE+LORA is the adapter on our base; on another model it is refused."""
    adapter = make_adapter(models["base"], seed=1)
    text = """
merge_method: slerp
base_model: "{base}"
models: [{model: "{base}"}, {model: "ONE+LORA"}]
parameters: {t: 0.5}
"""
    variant = read(text.replace("ONE+LORA", f"{{base}}+{adapter}"))
    assert variant.tuned_models[0].directory == adapter
    with pytest.raises(ConfigError, match="an adapter must be on the base"):
        read(text.replace("ONE+LORA", f"{{one}}+{adapter}"))


def test_slices_of_whole_models(read: Callable[[str], Variant]) -> None:
    """One slice over all layers is the models themselves; a part of them is refused."""
    text = """
slices:
  - sources:
      - {model: "{base}", layer_range: [0, 2]}
      - {model: "{one}", layer_range: [0, 2]}
    parameters: {t: 0.3}
merge_method: slerp
base_model: "{base}"
tokenizer_source: base
chat_template: auto
"""
    assert read(text).lam == 0.3
    with pytest.raises(ConfigError, match=r"line 5: .*is not the whole of"):
        read(text.replace('"{one}", layer_range: [0, 2]', '"{one}", layer_range: [0, 1]'))


def test_the_result_is_that_of_our_own_words(read: Callable[[str], Variant], models: dict[str, Path]) -> None:
    """The same variant by hand gives the same tensors."""
    variant = replace(read(SLERP), dtype=None)
    table = {"*self_attn*": [0, 1], "*mlp*": 0.25, "rest": 0.5}
    by_hand = Variant(Checkpoint(models["base"]), Checkpoint(models["one"]), find_method("slerp"), table)
    for (name, found), (_, expected) in zip(merged_tensors(variant), merged_tensors(by_hand), strict=True):
        assert torch.equal(found, expected), name


CHANGES = {
    "another method": (
        "merge_method: slerp",
        "merge_method: passthrough",
        "line 2: 'merge_method': 'passthrough'",
    ),
    "misspelt method": ("merge_method: slerp", "merge_method: slrep", "did you mean 'slerp'"),
    "misspelt key": ("base_model:", "base_modle:", "line 3: 'base_modle': unknown key; did you mean 'base_model'"),
    "misspelt parameter": ("  t:", "  tt:", "line 8: 'parameters.tt': slerp has no such key"),
    "misspelt filter": ("{filter: mlp", "{fliter: mlp", "line 10: 'parameters.t.1.fliter'"),
    "no value": ("{value: 0.5}", "{filter: norm}", "has no 'value'"),
    "words": ("value: 0.25", "value: much", "'much' is not a number"),
    "no gradient": ("[0, 1]", "[0, x]", "is not a gradient"),
    "modules": ("dtype: bfloat16", "modules: {}", "'modules': merging modules"),
    "dtype": ("dtype: bfloat16", "dtype: float99", "'dtype': 'float99' is unknown"),
    "another tokenizer": ("dtype: bfloat16", "tokenizer_source: union", "'union' is not supported"),
    "another template": ("dtype: bfloat16", "chat_template: chatml", "give auto"),
    "no base": ('base_model: "{base}"', "", "needs a 'base_model'"),
    "one twice": ('- model: "{base}"', '- model: "{one}"', "is listed twice"),
    "no models": ('models:\n  - model: "{base}"\n  - model: "{one}"', "models: []", "not a list of models"),
    "base alone": ('  - model: "{one}"\n', "", "no model other than the base"),
    "a model's misspelt key": ('- model: "{one}"', '- {model: "{one}", paramters: {}}', "did you mean 'parameters'"),
    "dtype that is a list": ("dtype: bfloat16", "dtype: [bfloat16]", "line 12: 'dtype'"),
    "dtype behind out_dtype": (
        "dtype: bfloat16",
        "dtype: float99\nout_dtype: float32",
        "'dtype': 'float99' is unknown",
    ),
    "a truth for a number": ("value: 0.25", "value: true", "True is not a number"),
    "no number at all": ("value: 0.25", "value: .nan", "nan is not a number"),
    "a condition in another": ("value: 0.25", "value: [{value: 0.25}]", "is not a gradient"),
    "a filter in no name": ("filter: mlp", "filter: mpl", "line 10: 'parameters.t.1.filter': 'mpl' is in no tensor's"),
    "a glob as filter": ("filter: mlp", 'filter: "mlp*"', "'mlp*' is in no tensor's name"),
    "a number as filter": ("filter: mlp", "filter: 3", "not a part of a tensor's name"),
    "no method": ("merge_method: slerp", "", "'merge_method' is missing"),
    "a base of no name": ('base_model: "{base}"', "base_model: 3", "line 3: 'base_model': 3 is not a folder"),
    "an adapter as base": ('base_model: "{base}"', 'base_model: "{base}+x"', "is an adapter and cannot be the base"),
    "two adapters": ('- model: "{one}"', '- model: "{base}+x+y"', "more than one '+'"),
    "three models": (
        "parameters:\n",
        '  - model: "{two}"\nparameters:\n',
        "line 4: 'models': slerp takes 1 in addition",
    ),
    "the base by another name": ('- model: "{one}"', '- model: "{base}/"', "is the same model as"),
    "one parameter for all": (
        '- model: "{one}"',
        '- {model: "{one}", parameters: {t: 0.5}}',
        "line 6: 'models.1.parameters.t': all models share it",
    ),
    "no t": ("  t:\n", "  t: [{filter: norm, value: 1}]\nx:\n", "unknown key"),
    "t for some": ("    - {value: 0.5}\n", "", "line 7: 'parameters': the parameter 't' is not given for every tensor"),
    "a model of no name": ('- model: "{one}"', "- {model: 3}", "'model' is missing"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_unsupported_settings_are_named(read: Callable[[str], Variant], kind: str) -> None:
    """Each by its key, and where it stands in the file by its line."""
    before, after, words = CHANGES[kind]
    assert before in SLERP
    with pytest.raises(ConfigError) as caught:
        read(SLERP.replace(before, after, 1))
    assert words in caught.value.message + (caught.value.remedy or "")
    assert "mergekit.yml" in caught.value.message


@pytest.mark.parametrize(
    ("method", "parameters", "words"),
    [
        ("linear", "{weight: 1, normalize: false}", r"line 5: 'parameters.normalize'.*add up to 3"),
        ("model_stock", "{filter_wise: true}", "give False"),
        ("ties", "{rescale: true}", "give False"),
        ("dare_ties", "{rescale: false}", "give True"),
        ("ties", "{normalize: 0.5}", "expected true or false"),
        ("karcher", "{max_iter: 3}", "give 10"),
        ("task_arithmetic", "{density: 0.5}", "has no such key"),
    ],
)
def test_values_that_only_mergekit_has(
    read: Callable[[str], Variant], method: str, parameters: str, words: str
) -> None:
    """A parameter that would change the result there and cannot here is refused, not ignored."""
    with pytest.raises(ConfigError, match=words):
        read(f"""
merge_method: {method}
base_model: "{{base}}"
models: [{{model: "{{base}}"}}, {{model: "{{one}}"}}, {{model: "{{two}}"}}]
parameters: {parameters}
""")


def test_weights_that_add_up_to_nothing(read: Callable[[str], Variant]) -> None:
    """Mergekit writes NaN there."""
    with pytest.raises(ConfigError, match="add up to zero"):
        read("""
merge_method: linear
models:
  - {model: "{base}", parameters: {weight: 1}}
  - {model: "{one}", parameters: {weight: -1}}
""")


def test_numbers_that_yaml_takes_for_words(read: Callable[[str], Variant]) -> None:
    """To YAML 1.1 `1e-5` is a word; mergekit and its users take it for the number."""
    assert at(read(SLERP.replace("0.25", "25e-2")).lam, "model.layers.0.mlp.up_proj.weight") == 0.25
    variant = read("""
merge_method: karcher
models: [{model: "{base}"}, {model: "{one}"}]
parameters: {tol: 1e-5}
""")
    assert (variant.method.name, variant.lam) == ("karcher", 0.5)


def test_null_means_the_same_as_no_key(read: Callable[[str], Variant]) -> None:
    """As in mergekit, for every key that may be left away."""
    variant = read(SLERP + "slices: null\ntokenizer_source: null\nchat_template: null\nout_dtype: null\n")
    assert variant.dtype == "BF16"


def test_linear_beyond_both_ends(read: Callable[[str], Variant]) -> None:
    """Weights of -1 and 2 are no λ in [0, 1]; as a sum of deltas they are what mergekit makes of them."""
    variant = read("""
merge_method: linear
models:
  - {model: "{base}", parameters: {weight: -1}}
  - {model: "{one}", parameters: {weight: 2}}
""")
    assert (variant.method.name, variant.parameters["weight"]) == ("task_arithmetic", [2.0])
    base, one = (weights.tensor("model.norm.weight") for weights in (variant.base, *variant.tuned_models))
    merged = dict(merged_tensors(variant))["model.norm.weight"]
    assert torch.allclose(merged, 2 * one - base, atol=1e-6)  # some ulps of float32 at 2


def test_linear_that_is_not_normalised(read: Callable[[str], Variant]) -> None:
    """Is the same where the weights add up to 1; else it would scale the model, and is refused."""
    text = """
merge_method: linear
models:
  - {model: "{base}", parameters: {weight: 0.3}}
  - {model: "{one}", parameters: {weight: [0.7, 0.7]}}
parameters: {normalize: false}
"""
    assert read(text).lam == pytest.approx(0.7)
    with pytest.raises(ConfigError, match=r"line 6: 'parameters.normalize': .*add up to 1.1"):
        read(text.replace("[0.7, 0.7]", "[0.7, 0.8]"))


def test_dare_of_several_models(read: Callable[[str], Variant]) -> None:
    """Is DELLA without a range of probabilities; what is kept stands at δ/density, and a density of 1 keeps all."""
    text = """
merge_method: dare_linear
base_model: "{base}"
models:
  - {model: "{one}", parameters: {weight: 0.5, density: 0.25}}
  - {model: "{two}", parameters: {weight: 0.25}}
"""
    variant = read(text)
    assert (variant.method.name, variant.parameters["epsilon"]) == ("della_linear", 0.0)
    name = "model.layers.0.mlp.up_proj.weight"
    base, one, two = (weights.tensor(name) for weights in (variant.base, *variant.tuned_models))
    merged, rest = dict(merged_tensors(variant))[name], base + 0.25 * (two - base)
    is_kept = torch.isclose(merged, rest + 2 * (one - base), atol=1e-6)
    is_dropped = torch.isclose(merged, rest, atol=1e-6)
    assert bool((is_kept | is_dropped).all())
    # five sigmas of a share of 0.25 in 1536 elements
    assert float(is_kept.float().mean()) == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 1536) ** 0.5)


def test_dare_of_one_model_beyond_one(read: Callable[[str], Variant]) -> None:
    """A weight above 1 is no λ; a weight of zero stays zero where it is normalised."""
    text = """
merge_method: dare_linear
base_model: "{base}"
models: [{model: "{one}", parameters: {weight: 1.5, density: 0.5}}]
parameters: {normalize: false}
"""
    assert (read(text).method.name, read(text).parameters["weight"]) == ("della_linear", [1.5])
    normalized = read(text.replace("1.5", "[0, 1]").replace("false", "true"))
    assert [at(normalized.lam, f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1)] == [0.0, 1.0]


def test_a_slices_parameters_go_before_the_files(read: Callable[[str], Variant]) -> None:
    """What the filters of a slice leave open is taken from the file."""
    variant = read("""
merge_method: slerp
base_model: "{base}"
slices:
  - sources: [{model: "{base}", layer_range: [0, 2]}, {model: "{one}", layer_range: [0, 2]}]
    parameters: {t: [{filter: mlp, value: 0.2}]}
parameters: {t: 0.6}
""")
    assert at(variant.lam, "model.layers.0.mlp.up_proj.weight") == 0.2
    assert at(variant.lam, "model.norm.weight") == 0.6


@pytest.mark.parametrize("key", ["base_model", "residual_weight"])
def test_a_slices_own_keys(read: Callable[[str], Variant], key: str) -> None:
    """Known to mergekit, and refused by name."""
    with pytest.raises(ConfigError, match=f"line 4: 'slices.0.{key}': a slice cannot have its own"):
        read(f"""
merge_method: slerp
slices:
  - {{{key}: 1, sources: []}}
base_model: "{{base}}"
""")


def test_base_outside_the_sources_is_refused(read: Callable[[str], Variant]) -> None:
    """Mergekit leaves it out of the sum; counting it silently would give another model."""
    with pytest.raises(ConfigError, match=r"line 3: 'base_model': it is not among the sources"):
        read("""
merge_method: linear
base_model: "{base}"
slices: [{sources: [{model: "{one}", layer_range: [0, 2]}, {model: "{two}", layer_range: [0, 2]}]}]
parameters: {weight: 1}
""")


def test_a_missing_weight_is_named_with_its_model(read: Callable[[str], Variant], models: dict[str, Path]) -> None:
    """By the line of the model that has none."""
    with pytest.raises(ConfigError, match=rf"line 6: 'models.1': .*'weight' of '{models['two']}' is missing"):
        read("""
merge_method: ties
base_model: "{base}"
models:
  - {model: "{one}", parameters: {weight: 1}}
  - {model: "{two}"}
""")
