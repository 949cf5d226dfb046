"""`backmerge demo`: the whole experiment on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backmerge.commands.options import Out, ReportTo, SetOption, Strict
from backmerge.commands.running import run_document


def demo(
    out: Out = Path("runs/demo"),
    fast: Annotated[bool, typer.Option("--fast", help="One seed and fewer λs.")] = False,
    set_: SetOption = None,
    report_to: ReportTo = None,
    strict: Strict = False,
) -> None:
    """Run the whole experiment on the tiny model that ships with backmerge; needs no network and no GPU.

    Fine-tunes it, which breaks its refusals; merges it back with its base over a grid of λ; chooses λ; confirms it on
    other prompts; and writes the merged model and a report.

    Example: backmerge demo --fast --out runs/try
    """
    from backmerge.config import load_yaml
    from backmerge.demo import EXPERIMENT, FAST

    run_document(
        load_yaml(EXPERIMENT), [*(FAST if fast else ()), *(set_ or ())], out, strict=strict, report_to=report_to or ()
    )
