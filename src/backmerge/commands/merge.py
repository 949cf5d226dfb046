"""`backmerge merge`: write merged models, in one pass for all λs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from backmerge.commands.options import (
    DTYPES,
    FORMS,
    ROUNDINGS,
    ConfigFrom,
    Force,
    GuardOption,
    MergedDtype,
    Method,
    OtherModels,
    Plugins,
    TokenizerFrom,
    Verify,
    check_choice,
    files_values,
    numbers,
    options_named,
    pairs,
)
from backmerge.errors import ConfigError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def merge(
    base: Annotated[str | None, typer.Argument(help="The aligned model: a folder or a hub id.")] = None,
    tuned: Annotated[list[str] | None, typer.Argument(help="Its tuned versions: checkpoints or LoRA adapters.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the merged model.")] = None,
    lam: Annotated[
        str | None,
        typer.Option(
            metavar="λ,...",
            help="λ, the share of the tuned side. Several values write OUT/lam-0.2 and so on in one pass. By default "
            "the method's own default, or 0.5.",
        ),
    ] = None,
    method: Method = "linear",
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=λ",
            help="Another λ for some tensors: attention, mlp, norms, embeddings, or a glob over names. 0.2:0.8 rises "
            "over the layers. May be repeated; the first match counts.",
        ),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A parameter of the method, e.g. drop=0.9 or weights=[0.7,0.3]."),
    ] = None,
    model: OtherModels = None,
    guard: GuardOption = None,
    task_inputs: Annotated[
        Path | None,
        typer.Option(
            metavar="STATS",
            help="For --method anchored: inputs of the tuned model on the task, from `backmerge inputs --task`.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Read models and method from a mergekit YAML file instead.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random methods and stochastic rounding.")] = 0,
    as_: Annotated[
        str,
        typer.Option(
            "--as",
            help="Form of the result: checkpoint; adapter, if one can represent the merge exactly; auto, an adapter if "
            "possible, else a checkpoint.",
        ),
    ] = "checkpoint",
    rank: Annotated[int | None, typer.Option(help="Compress the adapter to this rank and report the loss.")] = None,
    dtype: MergedDtype = None,
    rounding: Annotated[
        str, typer.Option(help="Rounding to the dtype: nearest, or stochastic (random, unbiased).")
    ] = "nearest",
    extra_rows: Annotated[
        str, typer.Option(help="Rows that tuning added to the vocabulary: error refuses them, tuned keeps them.")
    ] = "error",
    config_from: ConfigFrom = None,
    tokenizer_from: TokenizerFrom = None,
    allow_unrelated: Annotated[
        bool, typer.Option("--allow-unrelated", help="Merge even if TUNED does not look like it was tuned from BASE.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a file, e.g. 5GB or 500MB.")] = "5GB",
    sha256: Annotated[
        bool, typer.Option("--sha256", help="Also record the SHA-256 of the files; takes longer than merging.")
    ] = False,
    verify: Verify = True,
    force: Force = False,
    allow_plugins: Plugins = False,
) -> None:
    """Merge a tuned model with its base, without measuring. Writes a Hugging Face folder.

    With several tuned models, methods that take one (linear, slerp, dare_linear) merge each with the base, into
    OUT/NAME. Methods that take several (model_stock, ties, ...) merge all of them together.

    Example: backmerge merge BASE TUNED --lam 0.2,0.4,0.6,0.8 --out merged

    From a LoRA to a LoRA: backmerge merge BASE LORA --lam 0.4 --as adapter --out merged-lora

    Keep the base's behaviour on harmful requests: backmerge merge BASE LORA --method anchored
    --guard harmbench --lam 0.5 --as adapter --out merged

    A smaller λ for some tensors: backmerge merge BASE TUNED --lam 0.6 --where mlp=0.3 --where attention=0.2:0.8 --out
    merged

    From a mergekit file: backmerge merge --config mergekit.yml --out merged
    """
    if out is None:
        raise ConfigError("--out is missing: where should the merged model go?", remedy="for example --out merged.")
    check_choice("--as", as_, FORMS)
    check_choice("--rounding", rounding, ROUNDINGS)
    check_choice("--extra-rows", extra_rows, ("error", "tuned"))
    if dtype is not None:
        check_choice("--dtype", dtype, DTYPES)
    if config is not None:
        if base is not None or tuned or model:
            raise ConfigError("--config already names the models", remedy="omit BASE, TUNED and --model.")
        if lam is not None or where or param or method != "linear":
            raise ConfigError("--config already defines the merge", remedy="omit --lam, --method, --where and --param.")
    elif base is None or not tuned:
        raise ConfigError("BASE and TUNED are missing", remedy="backmerge merge BASE TUNED --out merged")

    from backmerge import api

    with options_named("--lam", "--rank"):
        places = api.merges(
            base,
            tuned or (),
            out,
            mergekit=config,
            lam=None if lam is None else numbers("--lam", lam),
            method=method,
            where={pattern: _setting(text) for pattern, text in pairs("--where", where or ())},
            parameters={name: _value("--param", text) for name, text in pairs("--param", param or ())},
            models=dict(pairs("--model", model or ())),
            guard=guard,
            task_inputs=task_inputs,
            seed=seed,
            form=as_,
            rank=rank,
            dtype=dtype,
            rounding=rounding,
            extra_rows=extra_rows,
            allow_unrelated=allow_unrelated,
            max_shard_bytes=_bytes("--max-shard-size", max_shard_size),
            sha256=sha256,
            verify=verify,
            replace=force,
            allow_plugins=allow_plugins,
            **files_values(config_from, tokenizer_from),
        )
    for place in places:
        typer.echo(place)


def _value(option: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{option} …={text}: the value is not YAML: {error}") from error


def _setting(text: str) -> Any:
    """Parse a λ, or a gradient over the layers: λs separated by colons."""
    try:
        values = [float(part) for part in text.split(":")]
    except ValueError:
        raise ConfigError(
            f"--where …={text}: expected a number, or several separated by colons", remedy="for example mlp=0.2:0.8"
        ) from None
    return values if len(values) > 1 else values[0]


def _bytes(option: str, text: str) -> int:
    for unit, factor in UNITS.items():
        number = text.upper().removesuffix(unit)
        if number != text.upper():
            try:
                size = int(float(number) * factor)
            except ValueError:
                break
            if size > 0:
                return size
    raise ConfigError(f"{option} {text}: expected a size", remedy="for example 5GB or 500MB.")
