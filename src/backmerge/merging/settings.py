"""A recipe's parameters: checked before anything is read, then their values for each tensor; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from backmerge.errors import MergeError
from backmerge.merging.method import check_models, check_parameters
from backmerge.merging.recipe import Variant
from backmerge.merging.schedule import Layers, check_patterns, extremes, value_at


class Settings:
    """The parameters of variants that differ in λ alone.

    Args:
        variants: At least one.

    Attributes:
        given: Parameter to setting, λ excepted; a method's survey may put others in their place.

    Raises:
        MergeError: the method does not take these models or parameters, or λ leaves its range.
    """

    def __init__(self, variants: Sequence[Variant]) -> None:
        recipe = variants[0]
        self.method = method = recipe.method
        self.given: Mapping[str, Any] = recipe.parameters
        self._num_tuned = len(recipe.tuned_models)
        self._layers = Layers(recipe.base.infos)
        check_models(method, self._num_tuned, tuple(recipe.extra))
        if "lam" in recipe.parameters:
            raise MergeError("'lam' is among the method's other parameters", remedy="give λ by itself.")
        lam = {"lam": recipe.lam} if method.has_lam else {}
        check_parameters(method, {**recipe.parameters, **lam})
        for variant in variants if method.has_lam else ():
            check_lam(variant.lam, method.max_lam)
            check_patterns(variant.lam, "λ", self._layers)
        for name, setting in recipe.parameters.items():
            for one in self._per_model(name, setting) if method.is_per_model(name) else [setting]:
                check_patterns(one, name, self._layers)

    def at(self, name: str, variant: Variant | None = None) -> dict[str, Any]:
        """The parameters' values for one tensor; without λ if no variant is named."""
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
        """A setting for each tuned model."""
        if not isinstance(setting, list | tuple):
            return [setting] * self._num_tuned
        if len(setting) != self._num_tuned:
            raise MergeError(
                f"'{name}' has {len(setting)} values for {self._num_tuned} tuned models",
                remedy="give one for all, or one for each.",
            )
        return list(setting)


def check_lam(lam: Any, most: float = 1.0) -> None:
    """Refuse a λ, or a setting of it, that leaves its range anywhere.

    Raises:
        MergeError: it does.
    """
    try:
        low, high = extremes(lam)
    except (TypeError, ValueError) as error:
        raise MergeError(f"λ is {lam!r}, which is no number", remedy="such as 0.5.") from error
    if not (low >= 0 and high <= most):
        raise MergeError(
            f"λ is {lam}: it is the share of the tuned side",
            remedy=f"give λ from 0 to {most:g}." if most < float("inf") else "give λ from 0 on.",
        )
