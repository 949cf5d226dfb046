"""The definition of a merge method: a pure function of tensors, and its promises.

A method takes its data before the slash and its parameters after the star:

    def slerp(base, tuned, statistics, rng, /, *, lam: float) -> Tensor

Data that a method may take:

- `base`: the base's tensor, or a piece of it.
- `tuned`: the tuned model's tensor; a sequence, one for each, if the method takes several (`num_tuned`).
- `statistics`: the results of its `reductions` over the whole tensor, one array each.
- `rng`: the random numbers of these elements.
- `guard_inputs`, `task_inputs`: what is known about the inputs of the layer that the tensor belongs to, as
  `LayerInputs` (see `merging.inputs`); `None` for tensors without such statistics.
- any other name: the tensor of another model, which the recipe has under that name, such as `unaligned`.

Files of methods import torch only inside functions, so that reading parameters and merging adapters works without it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from backmerge.errors import MergeError
from backmerge.registry import METHODS, NOTHING_ALLOWED, Permissions, closest, code_of, resolve

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from backmerge.merging.inputs import LamByDirection
    from backmerge.merging.randomness import TensorRandom

    MergeFunction = Callable[..., Tensor]
    Reduction = Callable[..., np.ndarray]

Cut = Literal["elements", "rows", "tensor"]
INPUTS = ("guard_inputs", "task_inputs")  # the first is required, the second optional
NO_PARAMETERS: Mapping[str, Any] = MappingProxyType({})
OWN_DATA = ("base", "tuned", "statistics", "rng", *INPUTS)


class Survey(NamedTuple):
    """Measurements that a method needs of all tensors before it merges the first.

    Attributes:
        measure: `f(base, tuned, ...) -> float` for one whole tensor; takes the method's data, but no random numbers.
        settle: Turns the measures by tensor name and the given parameters into the parameters to merge with.
        is_needed: Whether these parameters need the survey at all.
    """

    measure: Callable[..., float]
    settle: Callable[[Mapping[str, float], Mapping[str, Any]], Mapping[str, Any]]
    is_needed: Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Method:
    """A merge method with its promises, which the conformance tests check.

    Attributes:
        name: The name in the table of methods, or the plugin's `package.module:function`.
        function: The merge of one piece; float32 in and out, unless `is_native` or `widens`.
        has_exact_endpoints: λ=0 gives the base and λ=1 the tuned model, bit for bit.
        is_idempotent: Merging a model with itself changes nothing, bit for bit.
        cut: How a tensor may be cut. "elements": anywhere, and pieces are flat; "rows": between rows, and pieces are
            (rows, columns), a vector being one row; "tensor": not at all, and the function sees its own shape.
        reductions: Sums that are needed before the function, each over the whole tensor:
            `f(base, tuned, ..., /, **parameters) -> float64 array`, given flat blocks of 2^20 elements whose results
            are added. Each gets as `statistics` the results of the earlier ones. λ is not among its parameters.
        num_tuned: How many tuned models it takes: the least, and the most if there is a limit.
        is_native: The function may get bfloat16 or float16 as stored. It then returns either that dtype, with exactly
            the bits of float32 arithmetic rounded once, or float32.
        widens: The function may get bfloat16 or float16 as stored, in parts. It returns what it returns for the same
            numbers in float32, but widens one tensor at a time, so that few are in memory at once.
        coefficients: For merges of the form base + Σ cᵢ·(tunedᵢ - base): `f(gram, /, **parameters) -> [c]`, where gram
            holds the inner products of the deltas, shape (tuned, tuned). If the tuned models are adapters, so is the
            merge.
        through_inputs: For merges of a layer of the form base + Σ cᵢ·Δᵢ·M, where M depends on its inputs or on the
            deltas: `f(guard_inputs, task_inputs, factors, /, **parameters) -> LamByDirection | None` (any of the three
            data), with M in place of the coefficients; `None` for layers in which `coefficients` hold. `factors` are
            the tuned models' LoRA factors. The merge of a LoRA is then one of the same rank. If a method takes inputs
            and a tensor has none, that tensor is merged elementwise.
        survey: For methods that decide on a tensor from measurements of all.
        max_lam: The largest λ.
        code: A hash of the file of a plugin, which answers depend on; empty for a method of the table.
    """

    name: str
    function: MergeFunction
    has_exact_endpoints: bool
    is_idempotent: bool
    cut: Cut = "elements"
    reductions: tuple[Reduction, ...] = ()
    num_tuned: tuple[int, int | None] = (1, 1)
    is_native: bool = False
    coefficients: Callable[..., Sequence[float]] | None = None
    survey: Survey | None = None
    max_lam: float = 1.0
    through_inputs: Callable[..., LamByDirection | None] | None = None
    widens: bool = False
    code: str = ""

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The keyword parameters by name, including λ if the method has one."""
        found = inspect.signature(self.function).parameters
        return {name: p for name, p in found.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @cached_property
    def data(self) -> tuple[str, ...]:
        """The names before the slash, in order."""
        return data_of(self.function)

    @property
    def extra_models(self) -> tuple[str, ...]:
        """Models that the method takes in addition to base and tuned, by their names in a recipe."""
        return tuple(name for name in self.data if name not in OWN_DATA)

    @property
    def optional_models(self) -> tuple[str, ...]:
        """The extra models that a recipe may omit."""
        found = inspect.signature(self.function).parameters
        return tuple(name for name in self.extra_models if "None" in str(found[name].annotation))

    @property
    def inputs(self) -> tuple[str, ...]:
        """The input statistics that the method takes."""
        return tuple(name for name in self.data if name in INPUTS)

    @property
    def takes_several(self) -> bool:
        """Return whether `tuned` is a sequence."""
        return self.num_tuned[1] != 1

    @property
    def has_lam(self) -> bool:
        """Return whether λ is among the parameters."""
        return "lam" in self.parameters

    def is_per_model(self, parameter: str) -> bool:
        """Return whether each tuned model has its own value, according to the annotation."""
        return str(self.parameters[parameter].annotation).startswith("Sequence")

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def __call__(
        self,
        base: Tensor,
        tuned: Tensor | Sequence[Tensor],
        rng: TensorRandom,
        /,
        extra: Mapping[str, Tensor] | None = None,
        **parameters: Any,
    ) -> Tensor:
        """Return the merged tensor, after its statistics: the whole method on tensors in memory.

        Args:
            base: Any shape.
            tuned: The same shape; several if the method takes several.
            rng: The random numbers of this tensor.
            extra: The tensors of the extra models.
            parameters: The method's own parameters.
        """
        from backmerge.merging.reductions import in_blocks

        given: dict[str, Any] = {"base": base, "tuned": tuned, "rng": rng, **(extra or {})}
        given["statistics"] = statistics = []
        unlamed = {name: value for name, value in parameters.items() if name != "lam"}
        for reduction in self.reductions:
            statistics += [sum(call(reduction, block, unlamed) for block in in_blocks(given))]
        shape = base.shape
        if self.cut == "rows":
            flat = (math.prod(shape[:-1]), shape[-1] if shape else 1)
            given |= {name: _reshaped(given[name], flat) for name in given if name not in ("statistics", "rng")}
        merged: Tensor = call(self.function, given, parameters)
        return merged.reshape(shape)


def check_inputs(method: Method, given: Collection[str]) -> None:
    """Refuse input statistics that the method does not take, and missing ones that it needs.

    Raises:
        MergeError: names the method, and the option.
    """
    unknown = sorted(set(given) - set(method.inputs))
    if unknown:
        raise MergeError(
            f"{method.name} takes no input statistics, but {unknown[0]} were given"
            if not method.inputs
            else f"{method.name} does not take the input statistics {unknown[0]}",
            remedy="remove the guard and the input statistics, or use the method anchored.",
        )
    if method.inputs and INPUTS[0] not in given:
        raise MergeError(
            f"{method.name} needs statistics of the base's inputs on guard prompts, but none were given",
            remedy="give a guard (--guard, or 'guard' next to 'method' in an experiment file): a benchmark, a file of "
            "prompts, a file written by `backmerge inputs`, or 'own' for prompts that the base writes.",
        )


def _reshaped(tensors: Any, shape: tuple[int, ...]) -> Any:
    if tensors is None:
        return None
    return [t.reshape(shape) for t in tensors] if isinstance(tensors, (list, tuple)) else tensors.reshape(shape)


def data_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The positional-only names of a function, in order."""
    found = inspect.signature(function).parameters.values()
    return tuple(p.name for p in found if p.kind is inspect.Parameter.POSITIONAL_ONLY)


def call(function: Callable[..., Any], given: Mapping[str, Any], parameters: Mapping[str, Any]) -> Any:
    """Call the function with the data that it names, and with those parameters that it takes."""
    signature = inspect.signature(function).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.values())
    kept = {name: value for name, value in parameters.items() if takes_all or name in signature}
    return function(*(given.get(name) for name in data_of(function)), **kept)


def merge_method(
    *,
    has_exact_endpoints: bool,
    is_idempotent: bool,
    cut: Cut = "elements",
    reductions: Sequence[Reduction] = (),
    num_tuned: tuple[int, int | None] = (1, 1),
    is_native: bool = False,
    coefficients: Callable[..., Sequence[float]] | None = None,
    survey: Survey | None = None,
    max_lam: float = 1.0,
    through_inputs: Callable[..., LamByDirection | None] | None = None,
    widens: bool = False,
) -> Callable[[MergeFunction], Method]:
    """Declare a function as a merge method; see `Method` for what each declaration means."""
    return lambda function: Method(
        function.__name__,
        function,
        has_exact_endpoints,
        is_idempotent,
        cut,
        tuple(reductions),
        num_tuned,
        is_native,
        coefficients,
        survey,
        max_lam,
        through_inputs,
        widens,
    )


def find_method(name: str, permissions: Permissions = NOTHING_ALLOWED) -> Method:
    """Return the method with that name.

    Raises:
        ConfigError: no method has that name.
        MergeError: a plugin's object was not made by `merge_method`.
    """
    found = resolve(METHODS, name, permissions)
    if not isinstance(found, Method):
        raise MergeError(f"'{name}' is not a merge method", remedy="declare it with @merge_method(...).")
    return found if found.name == name else replace(found, name=name, code=code_of(name))


def checked(
    method: Method,
    *,
    num_tuned: int = 1,
    models: Sequence[str] = (),
    inputs: Collection[str] = (),
    parameters: Mapping[str, Any] = NO_PARAMETERS,
) -> Method:
    """Return the method if it takes these models, input statistics and parameters, apart from λ.

    Raises:
        MergeError: it does not; the message names what it takes.
    """
    check_models(method, num_tuned, models)
    check_inputs(method, inputs)
    check_parameters(method, {**parameters, "lam": 0.5} if method.has_lam else parameters)
    return method


def check_parameters(method: Method, given: Mapping[str, Any]) -> None:
    """Refuse a parameter that the method does not have, and a missing one that it needs.

    Raises:
        MergeError: names the parameter and the known ones.
    """
    known = method.parameters
    for parameter in given:
        if parameter not in known:
            raise MergeError(
                f"{method.name} has no parameter '{parameter}'{closest(parameter, known)}",
                remedy=f"it takes: {', '.join(known) or 'none'}.",
            )
    for parameter, description in known.items():
        if description.default is inspect.Parameter.empty and parameter not in given:
            raise MergeError(f"{method.name} needs '{parameter}'", remedy=f"give {parameter}.")


def check_models(method: Method, num_tuned: int, extra: Sequence[str]) -> None:
    """Refuse too few or too many tuned models, and extra models that are missing or unknown.

    Raises:
        MergeError: names the method and what it takes.
    """
    least, most = method.num_tuned
    if num_tuned < least or (most is not None and num_tuned > most):
        takes = f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
        raise MergeError(
            f"{method.name} takes {takes} tuned model{'' if takes.endswith(' 1') else 's'}, but {num_tuned} "
            f"{'was' if num_tuned == 1 else 'were'} given",
            remedy="give that number; `backmerge methods` lists what each method takes.",
        )
    for model in extra:
        if model not in method.extra_models:
            raise MergeError(
                f"{method.name} takes no model named '{model}'{closest(model, method.extra_models)}",
                remedy=f"it takes: {', '.join(('base', 'tuned', *method.extra_models))}.",
            )
    for model in method.extra_models:
        if model not in extra and model not in method.optional_models:
            raise MergeError(
                f"{method.name} needs another model, '{model}': {method.summary}",
                remedy=f"give it: --model {model}=FOLDER.",
            )
