"""Turn mergekit's YAML into a recipe: settings that have an equivalent are kept, all others are refused by name.

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

Semantics are those of mergekit 0.1.5; a note says where ours differ on purpose.
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
from backmerge.merging.consensus import NO_WEIGHT
from backmerge.merging.mergekit.file import (
    DEFAULTS,
    NORMALISED,
    TASK_VECTORS,
    MergekitRecipe,
    Scope,
    Source,
    conditions_of,
    read_mergekit,
    refusal,
    scopes_of,
)
from backmerge.merging.method import find_method
from backmerge.merging.methods.anchored import RIDGE
from backmerge.merging.recipe import Variant
from backmerge.merging.schedule import REST, Layers, value_at

NEARLY_ONE = 1e-7  # allowed distance of a sum of weights from 1: about one float32 ulp


def variant_from_mergekit(path: Path, *, seed: int = 0) -> Variant:
    """Return the recipe of a mergekit file, with its models opened.

    Raises:
        ConfigError: the file has something that is not supported; the message names key and line.
        CheckpointError: a model cannot be opened.
    """
    return opened(read_mergekit(load_yaml(path)), seed=seed)


def opened(recipe: MergekitRecipe, *, seed: int = 0) -> Variant:
    """Return the variant that a recipe describes.

    Raises:
        ConfigError: its weights add up to zero, or its values are of another kind.
        CheckpointError: a model cannot be opened.
    """
    base = Checkpoint(locate_model(recipe.base))
    tuned = tuple(_opened(source, base) for source in recipe.sources)
    _check_distinct(recipe, base, tuned)
    layers = Layers(base.infos)
    _check_filters(recipe, layers)
    name, lam, parameters = _settings(recipe, layers)
    method = find_method(name)
    one = tuned[0] if len(tuned) == 1 and not method.takes_several else tuned
    source = recipe.tokenizer_from  # config and tokenizer as in mergekit, which copies the base's
    return Variant(
        base, one, method, lam, parameters, seed, dtype=recipe.dtype, config_from="base", tokenizer_from=source
    )


def _settings(recipe: MergekitRecipe, layers: Layers) -> tuple[str, Any, dict[str, Any]]:
    """Return our method, λ and parameters."""
    method, sources = recipe.method, recipe.sources

    def of(source: Source | None, name: str, default: Any = None) -> Any:
        return _setting(recipe, source, name, default)

    # Model Stock finds its own ratio; the mean of all models gives each of N + 1 the same weight
    alone = {"model_stock": 1.0, "arcee_fusion": 1.0, "karcher": len(sources) / (len(sources) + 1)}
    if method in alone:
        return method, alone[method], {}
    if method in ("slerp", "nearswap", "anchored"):
        return _of_one_tuned(method, of(None, "lambda" if method == "anchored" else "t"), of(None, "ridge", RIDGE))
    weights = [of(source, "weight") for source in sources]
    if method == "linear":
        return _linear(recipe, [of(recipe.base_source, "weight"), *weights], layers)
    if method in ("nuslerp", "multislerp"):
        return method, 1.0, {"weight": weights}
    lam, parameters = of(None, "lambda", 1.0), {"weight": weights}
    for name in TASK_VECTORS[method]:
        parameters[name] = [of(source, name, DEFAULTS[name]) for source in sources]
    normalize = bool(of(None, "normalize", method in NORMALISED))
    if method == "dare_linear":
        return _dare_linear(lam, parameters, normalize, layers)
    if method == "dare_ties":
        parameters["drop"] = _drops(parameters.pop("density"))
    return method, lam, {**parameters, "normalize": normalize}


def _of_one_tuned(method: str, given: Any, ridge: Any) -> tuple[str, Any, dict[str, Any]]:
    """Return the settings of methods with one number for base and tuned model: λ itself, or a limit."""
    if method == "nearswap":
        return method, 1.0, {"t": given}
    return method, given, {"ridge": ridge} if method == "anchored" else {}


def _drops(densities: Sequence[Any]) -> list[Any]:
    """Turn the share that mergekit keeps into our probability to drop; above 1 it keeps all, as 1 does."""
    return [_each_number(setting, lambda kept: max(0.0, 1 - kept)) for setting in densities]


def _linear(recipe: MergekitRecipe, weights: Sequence[Any], layers: Layers) -> tuple[str, Any, dict[str, Any]]:
    """Return weights as shares of their sum: λ for one tuned model, else the deltas' weights, which is the same sum.

    Args:
        recipe: Read for its `normalize`.
        weights: The base's, then those of the tuned models.
        layers: The base's layers.
    """
    is_normalized = bool(_setting(recipe, None, "normalize", default=True))

    def shares(name: str) -> list[float]:
        found = [float(value_at(weight, name, layers)) for weight in weights]
        total = sum(found)
        if is_normalized and abs(total) < NO_WEIGHT:
            raise ConfigError(
                f"{recipe.document.source}: the weights of '{name}' add up to zero, and are divided by their sum",
                remedy="give other weights; mergekit would write NaN.",
            )
        if not is_normalized and abs(total - 1) > NEARLY_ONE:
            place = next((scope.place for scope in recipe.parameters if "normalize" in scope.values), ())
            raise refusal(
                recipe.document,
                (*place, "normalize"),
                f"the weights of '{name}' add up to {total:g}, which would scale the model",
                "give weights that add up to 1, or remove 'normalize'.",
            )
        return [weight / total for weight in found[1:]]

    by_tensor = {name: shares(name) for name in layers.names}
    settings = [_simplified({name: found[at] for name, found in by_tensor.items()}) for at in range(len(weights) - 1)]
    if len(settings) == 1 and all(0 <= found[0] <= 1 for found in by_tensor.values()):
        return "linear", settings[0], {}
    return "task_arithmetic", 1.0, {"weight": settings}


def _dare_linear(
    lam: Any, parameters: Mapping[str, Any], normalize: bool, layers: Layers
) -> tuple[str, Any, dict[str, Any]]:
    """Make one model's weight part of λ, or divide it out; several become DELLA with epsilon 0, the same sum."""

    def share(name: str) -> float:
        weight = float(value_at(parameters["weight"][0], name, layers))
        return float(value_at(lam, name, layers)) * (1.0 if normalize and abs(weight) >= NO_WEIGHT else weight)

    if len(parameters["weight"]) == 1:
        by_tensor = {name: share(name) for name in layers.names}
        if all(0 <= found <= 1 for found in by_tensor.values()):
            return "dare_linear", _simplified(by_tensor), {"drop": _drops(parameters["density"])[0]}
    return "della_linear", lam, {**parameters, "epsilon": 0.0, "normalize": normalize}


def _simplified(by_tensor: Mapping[str, float]) -> Any:
    """Return one number if all tensors have the same."""
    values = set(by_tensor.values())
    return values.pop() if len(values) == 1 else dict(by_tensor)


def _setting(recipe: MergekitRecipe, source: Source | None, name: str, default: Any) -> Any:
    """Return a parameter as a setting of ours: a model's own value comes first, then the merge's.

    Raises:
        ConfigError: some tensors have no value, and there is no default.
    """
    scopes: list[Scope] = [*([source.parameters] if source else []), *recipe.parameters]
    rows: dict[str, Any] = {}
    for scope in scopes:
        if name not in scope.values:
            continue
        value = scope.values[name]
        for condition in conditions_of(value) or [{"value": value}]:
            if condition.get("filter") in (None, "*"):
                return {**rows, REST: condition["value"]} if rows else condition["value"]
            rows.setdefault(f"*{condition['filter']}*", condition["value"])
    if default is None:
        whose = f"of '{source.model}' " if source else "" if name != "weight" else f"of '{recipe.base}' "
        left = "is not given for every tensor: its filters leave some out" if rows else "is missing"
        raise refusal(
            recipe.document,
            source.place if source else ("parameters",),
            f"the parameter '{name}' {whose}{left}",
            f"give {name} a value without a filter, such as 0.5.",
        )
    return {**rows, REST: default} if rows else default


def _each_number(setting: Any, change: Callable[[float], float]) -> Any:
    if isinstance(setting, Mapping):
        return {key: _each_number(inner, change) for key, inner in setting.items()}
    return [change(value) for value in setting] if isinstance(setting, list) else change(setting)


def _opened(source: Source, base: Checkpoint) -> Weights:
    """Open a model, or an adapter on the base for mergekit's `BASE+LORA`."""
    return open_weights(locate_model(source.adapter or source.model), base)


def _check_distinct(recipe: MergekitRecipe, base: Weights, tuned: Sequence[Weights]) -> None:
    """Refuse a model that is listed twice under two names: it would count twice."""
    seen = {base.directory.resolve(): recipe.base}
    for source, weights in zip(recipe.sources, tuned, strict=True):
        directory = weights.directory.resolve()
        if directory in seen:
            raise refusal(
                recipe.document,
                (*source.place, "model"),
                f"'{source.model}' is the same model as '{seen[directory]}' and would count twice",
                "list each model once, and the base as in base_model.",
            )
        seen[directory] = source.model


def _check_filters(recipe: MergekitRecipe, layers: Layers) -> None:
    """Refuse a filter that is in no tensor's name: it is misspelt and would have no effect."""
    for scope in scopes_of(recipe):
        for name, value in scope.values.items():
            for number, condition in enumerate(conditions_of(value) or ()):
                wanted = condition.get("filter")
                if wanted in (None, "*") or any(wanted in tensor for tensor in layers.names):
                    continue
                row = () if isinstance(value, Mapping) else (number,)
                raise refusal(
                    recipe.document,
                    (*scope.place, name, *row, "filter"),
                    f"'{wanted}' is in no tensor's name; mergekit would ignore it",
                    f"names look like '{layers.names[0]}'.",
                )
