"""`backmerge methods`: what can be merged how, read from the methods themselves."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Annotated

import typer

from backmerge.commands.options import Plugins
from backmerge.registry import Permissions


def methods(
    name: Annotated[str | None, typer.Argument(help="Tell all of this one.")] = None,
    allow_plugins: Plugins = False,
) -> None:
    """List the merge methods: what each does, how many tuned models it takes, its parameters and their defaults.

    Example: backmerge methods ties
    """
    from backmerge.merging.method import find_method
    from backmerge.registry import METHODS

    if name is not None:
        method = find_method(name, Permissions(allow_plugins))
        typer.echo(f"{name}: {_takes(method.num_tuned)}; {_parameters(method.parameters) or 'no parameters'}\n")
        typer.echo(inspect.getdoc(method.function))
        return
    for each in sorted(METHODS.entries):
        method = find_method(each)
        optional = dict.fromkeys(method.optional_models, " (or without)")
        extra = [f"--model {model}=FOLDER{optional.get(model, '')}" for model in method.extra_models]
        inputs = ["--guard NAME|FILE|own"] if method.inputs else []
        needs = ", ".join([_takes(method.num_tuned), *extra, *inputs])
        typer.echo(f"{each:17} {method.summary}\n{'':17} {needs}; {_parameters(method.parameters) or 'no parameters'}")


def _takes(num_tuned: tuple[int, int | None]) -> str:
    least, most = num_tuned
    if least == most:
        return "one tuned model" if least == 1 else f"{least} tuned models"
    few = "one tuned model" if least == 1 else f"{least} tuned models"
    return f"{few} or more" if most is None else f"{few} to {most}"


def _parameters(parameters: Mapping[str, inspect.Parameter]) -> str:
    return ", ".join(name + _default(parameter) for name, parameter in parameters.items())


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return ""
    # one value that every tuned model has
    value = parameter.default[0] if isinstance(parameter.default, tuple) else parameter.default
    return f"={value}"
