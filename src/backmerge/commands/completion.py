"""Shell completion of names from the registry; imports nothing slow."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar, get_args

from typer.models import ParameterInfo

from backmerge import registry

Command = TypeVar("Command", bound=Callable[..., Any])
Names = Callable[[], Iterable[str]]


def _literal(place: str) -> Names:
    """Return the values of a `Literal`, or of a settings field: `module:Object` or `module:Settings.field`."""

    def names() -> Iterable[str]:
        module, _, path = place.partition(":")
        kind, _, field = path.partition(".")
        found: Any = getattr(importlib.import_module(module), kind)
        return get_args(found.model_fields[field].annotation if field else found)

    return names


# by parameter name, which means the same in every command
COMPLETED: Mapping[str, Names] = {
    "method": lambda: registry.METHODS.entries,
    "judge": lambda: registry.JUDGES.entries,
    "second_judge": lambda: registry.JUDGES.entries,
    "engine": lambda: registry.ENGINES.entries,
    "safety": lambda: registry.BENCHMARKS.entries,
    "over_refusal": lambda: registry.BENCHMARKS.entries,
    "utility": lambda: registry.BENCHMARKS.entries,
    "keep": lambda: registry.BENCHMARKS.entries,
    "keep_against": lambda: ("base", "tuned"),
    "benchmark": lambda: registry.BENCHMARKS.entries,
    "task": lambda: registry.DATASETS.entries,
    "rule": _literal("backmerge.selection.settings:RuleName"),
    "search": _literal("backmerge.selection.settings:SearchSettings.name"),
    "executor": _literal("backmerge.execution.dispatch:ExecutionSettings.executor"),
    "dtype": lambda: ("float32", "bfloat16", "float16"),
    "kind": lambda: ("utility", "safety", "over_refusal"),
    "what": lambda: ("benchmarks", "judges", "methods", "tasks", "engines"),
    "as_": lambda: ("checkpoint", "adapter", "auto"),
    "rounding": lambda: ("nearest", "stochastic"),
}
LISTED = frozenset({"method"})  # options that take a list separated by commas


def with_names(command: Command) -> Command:
    """Add completion of names to the options of a command; pass the result to `app.command()`."""
    signature = inspect.signature(command, eval_str=True)
    parameters = dict(signature.parameters)
    for name, parameter in signature.parameters.items():
        annotation = parameter.annotation
        if name not in COMPLETED or getattr(annotation, "__metadata__", None) is None:
            continue
        kind, *metadata = get_args(annotation)
        # a copy, since commands share their option objects
        told = [_completing(one, name) if isinstance(one, ParameterInfo) else one for one in metadata]
        completed: Any = Annotated[(kind, *told)]
        command.__annotations__[name] = completed
        parameters[name] = parameter.replace(annotation=completed)
    # groups of options are in the signature alone
    command.__signature__ = signature.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]
    return command


def _completing(info: ParameterInfo, name: str) -> ParameterInfo:
    copied = copy.copy(info)
    copied.autocompletion = lambda incomplete: matching(name, incomplete)
    return copied


def matching(name: str, incomplete: str) -> list[str]:
    """Return the names that complete the typed text; after a comma if the option takes several."""
    before, comma, last = incomplete.rpartition(",") if name in LISTED else ("", "", incomplete)
    return [f"{before}{comma}{one}" for one in sorted(COMPLETED[name]()) if one.startswith(last)]
