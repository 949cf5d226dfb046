"""`backmerge finetune`: fine-tune an aligned model with the paper's settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from backmerge.commands.options import Base, Force, Plugins, command_line
from backmerge.commands.running import stoppable
from backmerge.errors import ConfigError
from backmerge.generation.quiet import quieten


def finetune(
    base: Base,
    out: Annotated[Path, typer.Option("--out", help="Folder for the tuned model; OUT/seed-N with several seeds.")],
    task: Annotated[
        str | None,
        typer.Option(
            help="A task of the paper (reasoning, medical, code, tools) or another one from `backmerge list tasks`."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|HUB-ID",
            help="Your own rows: .jsonl, .csv or .parquet with messages, prompt and completion, or instruction, "
            "input and output. With --task: your own copy of its data.",
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COLUMN", help="Map a column with another name, e.g. prompt=question."),
    ] = None,
    num_examples: Annotated[int | None, typer.Option(help="Sample at most this many rows.")] = None,
    validation: Annotated[float, typer.Option(help="Share of the rows to hold out.")] = 0.1,
    system: Annotated[str | None, typer.Option(help='System prompt instead of the task\'s; "" for none.')] = None,
    seeds: Annotated[
        str, typer.Option(metavar="SEED,...", help="Train one model per seed; the paper's seeds are 42,1024,48763.")
    ] = "42",
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 3.0,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of epochs.")] = None,
    snapshot_steps: Annotated[
        int | None,
        typer.Option(help="Stop after this many steps, in the middle of the full schedule; the paper uses 500."),
    ] = None,
    keep_every: Annotated[int | None, typer.Option(help="Also keep a snapshot every N steps.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per step, over all devices together.")] = 8,
    micro_batch_size: Annotated[int | None, typer.Option(help="Examples per forward pass, to save memory.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-4,
    cutoff: Annotated[int, typer.Option(help="Longest example, in tokens; longer ones are cut.")] = 1024,
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Rank of the LoRA; 8 by default.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Alpha of the LoRA, whose delta is scaled by alpha / rank; 16 by default.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Train all weights instead of a LoRA.")] = False,
    dora: Annotated[bool, typer.Option("--dora", help="Train the magnitude of each row separately (DoRA).")] = False,
    qlora: Annotated[bool, typer.Option("--qlora", help="Train on the base in 4 bits; needs bitsandbytes.")] = False,
    ema: Annotated[float | None, typer.Option(help="Write the moving average of the weights with this decay.")] = None,
    safety: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Safety benchmarks to compare the rows with; by default advbench, none for no comparison.",
        ),
    ] = None,
    drop_overlap: Annotated[
        bool, typer.Option("--drop-overlap", help="Leave out rows that are also in a safety benchmark.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto or cpu.")] = "auto",
    report_to: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Also send losses to tensorboard, wandb, mlflow or trackio."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, e.g. lora.dropout=0.1 or warmup=0."),
    ] = None,
    force: Force = False,
    allow_plugins: Plugins = False,
) -> None:
    """Fine-tune a chat model with the paper's settings. Writes an ordinary peft adapter.

    To continue an interrupted run, run the same command again. On several GPUs: accelerate launch -m backmerge finetune
    ...

    Example: backmerge finetune meta-llama/Meta-Llama-3-8B-Instruct --data mine.jsonl --out tuned

    As in the paper: backmerge finetune meta-llama/Meta-Llama-3-8B-Instruct --task code --snapshot-steps 500
    --seeds 42,1024,48763 --out tuned

    Then: backmerge restore BASE tuned/seed-* --utility mine-test.jsonl --safety advbench --out restored
    """
    from backmerge import api
    from backmerge.progress import is_first_process

    if full and (rank is not None or alpha is not None or dora or qlora):
        raise ConfigError("--full does not train an adapter", remedy="omit --rank, --alpha, --dora and --qlora.")
    quieten()
    with stoppable(out):
        places = api.finetune(
            base,
            data,
            out=out,
            task=task,
            columns=_columns(column or ()),
            num_examples=num_examples,
            validation=validation,
            system=system,
            seeds=_whole_numbers("--seeds", seeds),
            epochs=epochs,
            steps=steps,
            snapshot_steps=snapshot_steps,
            keep_every=keep_every,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            learning_rate=learning_rate,
            cutoff=cutoff,
            rank=rank,
            alpha=alpha,
            full=full,
            dora=dora,
            qlora=qlora,
            ema=ema,
            safety=safety,
            drop_overlap=drop_overlap,
            device=device,
            report_to=list(report_to or ()),
            replace=force,
            settings=command_line({}, set_),
            allow_plugins=allow_plugins,
        )
    if is_first_process():
        for place in places:
            typer.echo(place)


def _columns(pairs: Sequence[str]) -> dict[str, str]:
    columns = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not (name and equals and column):
            raise ConfigError(f"--column {pair}: expected NAME=COLUMN", remedy="for example --column prompt=question.")
        columns[name] = column
    return columns


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: expected whole numbers", remedy=f"for example {option} 42,1024.") from None
