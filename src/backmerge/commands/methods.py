"""`backmerge methods`: what can be merged how, read from the methods themselves."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer


def methods(
    name: Annotated[str | None, typer.Argument(help="Tell all of this one.")] = None,
    allow_plugins: Annotated[
        bool, typer.Option("--allow-plugins", help="Import your own, given as package.module:function.")
    ] = False,
) -> None:
    """List the merge methods: what each does, how many tuned models it takes, its parameters and their defaults.

    Example: backmerge methods ties
    """
    from backmerge.merging.method import find_method
    from backmerge.registry import METHODS

    if name is not None:
        method = find_method(name, allow_plugins=allow_plugins)
        typer.echo(f"{name}: {_takes(method.num_tuned)}; {_parameters(method.parameters) or 'no parameters'}\n")
        typer.echo(inspect.getdoc(method.function))
        return
    for each in sorted(METHODS.entries):
        method = find_method(each)
        extra = [f"--model {model}=FOLDER" for model in method.extra_models]
        optional = [f"(optional: {model})" for model in method.optional_models]
        needs = ", ".join([_takes(method.num_tuned), *extra, *optional])
        typer.echo(f"{each:17} {method.summary}\n{'':17} {needs}; {_parameters(method.parameters) or 'no parameters'}")


def _takes(num_tuned: tuple[int, int | None]) -> str:
    least, most = num_tuned
    if least == most:
        return "one tuned model" if least == 1 else f"{least} tuned models"
    return f"{least} tuned models or more" if most is None else f"{least} to {most} tuned models"


def _parameters(parameters: object) -> str:
    assert isinstance(parameters, dict)
    empty = inspect.Parameter.empty
    return ", ".join(name if p.default is empty else f"{name}={p.default}" for name, p in parameters.items())
