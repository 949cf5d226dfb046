"""`backmerge diff`: show whether a model was tuned from a base, and what tuning changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backmerge.commands.options import DTYPES, Base, MergedDtype, check_choice, numbers
from backmerge.errors import ConfigError

PLAIN_WIDTH = 120  # characters, if there is no terminal


def diff(
    base: Base,
    tuned: Annotated[str, typer.Argument(help="Its tuned version: a checkpoint or a LoRA adapter.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write diff.json, diff.png and diff.html to this folder.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON instead.")] = False,
    lam: Annotated[
        str, typer.Option(metavar="λ,...", help="λs at which to report the loss from rounding.")
    ] = "0.2,0.4,0.6,0.8",
    dtype: MergedDtype = None,
    sample: Annotated[
        float, typer.Option(help="Share of the elements to read. 0.01 takes seconds but gives no rank.")
    ] = 1.0,
) -> None:
    """Show whether TUNED was made from BASE and what changed.

    Reads every tensor once. Shows differences outside the weights (tokens, chat template, configuration), a heat map of
    the change by layer and module type, its effective rank, the distance of SLERP from Linear, and the share of the
    change that is lost when a merge is rounded. Rows of added tokens count as unchanged.

    Example: backmerge diff BASE TUNED --out compared

    In seconds, for large models: backmerge diff BASE TUNED --sample 0.01
    """
    lams = numbers("--lam", lam)
    if not all(0 < value <= 1 for value in lams):
        raise ConfigError(f"--lam {lam}: λ must be in (0, 1] here", remedy="for example 0.2,0.4,0.6,0.8.")
    if not 0 < sample <= 1:
        raise ConfigError(f"--sample {sample}: expected a share in (0, 1]", remedy="for example 0.01, or 1 for all.")
    if dtype is not None:
        check_choice("--dtype", dtype, DTYPES)

    from backmerge import api

    found = api.diff(base, tuned, out=out, lam=lams, dtype=dtype, sample=sample)
    if json_:
        typer.echo(found.to_json())
        return

    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    found.print(console)
    if out is not None:
        typer.echo(f"\nWritten: {out / 'diff.html'}, diff.png, diff.json")
