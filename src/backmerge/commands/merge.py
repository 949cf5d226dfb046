"""`backmerge merge`: from models and a recipe to merged models on disk, in one pass for all λs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from backmerge.commands.options import (
    DTYPES,
    FORMS,
    ROUNDINGS,
    ConfigFrom,
    GuardOption,
    Plugins,
    TokenizerFrom,
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
    out: Annotated[Path | None, typer.Option("--out", help="Where the merged model goes.")] = None,
    lam: Annotated[
        str | None,
        typer.Option(
            help="λ, the share of the tuned side; several give OUT/lam-0.2 and so on, in one pass. The method's own "
            "default if not given, or 0.5."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="Merge method; `backmerge methods` tells of each.")] = "linear",
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=λ",
            help="Another λ for some tensors: attention, mlp, norms, embeddings, or a glob over names. 0.2:0.8 rises "
            "over the layers. May be given again; the first that matches counts.",
        ),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A parameter of the method, such as drop=0.9; [0.7, 0.3] for weights."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="One more model that the method asks for, such as unaligned=FOLDER."),
    ] = None,
    guard: GuardOption = None,
    task_inputs: Annotated[
        Path | None,
        typer.Option(
            metavar="STATS",
            help="For --method anchored: inputs of the tuned model on the task, from `backmerge inputs --task`.",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Take models and method from mergekit's YAML instead.")] = None,
    seed: Annotated[int, typer.Option(help="For what draws random numbers.")] = 0,
    as_: Annotated[
        str, typer.Option("--as", help="checkpoint; adapter, where the merge is one; auto: an adapter where it is one.")
    ] = "checkpoint",
    rank: Annotated[int | None, typer.Option(help="Compress the adapter to this rank; what is lost is told.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the result: float32, bfloat16, float16; else the base's.")
    ] = None,
    rounding: Annotated[str, typer.Option(help="nearest; or stochastic, which is right on average.")] = "nearest",
    extra_rows: Annotated[
        str, typer.Option(help="Rows that tuning added to the vocabulary: error, or tuned to take them over.")
    ] = "error",
    config_from: ConfigFrom = None,
    tokenizer_from: TokenizerFrom = None,
    allow_unrelated: Annotated[
        bool, typer.Option("--allow-unrelated", help="Merge models that do not look like parent and child.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Such as 5GB or 500MB.")] = "5GB",
    sha256: Annotated[
        bool, typer.Option("--sha256", help="Also record the files' SHA-256; slower than merging.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Of an adapter's merge: compare its logits with those of transformers and peft before it is kept.",
        ),
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace the model that backmerge wrote at --out.")] = False,
    allow_plugins: Plugins = False,
) -> None:
    """Merge, and nothing else: writes a Hugging Face directory, whole or not at all.

    Several tuned models are merged with the base one by one, into OUT/NAME each, by methods that take one (linear,
    slerp, dare_linear); all together by those that take several (model_stock, ties, ...).

    Example: backmerge merge BASE TUNED --lam 0.2,0.4,0.6,0.8 --out merged

    From a LoRA to a LoRA: backmerge merge BASE LORA --lam 0.4 --as adapter --out merged-lora

    Like the base on harmful requests, like the tuned model elsewhere: backmerge merge BASE LORA --method anchored
    --guard harmbench --lam 0.5 --as adapter --out merged

    Less of some tensors: backmerge merge BASE TUNED --lam 0.6 --where mlp=0.3 --where attention=0.2:0.8 --out merged

    From mergekit's file: backmerge merge --config mergekit.yml --out merged
    """
    if out is None:
        raise ConfigError("--out is missing: where shall the merged model go?", remedy="such as --out merged.")
    check_choice("--as", as_, FORMS)
    check_choice("--rounding", rounding, ROUNDINGS)
    check_choice("--extra-rows", extra_rows, ("error", "tuned"))
    if dtype is not None:
        check_choice("--dtype", dtype, DTYPES)
    if config is not None:
        if base is not None or tuned or model:
            raise ConfigError("--config names the models", remedy="leave BASE, TUNED and --model away.")
        if lam is not None or where or param or method != "linear":
            raise ConfigError("--config says how to merge", remedy="leave --lam, --method, --where and --param away.")
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
    """A λ, or with colons between, a gradient over the layers."""
    try:
        values = [float(part) for part in text.split(":")]
    except ValueError:
        raise ConfigError(
            f"--where …={text}: expected a number, or several with colons between", remedy="such as mlp=0.2:0.8"
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
    raise ConfigError(f"{option} {text}: expected a size", remedy="such as 5GB or 500MB.")
