"""`backmerge inputs`: gather the inputs of a model's layers on guard prompts, for merges by direction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backmerge.commands.options import BatchSize, Device, Dtype, Plugins, Thinking, thinking_of
from backmerge.errors import ConfigError
from backmerge.generation.quiet import quieten
from backmerge.registry import Permissions


def inputs(
    model: Annotated[str, typer.Argument(help="The base, or with --task the tuned model: a folder or a hub id.")],
    out: Annotated[Path, typer.Option("--out", metavar="STATS", help="The file to write, e.g. guard.safetensors.")],
    guard: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE|own",
            help="Prompts on which the merge should act like the base. A benchmark (NAME=DATA to use your copy), a "
            "file with prompts, or own for prompts that the base writes.",
        ),
    ] = None,
    task: Annotated[
        Path | None,
        typer.Option(help="Instead of a guard: rows of the task, a .jsonl or .csv file with prompts and answers."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base of an adapter.")] = None,
    kind: Annotated[str | None, typer.Option(help="Kind of prompts in a file: harmful or ordinary.")] = None,
    num_prompts: Annotated[int, typer.Option(help="Use at most this many prompts.", min=1)] = 64,
    max_new_tokens: Annotated[
        int, typer.Option(help="Length of the model's own answers, in tokens; 0 uses only the prompts.", min=0)
    ] = 64,
    max_directions: Annotated[
        int, typer.Option(help="Number of directions to keep for each layer's inputs.", min=1)
    ] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the prompts that the model writes.", min=0)] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    thinking: Thinking = None,
    batch_size: BatchSize = 64,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file of input statistics.")] = False,
    allow_plugins: Plugins = False,
) -> None:
    """Gather statistics of layer inputs for --method anchored.

    `merge`, `evaluate` and `restore` (--guard) and experiment files (`guard`) gather these statistics themselves. Use
    this command to gather them once and reuse the file with --guard STATS.

    Example: backmerge inputs BASE --guard harmbench --out guard.safetensors

    For RegMean, on the task: backmerge inputs LORA --base BASE --task rows.jsonl --out task.safetensors
    """
    from backmerge.config import Document, validated
    from backmerge.generation.protocol import EngineSettings
    from backmerge.pipeline.guarding import InputsSettings, gather

    if (guard is None) is (task is None):
        raise ConfigError("no prompts given, or two kinds", remedy="give either --guard or --task.")
    if out.suffix != ".safetensors":
        raise ConfigError(
            f"--out {out} does not end in .safetensors", remedy=f"for example --out {out.stem}.safetensors."
        )
    values = {
        "model": model,
        "base": base,
        "guard": {
            "source": str(task) if guard is None else guard,
            "kind": kind,
            "num_prompts": num_prompts,
            "max_new_tokens": max_new_tokens,
            "max_directions": max_directions,
            "seed": seed,
        },
        "is_task": task is not None,
        "engine": EngineSettings(device=device, batch_size=batch_size).model_dump()
        | {"dtype": dtype, "thinking": thinking_of(thinking)},
    }
    settings = validated(InputsSettings, Document("the command line", values, {}))
    quieten()
    found = gather(settings, out, Permissions(allow_plugins), replace=force)
    typer.echo(f"{out}: {found.num_tokens:,} inputs of each layer, on {found.num_prompts} {found.kind} prompts")
