"""`backmerge list`, `methods`, `doctor` and `schema`: describe the program and the machine."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from backmerge import registry
from backmerge.commands.options import Plugins, check_choice
from backmerge.registry import Permissions

KINDS = ("benchmarks", "judges", "methods", "tasks", "engines")


def list_(
    what: Annotated[str, typer.Argument(help="benchmarks, judges, methods, tasks or engines.")],
) -> None:
    """List benchmarks, judges, methods, tasks or engines.

    Example: backmerge list benchmarks
    """
    check_choice("what to list", what, KINDS)
    if what == "methods":
        methods()
        return
    table = {
        "benchmarks": registry.BENCHMARKS,
        "judges": registry.JUDGES,
        "tasks": registry.DATASETS,
        "engines": registry.ENGINES,
    }[what]
    for name, place in sorted(table.entries.items()):
        module: Any = importlib.import_module(place.partition(":")[0])
        needs = getattr(module, "NEEDS", "")
        typer.echo(f"{name:17} {_summary(module, place)}" + (f"\n{'':17} needs {needs}" if needs else ""))
    if what == "benchmarks":
        typer.echo(f"{'lm-eval:TASK':17} Any task of lm-evaluation-harness by its name there.")
        typer.echo(f"{'':17} needs pip install 'backmerge[lm-eval]'")
        typer.echo(f"{'FILE':17} Your own prompts: .jsonl or .csv.")


def _summary(module: Any, place: str) -> str:
    """Return the first line of the docstring of the module, or of the function if the module has several entries."""
    shared = [name for table in _tables() for name in table.values() if name.startswith(f"{module.__name__}:")]
    of = module if len(shared) == 1 else getattr(module, place.partition(":")[2])
    return (inspect.getdoc(of) or "").partition("\n")[0]


def _tables() -> list[Mapping[str, str]]:
    return [table.entries for table in (registry.BENCHMARKS, registry.JUDGES, registry.DATASETS, registry.ENGINES)]


def methods(
    name: Annotated[str | None, typer.Argument(help="Show the full documentation of this method.")] = None,
    allow_plugins: Plugins = False,
) -> None:
    """List the merge methods with their parameters and defaults.

    Example: backmerge methods ties
    """
    from backmerge.merging.method import find_method
    from backmerge.registry import METHODS

    if name is not None:
        method = find_method(name, Permissions(allow_plugins))
        typer.echo(f"{name}: {takes(method.num_tuned)}; {_parameters(method.parameters) or 'no parameters'}\n")
        typer.echo(inspect.getdoc(method.function))
        return
    for each in sorted(METHODS.entries):
        method = find_method(each)
        optional = dict.fromkeys(method.optional_models, " (or without)")
        extra = [f"--model {model}=FOLDER{optional.get(model, '')}" for model in method.extra_models]
        inputs = ["--guard NAME|FILE|own"] if method.inputs else []
        needs = ", ".join([takes(method.num_tuned), *extra, *inputs])
        typer.echo(f"{each:17} {method.summary}\n{'':17} {needs}; {_parameters(method.parameters) or 'no parameters'}")


def takes(num_tuned: tuple[int, int | None]) -> str:
    """Return how many tuned models a method takes, in words."""
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
    # a tuple repeats one value for every tuned model
    value = parameter.default[0] if isinstance(parameter.default, tuple) else parameter.default
    return f"={value}"


def doctor() -> None:
    """Show what this machine has and can run. Lists devices, memory, disk, extras and the sandbox.

    Example: backmerge doctor
    """
    from backmerge.doctor import examine

    for finding in examine():
        advice = f"  → {finding.advice}" if finding.advice else ""
        typer.echo(f"{finding.what:14} {finding.state}{advice}")


def schema() -> None:
    """Print the JSON schema of experiment files, for editors.

    Example: backmerge schema > experiment.schema.json
    """
    import json

    from backmerge.planning.settings import Experiment

    typer.echo(json.dumps(Experiment.model_json_schema(), indent=2))
