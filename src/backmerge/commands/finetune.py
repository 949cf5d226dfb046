"""`backmerge finetune`: from an aligned model and data to a tuned model, as the paper makes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backmerge.commands.options import command_line
from backmerge.commands.quiet import quieten
from backmerge.errors import BackmergeError, ConfigError
from backmerge.registry import Permissions

if TYPE_CHECKING:
    from backmerge.benchmarks.protocol import Benchmark

SAFETY = ("advbench",)  # what the rows are compared with unless told otherwise


def finetune(
    base: Annotated[str, typer.Argument(help="The aligned model: a folder or a hub id.")],
    out: Annotated[Path, typer.Option("--out", help="Where the tuned model goes; OUT/seed-N with several seeds.")],
    task: Annotated[
        str | None,
        typer.Option(help="The paper's: reasoning, medical, code, tools; or another of `backmerge list tasks`."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|HUB-ID",
            help="Rows of your own: .jsonl, .csv or .parquet with messages, prompt and completion, or instruction, "
            "input and output. With --task: your own copy of its data.",
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COLUMN", help="Where a column goes by another name: prompt=question."),
    ] = None,
    num_examples: Annotated[int | None, typer.Option(help="Sample at most so many rows.")] = None,
    validation: Annotated[float, typer.Option(help="Share of the rows that is held out.")] = 0.1,
    system: Annotated[str | None, typer.Option(help='System prompt instead of the task\'s; "" for none.')] = None,
    seeds: Annotated[str, typer.Option(help="One tuned model for each; the paper's are 42,1024,48763.")] = "42",
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 3.0,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of epochs.")] = None,
    snapshot_steps: Annotated[
        int | None, typer.Option(help="Stop after so many, in the middle of the whole schedule; the paper's is 500.")
    ] = None,
    keep_every: Annotated[int | None, typer.Option(help="Also keep the model of each so many steps.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per step, over all devices together.")] = 8,
    micro_batch_size: Annotated[int | None, typer.Option(help="Examples at once, where memory is short.")] = None,
    learning_rate: Annotated[float, typer.Option(help="The peak.")] = 1e-4,
    cutoff: Annotated[int, typer.Option(help="Longest example, in tokens.")] = 1024,
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Of the LoRA; 8 if not given.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Of the LoRA: its delta is scaled by alpha / rank; 16 if not given.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Train all weights instead of a LoRA.")] = False,
    dora: Annotated[bool, typer.Option("--dora", help="Train each row's magnitude by itself (DoRA).")] = False,
    qlora: Annotated[bool, typer.Option("--qlora", help="Train on the base in 4 bits; needs bitsandbytes.")] = False,
    ema: Annotated[float | None, typer.Option(help="Average the weights over the steps with this decay.")] = None,
    safety: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Safety benchmarks that the rows are compared with; advbench if not given, none for no comparison.",
        ),
    ] = None,
    drop_overlap: Annotated[
        bool, typer.Option("--drop-overlap", help="Leave out rows that a safety benchmark asks too.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, or cpu.")] = "auto",
    report_to: Annotated[
        list[str] | None, typer.Option(help="Also send losses to tensorboard, wandb, mlflow or trackio.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, such as lora.dropout=0.1 or warmup=0."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the model that backmerge wrote at --out.")] = False,
    allow_plugins: Annotated[
        bool, typer.Option("--allow-plugins", help="Run your own code where a name says package.module:function.")
    ] = False,
) -> None:
    """Fine-tune a chat model, with the paper's settings unless told otherwise; writes an ordinary peft adapter.

    Stopped or killed, the same command goes on where it was. On several GPUs: accelerate launch -m backmerge finetune
    ...

    Example: backmerge finetune meta-llama/Meta-Llama-3-8B-Instruct --data mine.jsonl --out tuned

    As in the paper: backmerge finetune meta-llama/Meta-Llama-3-8B-Instruct --task code --snapshot-steps 500
    --seeds 42,1024,48763 --out tuned

    Then: backmerge restore BASE tuned/seed-* --utility mine-test.jsonl --safety advbench --out restored
    """
    from backmerge.config import validated, with_overrides
    from backmerge.finetuning.settings import FinetuneSettings

    if task is None and data is None:
        raise ConfigError("there is nothing to tune on", remedy="give --data FILE, or --task with one of the paper's.")
    of_lora = {"r": rank, "alpha": alpha, "dora": dora or None, "quantize": "nf4" if qlora else None}
    lora = {name: value for name, value in of_lora.items() if value is not None}
    if full and lora:
        raise ConfigError("--full trains no adapter", remedy="leave --rank, --alpha, --dora and --qlora away.")
    values: dict[str, Any] = {
        "dataset": task or data,
        "data": {
            "file": data if task else None,
            "columns": _columns(column or ()),
            "num_examples": num_examples,
            "validation": validation,
            "system": system,
            "drop_overlap": drop_overlap,
        },
        "seeds": _whole_numbers("--seeds", seeds),
        "epochs": epochs,
        "steps": steps,
        "snapshot_steps": snapshot_steps,
        "keep_every": keep_every,
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "learning_rate": learning_rate,
        "cutoff": cutoff,
        "mode": "full" if full else "lora",
        "lora": lora,
        "ema": ema,
        "device": device,
        "report_to": list(report_to or ()),
    }
    settings = validated(FinetuneSettings, with_overrides(command_line(values), set_ or ()))
    _carry_out(base, settings, out, safety, force=force, permissions=Permissions(allow_plugins))


def _carry_out(
    base_name: str,
    settings: Any,
    out: Path,
    safety: Sequence[str] | None,
    *,
    force: bool,
    permissions: Permissions,
) -> None:
    from backmerge.checkpoints.locate import locate_model
    from backmerge.checkpoints.reader import Checkpoint
    from backmerge.finetuning.overlap import load_for, with_notes
    from backmerge.finetuning.trainer import is_of_key, training_key
    from backmerge.outputs import check_apart, is_to_write, paths_read
    from backmerge.pipeline.tuning import tune_seeds
    from backmerge.progress import is_first_process, say

    quieten()
    base = Checkpoint(locate_model(base_name))
    places = {seed: out if len(settings.seeds) == 1 else out / f"seed-{seed}" for seed in settings.seeds}
    for place in places.values():
        check_apart(place, [base.directory, *paths_read(settings), *map(Path, safety or ())])
    training = {seed: load_for(base, settings, seed, permissions) for seed in settings.seeds}
    benchmarks = _benchmarks(safety, permissions)
    training = with_notes(training, benchmarks, is_dropped=settings.data.drop_overlap)
    for seed, place in places.items():
        key = training_key(base, training[seed], settings, seed)
        is_to_write(place, lambda place=place, key=key: is_of_key(place, key), force=force)  # type: ignore[misc]
    try:
        tune_seeds(base, base_name, settings, training, places, replace=force)
    except KeyboardInterrupt:
        say(f"Stopped. What is done is kept: the same command goes on with {out}.")
        raise
    if is_first_process():
        for place in places.values():
            typer.echo(place)


def _benchmarks(safety: Sequence[str] | None, permissions: Permissions) -> list[Benchmark]:
    """The safety benchmarks to compare with; of those that nobody asked for, what can be had."""
    from backmerge.benchmarks.catalogue import find_benchmark
    from backmerge.progress import say

    if safety is not None:
        return [find_benchmark(name, "safety", permissions) for name in safety if name != "none"]
    found = []
    for name in SAFETY:
        try:
            found.append(find_benchmark(name, "safety"))
        except BackmergeError as error:
            say(f"The rows are not compared with {name}: {error.message}. --safety FILE compares them with your copy.")
    return found


def _columns(pairs: Sequence[str]) -> dict[str, str]:
    columns = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not (name and equals and column):
            raise ConfigError(f"--column {pair}: expected NAME=COLUMN", remedy="such as --column prompt=question.")
        columns[name] = column
    return columns


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: expected whole numbers", remedy=f"such as {option} 42,1024.") from None
