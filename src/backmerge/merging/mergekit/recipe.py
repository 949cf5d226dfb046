"""mergekit's YAML as a recipe of ours: what can be said in both is taken over, all else is refused by name.

    merge_method: ties
    base_model: meta-llama/Meta-Llama-3-8B-Instruct
    models:
      - model: ./tuned
        parameters: {weight: 1.0, density: [0.3, 0.6]}     # a gradient over the layers
    parameters:
      lambda:
        - {filter: mlp, value: 0.4}                         # a filter is part of a tensor's name
        - {value: 0.8}
    dtype: bfloat16

Semantics are those of mergekit 0.1.5; where ours differ on purpose, a note says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from backmerge.checkpoints.adapter import open_weights
from backmerge.checkpoints.locate import locate_model
from backmerge.checkpoints.reader import Checkpoint, Weights
from backmerge.config import load_yaml
from backmerge.errors import ConfigError
from backmerge.merging.mergekit.file import (
    DEFAULTS,
    NORMALISED,
    TASK_VECTORS,
    MergekitRecipe,
    Source,
    is_conditional,
    read_mergekit,
)
from backmerge.merging.recipe import Variant
from backmerge.merging.schedule import REST, Layers, value_at


def variant_from_mergekit(path: Path, *, seed: int = 0) -> Variant:
    """The recipe of a mergekit file, with its models opened.

    Raises:
        ConfigError: the file says something that cannot be had here; the message names key and line.
        CheckpointError: a model cannot be opened.
    """
    return opened(read_mergekit(load_yaml(path)), seed=seed)


def opened(recipe: MergekitRecipe, *, seed: int = 0) -> Variant:
    """The variant that a recipe describes.

    Raises:
        ConfigError: its weights add up to nothing, or its values are of another kind.
        CheckpointError: a model cannot be opened.
    """
    base = Checkpoint(locate_model(recipe.base))
    tuned = tuple(_opened(source.model, recipe.base, base) for source in recipe.sources)
    method, lam, parameters = _settings(recipe, Layers(base.infos))
    one = method in ("linear", "slerp", "dare_linear")
    return Variant(base, tuned[0] if one else tuned, method, lam, parameters, seed, dtype=recipe.dtype)


def _settings(recipe: MergekitRecipe, layers: Layers) -> tuple[str, Any, dict[str, Any]]:
    """Our method, λ and parameters."""
    method, sources, shared = recipe.method, recipe.sources, recipe.parameters

    def of(source: Source | None, name: str, default: Any) -> Any:
        return _setting([source.parameters if source else {}, shared], name, default)

    # Model Stock finds its own ratio; the mean of all models gives each of N + 1 the same weight
    alone = {"model_stock": 1.0, "karcher": len(sources) / (len(sources) + 1)}
    if method in alone:
        return method, alone[method], {}
    if method == "slerp":
        return method, of(None, "t", None), {}
    weights = [of(source, "weight", None) for source in sources]
    if method == "linear":
        return _linear(of(recipe.base_source, "weight", None), weights, layers)
    if method in ("nuslerp", "multislerp"):
        return method, 1.0, {"weight": weights}
    lam, parameters = of(None, "lambda", 1.0), {"weight": weights}
    for name in TASK_VECTORS[method]:
        settings = [of(source, name, DEFAULTS[name]) for source in sources]
        if method.startswith("dare"):
            parameters["drop"] = [_each_number(setting, lambda kept: max(0.0, 1 - kept)) for setting in settings]
        else:
            parameters[name] = settings
    normalize = bool(shared.get("normalize", method in NORMALISED))
    if method == "dare_linear":
        return _dare_linear(lam, parameters, normalize, layers)
    return method, lam, {**parameters, "normalize": normalize}


def _linear(base_weight: Any, weights: Sequence[Any], layers: Layers) -> tuple[str, Any, dict[str, Any]]:
    """Weights that add up to anything, as shares: of one tuned model λ, of several the weights of their deltas."""

    def shares(name: str) -> list[float]:
        found = [float(value_at(weight, name, layers)) for weight in (base_weight, *weights)]
        if abs(sum(found)) < 1e-8:
            raise ConfigError(f"the weights of '{name}' add up to zero", remedy="give others: they are normalised.")
        return [weight / sum(found) for weight in found[1:]]

    by_tensor = {name: shares(name) for name in layers.names}
    settings = [_simplified({name: found[place] for name, found in by_tensor.items()}) for place in range(len(weights))]
    if len(settings) == 1:
        return "linear", settings[0], {}
    return "task_arithmetic", 1.0, {"weight": settings}


def _dare_linear(
    lam: Any, parameters: Mapping[str, Any], normalize: bool, layers: Layers
) -> tuple[str, Any, dict[str, Any]]:
    """Of one model: its weight is part of λ, or divided out. Of several there is no sum without an election here."""
    if len(parameters["weight"]) > 1:
        raise ConfigError(
            "dare_linear takes one tuned model here",
            remedy="use dare_ties, or della_linear with epsilon near 0, for several.",
        )
    (weight,), (drop,) = parameters["weight"], parameters["drop"]
    shares = {
        name: float(value_at(lam, name, layers)) * (1.0 if normalize else float(value_at(weight, name, layers)))
        for name in layers.names
    }
    return "dare_linear", _simplified(shares), {"drop": drop}


def _simplified(by_tensor: Mapping[str, float]) -> Any:
    """One number where all tensors have the same."""
    values = set(by_tensor.values())
    return values.pop() if len(values) == 1 else dict(by_tensor)


def _setting(places: Sequence[Mapping[str, Any]], name: str, default: Any) -> Any:
    """A parameter as a setting of ours: the first place that has it counts; where its filters leave off, the next."""
    rows: dict[str, Any] = {}
    for place in places:
        if name not in place:
            continue
        value = place[name]
        conditions = [value] if isinstance(value, Mapping) else value if is_conditional(value) else None
        if conditions is None:
            return {**rows, REST: value} if rows else value
        for condition in conditions:
            pattern = condition.get("filter")
            if pattern in (None, "*"):
                return {**rows, REST: condition["value"]} if rows else condition["value"]
            rows.setdefault(f"*{pattern}*", condition["value"])
    if default is None:
        raise ConfigError(
            f"the parameter '{name}' is not given for every tensor" if rows else f"the parameter '{name}' is missing",
            remedy="give a value without a filter.",
        )
    return {**rows, REST: default} if rows else default


def _each_number(setting: Any, change: Callable[[float], float]) -> Any:
    if isinstance(setting, Mapping):
        return {key: _each_number(inner, change) for key, inner in setting.items()}
    return [change(value) for value in setting] if isinstance(setting, list) else change(setting)


def _opened(name: str, base_name: str, base: Checkpoint) -> Weights:
    """A model, or with mergekit's `BASE+LORA` an adapter."""
    model, plus, adapter = name.partition("+")
    if not plus:
        return open_weights(locate_model(name), base)
    if model != base_name:
        raise ConfigError(
            f"'{name}' is an adapter on '{model}', and the base is '{base_name}'",
            remedy="an adapter must be on the base; bake it first otherwise.",
        )
    return open_weights(locate_model(adapter), base)
