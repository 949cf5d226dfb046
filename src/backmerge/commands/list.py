"""`backmerge list`: what can be named, with one line each and what each needs."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from backmerge import registry
from backmerge.commands.options import check_choice

KINDS = ("benchmarks", "judges", "methods", "tasks", "engines")


def list_(
    what: Annotated[str, typer.Argument(help="benchmarks, judges, methods, tasks or engines.")],
) -> None:
    """Say what there is, with one line each and what each needs.

    Example: backmerge list benchmarks
    """
    check_choice("what to list", what, KINDS)
    if what == "methods":
        from backmerge.commands.methods import methods

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
    """The first line that a module says of itself; of what shares one with others, its own."""
    shared = [name for table in _tables() for name in table.values() if name.startswith(f"{module.__name__}:")]
    of = module if len(shared) == 1 else getattr(module, place.partition(":")[2])
    return (inspect.getdoc(of) or "").partition("\n")[0]


def _tables() -> list[Mapping[str, str]]:
    return [table.entries for table in (registry.BENCHMARKS, registry.JUDGES, registry.DATASETS, registry.ENGINES)]
