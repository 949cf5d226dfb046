"""`backmerge check`: check whether a model is as safe as its base, for a team's CI."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backmerge.commands.options import (
    Accept,
    Keep,
    KeepMargin,
    Margin,
    MeasuringOptions,
    Out,
    command_line,
    with_groups,
)
from backmerge.commands.running import stoppable
from backmerge.errors import ConfigError, NotShownError
from backmerge.generation.quiet import quieten

if TYPE_CHECKING:
    from backmerge.api.calls import Checking


@with_groups
def check(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder, a hub id, or an adapter on the base. With --engine openai: its name on the server."
        ),
    ],
    *,
    out: Out,
    against: Annotated[
        str | None, typer.Option(help="The base: a folder or a hub id. With --engine openai: its name on the server.")
    ] = None,
    against_run: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --against: an earlier run that measured the base. Its prompts and judge are used. An "
            "adapter is put on that run's base."
        ),
    ] = None,
    measuring: MeasuringOptions,
    keep: Keep = None,
    keep_margin: KeepMargin = 0.05,
    margin: Margin = None,
    over_refusal_margin: Annotated[
        float, typer.Option(help="The same for over-refusal; reported, not part of the verdict.")
    ] = 0.05,
    accept: Accept = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Exit with code 3 unless the model is shown to be as safe as the base and to meet --keep.",
        ),
    ] = False,
) -> None:
    """Check a model's safety and abilities against its base. Use --strict as a gate in CI.

    Example: backmerge check merged --against meta-llama/Meta-Llama-3-8B-Instruct --safety advbench
    --over-refusal xstest --judge wildguard --strict --out runs/check

    Only lost abilities, without safety: backmerge check tuned --against BASE --keep german.jsonl --out forgot

    A served model, for example a quantised copy: backmerge check restored-q4 --against-run runs/check --engine openai
    --engine-option url=http://localhost:11434/v1 --out runs/check-q4
    """
    from backmerge import api
    from backmerge.pipeline.checking import plan_check
    from backmerge.reporting.check_summary import check_headline, print_check

    if against is not None and against_run is not None:
        raise ConfigError("--against-run already names the base", remedy="omit --against or --against-run.")
    arguments: Checking = {
        **measuring.arguments(),
        "against_run": against_run,
        "keep": keep or (),
        "keep_margin": keep_margin,
        "margin": margin,
        "over_refusal_margin": over_refusal_margin,
        "out": out,
        "settings": command_line({"accept": accept or []}, measuring.set_),
    }
    quieten()
    if measuring.dry_run:
        call = api.checking(model, against, **arguments)
        typer.echo(plan_check(call.settings, out, call.permissions, document=call.document))
        typer.echo("All inputs were checked. Nothing was written, and the hub was not contacted.")
        return
    with stoppable(out):
        results = api.check(model, against, **arguments)
    print_check(results, out)
    if strict and results.check.verdict != "restored":
        raise NotShownError(f"{check_headline(results)}, and --strict requires it to be shown")
