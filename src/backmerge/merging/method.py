"""What a merge method is: a pure function of tensors, and what it promises."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backmerge.errors import MergeError
from backmerge.registry import METHODS, closest, resolve

if TYPE_CHECKING:
    from torch import Tensor

    from backmerge.merging.randomness import TensorRandom

    MergeFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Method:
    """A merge method with its promises, which the conformance tests hold it to.

    Attributes:
        function: `f(base, tuned, rng, /, *, ...)`: base of any shape, tuned of the same shape, the random numbers of
            this tensor; float32 in and out. After the star: the method's parameters.
        has_exact_endpoints: λ=0 gives the base and λ=1 the tuned model, bit for bit.
        is_idempotent: Merging a model with itself changes nothing, bit for bit.
    """

    function: MergeFunction
    has_exact_endpoints: bool
    is_idempotent: bool

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The keyword parameters by name, λ among them if the method has one."""
        found = inspect.signature(self.function).parameters
        return {name: p for name, p in found.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def __call__(self, base: Tensor, tuned: Tensor, rng: TensorRandom, /, **parameters: Any) -> Tensor:
        """The merged tensor."""
        return self.function(base, tuned, rng, **parameters)


def merge_method(*, has_exact_endpoints: bool, is_idempotent: bool) -> Callable[[MergeFunction], Method]:
    """Declare a function as a merge method."""
    return lambda function: Method(function, has_exact_endpoints, is_idempotent)


def find_method(name: str, *, allow_plugins: bool = False) -> Method:
    """The method of that name.

    Raises:
        ConfigError: there is none.
        MergeError: a plugin's object was not made by `merge_method`.
    """
    found = resolve(METHODS, name, allow_plugins=allow_plugins)
    if not isinstance(found, Method):
        raise MergeError(f"'{name}' is not a merge method", remedy="declare it with @merge_method(...).")
    return found


def check_parameters(method: Method, name: str, given: Mapping[str, Any]) -> None:
    """Refuse a parameter that the method does not have, or one that it needs and was not given.

    Raises:
        MergeError: names the parameter, and the ones that there are.
    """
    known = method.parameters
    for parameter in given:
        if parameter not in known:
            raise MergeError(
                f"{name} has no parameter '{parameter}'{closest(parameter, known)}",
                remedy=f"it takes: {', '.join(known) or 'none'}.",
            )
    for parameter, description in known.items():
        if description.default is inspect.Parameter.empty and parameter not in given:
            raise MergeError(f"{name} needs '{parameter}'", remedy=f"give {parameter}.")
