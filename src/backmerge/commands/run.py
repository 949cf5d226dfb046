"""`backmerge run`: an experiment file, carried out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backmerge.commands.options import CodeExecution, Plugins, SetOption, Strict
from backmerge.commands.running import run_document


def run(
    experiment: Annotated[Path, typer.Argument(help="The experiment file (YAML).")],
    out: Annotated[Path | None, typer.Option("--out", help="The run directory; default runs/FILE's name.")] = None,
    set_: SetOption = None,
    allow_plugins: Plugins = False,
    allow_code_execution: CodeExecution = False,
    strict: Strict = False,
) -> None:
    """Carry out an experiment file, or go on with it where it was.

    Example: backmerge run experiment.yaml --out runs/mine --set choice.margin=0.05
    """
    from backmerge.config import load_yaml

    place = out if out is not None else Path("runs") / experiment.stem
    run_document(
        load_yaml(experiment),
        set_ or (),
        place,
        allow_plugins=allow_plugins,
        allow_code_execution=allow_code_execution,
        strict=strict,
    )
