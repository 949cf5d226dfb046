"""A parameter's value for each tensor: one number, a gradient over the layers, or a table by module.

As plain data, in an experiment file or on the command line:

    0.6                                     the same everywhere
    [0.2, 0.5, 0.8]                         a gradient: 0.2 at the first layer, 0.8 at the last, linear between
    {attention: 0.2, "*.mlp.*": [0, 1], rest: 0.5}
                                            a table: the tensor's own name decides, else the first pattern that
                                            matches it

Patterns are shell globs over tensor names, or one of the names of `GROUPS`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from backmerge.errors import MergeError
from backmerge.merging.method import check_models, check_parameters
from backmerge.merging.recipe import Variant

REST = "rest"
GROUPS: Mapping[str, tuple[str, ...]] = {
    "attention": ("*attn.*", "*attention.*"),  # not post_attention_layernorm
    "mlp": ("*mlp.*", "*feed_forward.*", "*block_sparse_moe.*"),
    "norms": ("*norm*", "*ln_*"),
    "embeddings": ("*embed*", "*lm_head*", "*wte*", "*wpe*"),
}
LAYER = re.compile(r"(?P<prefix>.*?)\.(?P<index>\d+)\.")


class Layers:
    """The position of each tensor in the depth of a model.

    Args:
        names: Names of all its tensors.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self._last: dict[str, int] = {}
        for name in self.names:
            if match := LAYER.match(name):
                prefix, index = match["prefix"], int(match["index"])
                self._last[prefix] = max(self._last.get(prefix, 0), index)

    def depth(self, name: str) -> float:
        """Return 0 at the first layer, 1 at the last; 0 for tensors outside the layers and 1 for a single layer.

        This is mergekit's definition.
        """
        match = LAYER.match(name)
        if match is None:
            return 0.0
        last = self._last.get(match["prefix"], 0)
        return int(match["index"]) / last if last else 1.0


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern, a group's name or a glob, matches a tensor's name."""
    return pattern == REST or any(fnmatch.fnmatchcase(name, glob) for glob in GROUPS.get(pattern, (pattern,)))


def value_at(setting: Any, name: str, layers: Layers) -> Any:
    """Return the value of a setting for one tensor.

    Raises:
        MergeError: a table has no row for it, or a gradient contains something other than numbers.
    """
    if isinstance(setting, Mapping):
        if name in setting:  # a row for this very tensor
            return value_at(setting[name], name, layers)
        for pattern, inner in setting.items():
            if pattern != REST and matches(str(pattern), name):
                return value_at(inner, name, layers)
        if REST in setting:
            return value_at(setting[REST], name, layers)
        raise MergeError(
            f"no pattern of {list(setting)} matches the tensor '{name}'", remedy=f"add a row '{REST}' for all others."
        )
    if isinstance(setting, Sequence) and not isinstance(setting, str):
        return _interpolated(setting, layers.depth(name))
    return setting


def _interpolated(values: Sequence[Any], depth: float) -> float:
    if not values or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        raise MergeError(f"{list(values)} is not a gradient", remedy="a gradient is one or more numbers.")
    place = depth * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return float((1 - (place - low)) * values[low] + (place - low) * values[high])


def check_patterns(setting: Any, what: str, layers: Layers) -> None:
    """Refuse a table's pattern that matches no tensor: it is misspelt and would have no effect.

    Raises:
        MergeError: names the pattern and some tensors.
    """
    if isinstance(setting, Mapping):
        for pattern, inner in setting.items():
            if not any(matches(str(pattern), name) for name in layers.names):
                raise MergeError(
                    f"{what}: no tensor of the base matches '{pattern}'",
                    remedy=f"patterns are globs over names such as '{layers.names[0]}', or: {', '.join(GROUPS)}, rest.",
                )
            check_patterns(inner, what, layers)


def extremes(setting: Any) -> tuple[float, float]:
    """Return the least and the greatest number that a setting has for any tensor."""
    if isinstance(setting, Mapping):
        pairs = [extremes(inner) for inner in setting.values()]
    elif isinstance(setting, Sequence) and not isinstance(setting, str):
        pairs = [extremes(inner) for inner in setting]
    else:
        return float(setting), float(setting)
    return min(low for low, _ in pairs), max(high for _, high in pairs)


class Settings:
    """The parameters of variants that differ in λ alone.

    Args:
        variants: At least one.

    Attributes:
        given: Settings by parameter, without λ; a method's survey may replace them.

    Raises:
        MergeError: the method does not take these models or parameters, or λ is outside its range.
    """

    def __init__(self, variants: Sequence[Variant]) -> None:
        recipe = variants[0]
        self.method = method = recipe.method
        self.given: Mapping[str, Any] = recipe.parameters
        self._num_tuned = len(recipe.tuned_models)
        self._layers = Layers(recipe.base.infos)
        check_models(method, self._num_tuned, tuple(recipe.extra))
        if "lam" in recipe.parameters:
            raise MergeError("'lam' is among the method's other parameters", remedy="give λ separately.")
        lam = {"lam": recipe.lam} if method.has_lam else {}
        check_parameters(method, {**recipe.parameters, **lam})
        for variant in variants if method.has_lam else ():
            check_lam(variant.lam, method.max_lam)
            check_patterns(variant.lam, "λ", self._layers)
        for name, setting in recipe.parameters.items():
            for one in self._per_model(name, setting) if method.is_per_model(name) else [setting]:
                check_patterns(one, name, self._layers)

    def at(self, name: str, variant: Variant | None = None) -> dict[str, Any]:
        """Return the parameters' values for one tensor; without λ if no variant is given."""
        values: dict[str, Any] = {}
        for parameter, setting in self.given.items():
            if parameter in self.method.parameters and self.method.is_per_model(parameter):
                values[parameter] = tuple(
                    value_at(one, name, self._layers) for one in self._per_model(parameter, setting)
                )
            else:
                values[parameter] = value_at(setting, name, self._layers)
        if variant is not None and self.method.has_lam:
            values["lam"] = float(value_at(variant.lam, name, self._layers))
        return values

    def _per_model(self, name: str, setting: Any) -> list[Any]:
        """Return a setting for each tuned model."""
        if not isinstance(setting, list | tuple):
            return [setting] * self._num_tuned
        if len(setting) != self._num_tuned:
            raise MergeError(
                f"'{name}' has {len(setting)} values for {self._num_tuned} tuned models",
                remedy="give one for all, or one for each model.",
            )
        return list(setting)


def check_lam(lam: Any, most: float = 1.0) -> None:
    """Refuse a λ, or a setting of it, that is outside its range for any tensor.

    Raises:
        MergeError: it is outside its range.
    """
    try:
        low, high = extremes(lam)
    except (TypeError, ValueError) as error:
        raise MergeError(f"λ is {lam!r}, which is not a number", remedy="for example 0.5.") from error
    if not (low >= 0 and high <= most):
        raise MergeError(
            f"λ is {lam}, out of range: it is the share of the tuned side",
            remedy=f"give λ from 0 to {most:g}." if most < float("inf") else "give a λ of 0 or more.",
        )
