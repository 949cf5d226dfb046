"""`backmerge evaluate`: measure a model, or merges over λ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from backmerge.commands.options import (
    GuardOption,
    MeasuringOptions,
    MergedOptions,
    Out,
    command_line,
    numbers,
    with_groups,
)
from backmerge.commands.running import stoppable
from backmerge.generation.quiet import quieten

if TYPE_CHECKING:
    from backmerge.api.calls import Evaluating


@with_groups
def evaluate(
    model: Annotated[str, typer.Argument(help="A model, or an adapter with --base: a folder or a hub id.")],
    *,
    out: Out,
    base: Annotated[str | None, typer.Option(help="The base of the adapter or of the merges.")] = None,
    lam: Annotated[
        str | None, typer.Option(metavar="λ,...", help="Measure merges with --base at these λs, e.g. 0,0.4,1.")
    ] = None,
    method: Annotated[str, typer.Option(help="Merge method.")] = "linear",
    guard: GuardOption = None,
    merged: MergedOptions,
    measuring: MeasuringOptions,
) -> None:
    """Measure a model, an adapter, or merges over many λs. Takes benchmarks or your own files.

    Example: backmerge evaluate demo --safety demo-harmful --judge demo-rule --out runs/base

    Over λ: backmerge evaluate LORA --base BASE --lam 0,0.2,0.4,0.6,0.8,1 --safety advbench --over-refusal xstest
    --judge wildguard --engine vllm --out runs/sweep
    """
    from backmerge import api
    from backmerge.pipeline.single import plan_evaluation
    from backmerge.reporting.console import print_scores

    arguments: Evaluating = {
        **measuring.arguments(),
        "base": base,
        "lam": [] if lam is None else numbers("--lam", lam),
        "method": method,
        "guard": guard,
        "out": out,
        "settings": command_line(merged.values(), measuring.set_, base="--base"),
    }
    quieten()
    if measuring.dry_run:
        call = api.evaluating(model, **arguments)
        typer.echo(plan_evaluation(call.settings, out, call.permissions, document=call.document))
        typer.echo("All inputs were checked. Nothing was written, and the hub was not contacted.")
        return
    with stoppable(out):
        results = api.evaluate(model, **arguments)
    print_scores(results, out)
