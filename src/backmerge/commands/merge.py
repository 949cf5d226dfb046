"""`backmerge merge`: from models and a recipe to merged models on disk, in one pass for all λs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backmerge.commands.options import (
    DTYPES,
    FORMS,
    ROUNDINGS,
    ConfigFrom,
    GuardOption,
    TokenizerFrom,
    check_choice,
    files_values,
)
from backmerge.errors import ConfigError
from backmerge.registry import Permissions

if TYPE_CHECKING:
    from backmerge.checkpoints.reader import Weights
    from backmerge.merging.method import Method
    from backmerge.merging.recipe import Variant
    from backmerge.merging.to_disk import Written

SAMPLE = 0.01  # of the elements, for a look before the merge
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
    allow_plugins: Annotated[
        bool, typer.Option("--allow-plugins", help="Run your own code where a name says package.module:function.")
    ] = False,
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
    shard_bytes = _bytes("--max-shard-size", max_shard_size)
    fixed: dict[str, Any] = {"rounding": rounding, **files_values(config_from, tokenizer_from)}
    if dtype is not None:
        fixed["dtype"] = DTYPES[dtype]
    permissions = Permissions(allow_plugins)
    if config is not None:
        if base is not None or tuned or model:
            raise ConfigError("--config names the models", remedy="leave BASE, TUNED and --model away.")
        if lam is not None or where or param or method != "linear":
            raise ConfigError("--config says how to merge", remedy="leave --lam, --method, --where and --param away.")
        recipe = {"": _from_mergekit(config, seed, fixed)}
        outputs = [{out: _with_inputs(recipe, guard, task_inputs, permissions)[""]}]
    else:
        if base is None or not tuned:
            raise ConfigError("BASE and TUNED are missing", remedy="backmerge merge BASE TUNED --out merged")
        from backmerge.merging.method import find_method

        found = find_method(method, permissions)
        recipes = recipes_of(base, tuned, found, model or (), extra_rows)
        parameters = {name: _value("--param", text) for name, text in _pairs("--param", param or ())}
        lams = lams_of(found, lam)
        recipes = _with_inputs(recipes, guard, task_inputs, permissions)
        outputs = _outputs(recipes, out, lams, where or (), parameters, {**fixed, "seed": seed})
    # all that can be refused is refused before the first is written
    are_adapters = [_is_adapter(together, as_) for together in outputs]
    if rank is not None and not all(are_adapters):
        raise ConfigError("--rank is for adapters", remedy="add --as adapter.")
    left = [
        _still_to_do(together, rank, config, is_adapter=is_adapter, force=force)
        for together, is_adapter in zip(outputs, are_adapters, strict=True)
    ]
    for together, is_adapter in zip(left, are_adapters, strict=True):
        if together and is_adapter:
            _write_adapters(together, rank, replace=force, verify=verify)
        elif together:
            _write_checkpoints(
                together,
                shard_bytes,
                sha256=sha256,
                allow_unrelated=allow_unrelated,
                replace=force,
                verify=verify,
            )


def recipes_of(
    base: str,
    tuned: Sequence[str],
    method: Method,
    models: Sequence[str],
    extra_rows: str,
) -> dict[str, Variant]:
    """What is merged with what, by the name of the folder that it goes to; several tuned models or one in each."""
    from backmerge.checkpoints.adapter import open_weights
    from backmerge.checkpoints.locate import locate_model, short_name
    from backmerge.checkpoints.reader import Checkpoint
    from backmerge.merging.recipe import Variant

    if len({short_name(name) for name in tuned}) < len(tuned):
        raise ConfigError("two tuned models have the same folder name", remedy="merge them one at a time.")
    takes_several = method.takes_several
    weights = Checkpoint(locate_model(base), unwrap=True)
    extra = {name: open_weights(locate_model(folder), weights) for name, folder in _pairs("--model", models)}
    if weights.wrapper is not None:
        typer.echo(f"Note: '{weights.wrapper}' is left out of the names of the merged tensors.", err=True)
    recipes: dict[str, Variant] = {}
    opened: dict[str, Weights] = {}
    for name in tuned:
        theirs = open_weights(locate_model(name), weights, unwrap=True)
        ours: Weights = weights
        if extra_rows == "tuned" and isinstance(theirs, Checkpoint):
            from backmerge.checkpoints.grown import GrownBase

            if takes_several:
                raise ConfigError(
                    "--extra-rows tuned goes with one tuned model", remedy="use linear, slerp or dare_linear."
                )
            ours = GrownBase(weights, theirs)
        if note := getattr(theirs, "note", None):
            typer.echo(f"Note: {note}.", err=True)
        opened[short_name(name)] = theirs
        recipes[short_name(name)] = Variant(ours, theirs, method, extra=extra)
    if takes_several:
        return {"": Variant(weights, tuple(opened.values()), method, extra=extra)}
    return recipes if len(recipes) > 1 else {"": next(iter(recipes.values()))}


def _with_inputs(
    recipes: Mapping[str, Variant], guard: str | None, task_inputs: Path | None, permissions: Permissions
) -> dict[str, Variant]:
    """The recipes with statistics of layers' inputs, gathered if they are not known yet.

    Raises:
        MergeError: the method takes none, or needs some.
        CheckpointError: a file of statistics is of another model.
    """
    from dataclasses import replace

    from backmerge.merging.inputs import InputStatistics
    from backmerge.merging.method import INPUTS, check_inputs

    names = dict(zip(INPUTS, (guard, task_inputs), strict=True))
    given = [name for name, value in names.items() if value is not None]
    recipe = next(iter(recipes.values()))
    check_inputs(recipe.method, given)
    if guard is None:
        return dict(recipes)
    # imported here: all other merges need neither benchmarks nor transformers
    from backmerge.benchmarks.guards import GuardSettings, find_guards
    from backmerge.commands.quiet import quieten
    from backmerge.generation.protocol import EngineSettings
    from backmerge.pipeline.guarding import gathered_statistics, of_model

    quieten()
    settings = GuardSettings(source=guard)
    guards, _ = find_guards([settings], (), permissions)
    of_base = gathered_statistics(guards, recipe.base, EngineSettings())[settings, recipe.base.fingerprint]
    found = {}
    for name, variant in recipes.items():
        known = {INPUTS[0]: of_base}
        if task_inputs is not None:
            known[INPUTS[1]] = of_model(InputStatistics(task_inputs), variant.tuned_models[0])
        found[name] = replace(variant, inputs=known)
    return found


def _outputs(
    recipes: Mapping[str, Variant],
    out: Path,
    lams: Sequence[float],
    where: Sequence[str],
    parameters: Mapping[str, Any],
    fixed: Mapping[str, Any],
) -> list[dict[Path, Variant]]:
    """Folders and what goes into them; each group differs in λ alone, and is written in one pass."""
    from dataclasses import replace

    from backmerge.merging.recipe import lam_name

    if not lams:
        raise ConfigError("--lam holds no number: there is nothing to merge", remedy="such as --lam 0.2,0.4,0.6")
    rows = {pattern: _setting(text) for pattern, text in _pairs("--where", where)}
    groups = []
    for name, recipe in recipes.items():
        place = out / name if name else out
        shared = replace(recipe, parameters=dict(parameters), **fixed)
        values = list(dict.fromkeys(lams))
        groups.append(
            {
                place / f"lam-{lam_name(lam)}" if len(values) > 1 else place: shared.at(
                    {**rows, "rest": lam} if rows else lam
                )
                for lam in values
            }
        )
    return groups


def lams_of(method: Method, given: str | None) -> list[float]:
    """The λs that are asked for, or the method's own."""
    if not method.has_lam:
        if given is not None:
            raise ConfigError(f"{method.name} has no λ: it finds its own ratio", remedy="leave --lam away.")
        return [1.0]
    if given is not None:
        lams = numbers("--lam", given)
        outside = next((lam for lam in lams if not 0 <= lam <= method.max_lam), None)
        if outside is not None:
            most = f"to {method.max_lam:g}" if method.max_lam < float("inf") else "on"
            raise ConfigError(f"--lam {outside:g}: λ is the share of the tuned side", remedy=f"give it from 0 {most}.")
        return lams
    default = method.parameters["lam"].default
    lam = 0.5 if default is method.parameters["lam"].empty else float(default)
    typer.echo(
        f"λ is {lam:g}, the default of {method.name}: --lam sets it, and `backmerge restore` chooses it.", err=True
    )
    return [lam]


def _from_mergekit(config: Path, seed: int, fixed: Mapping[str, Any]) -> Variant:
    from dataclasses import replace

    from backmerge.config import load_yaml
    from backmerge.merging.mergekit.file import read_mergekit
    from backmerge.merging.mergekit.recipe import opened

    recipe = read_mergekit(load_yaml(config))
    for note in recipe.notes:
        typer.echo(f"Note: {note}.", err=True)
    return replace(opened(recipe, seed=seed), **fixed)


def _still_to_do(
    outputs: Mapping[Path, Variant], rank: int | None, config: Path | None, *, is_adapter: bool, force: bool
) -> dict[Path, Variant]:
    """Without what is there already, made by the same recipe from the same models.

    Raises:
        RunError: something else is there, it is damaged, or it overlaps what is read.
    """
    from backmerge.outputs import check_apart, damage_of, is_to_write

    left: dict[Path, Variant] = {}
    for target, variant in outputs.items():
        models = (variant.base, *variant.tuned_models, *variant.extra.values())
        files = [*filter(None, [config]), *(statistics.path for statistics in variant.inputs.values())]
        check_apart(target, [*(path for weights in models for path in places_of(weights)), *files])
        is_same = partial(_is_made_by, target, variant, rank, is_adapter=is_adapter)
        if not is_to_write(target, is_same, damage_of if is_adapter else _damage_of_merged, force=force):
            typer.echo(f"{target} is there already, from the same models by the same recipe.", err=True)
            typer.echo(target)
            continue
        left[target] = variant
    return left


def _damage_of_merged(target: Path) -> str | None:
    from backmerge.merging.to_disk import damage_of_merged  # imports torch, which adapters do without

    return damage_of_merged(target)


def places_of(weights: Weights) -> list[Path]:
    """Return the folders that weights are read from: an adapter's own, its base's, and that which its config names."""
    from backmerge.checkpoints.adapter import AdapterOnBase

    places = [weights.directory, weights.companions]
    named = weights.config.base_model_name_or_path if isinstance(weights, AdapterOnBase) else None
    if named and os.path.isdir(named):  # noqa: PTH112 - Path's own raises where a name is too long
        places.append(Path(named))
    return places


def _is_made_by(target: Path, variant: Variant, rank: int | None, *, is_adapter: bool) -> bool:
    """Whether a folder holds a merge by this recipe; the models' fingerprints are taken only if all else agrees."""
    from backmerge.checkpoints.reader import CARD, read_json

    card = read_json(target / CARD)
    recipe = card.get("recipe")
    if not isinstance(recipe, dict) or recipe.get("method") != variant.method.name or recipe.get("lam") != variant.lam:
        return False
    if is_adapter is not (card.get("realisation") == "adapter"):
        return False
    if not is_adapter:
        return bool(recipe == variant.identity)
    from backmerge.merging.lowrank import adapter_identity

    is_compressed = "recompression" in card
    return recipe == adapter_identity(variant) and (card.get("rank") == rank if rank is not None else not is_compressed)


def _is_adapter(outputs: Mapping[Path, Variant], as_: str) -> bool:
    if as_ == "checkpoint":
        return False
    from backmerge.merging.lowrank import adapter_obstacle

    obstacle = next((found for variant in outputs.values() if (found := adapter_obstacle(variant))), None)
    if obstacle is not None and as_ == "adapter":
        raise ConfigError(f"this merge is no adapter: {obstacle}", remedy="write it whole: --as checkpoint.")
    return obstacle is None


def _verifier(outputs: Mapping[Path, Variant]) -> Callable[[Path, Variant], None] | None:
    """What checks a merge of adapters; nothing of checkpoints alone, for which transformers is not imported."""
    from backmerge.checkpoints.adapter import AdapterOnBase

    tuned = next(iter(outputs.values())).tuned_models
    if not any(isinstance(weights, AdapterOnBase) for weights in tuned):
        return None
    from backmerge.commands.quiet import quieten
    from backmerge.generation.verification import verify_written

    quieten()
    return verify_written


def _write_adapters(outputs: Mapping[Path, Variant], rank: int | None, *, replace: bool, verify: bool) -> None:
    from backmerge.merging.lowrank import write_adapters

    check = _verifier(outputs) if verify and rank is None else None
    for written in write_adapters(outputs, rank=rank, replace=replace, verify=check):
        typer.echo(written.directory)
        _write_card(written.directory, outputs[written.directory], is_adapter=True)


def _write_checkpoints(
    outputs: Mapping[Path, Variant],
    shard_bytes: int,
    *,
    sha256: bool,
    allow_unrelated: bool,
    replace: bool,
    verify: bool,
) -> None:
    from backmerge.merging.allocator import keep_freed_memory
    from backmerge.merging.to_disk import write_all
    from backmerge.progress import bar

    keep_freed_memory()

    variant = next(iter(outputs.values()))
    # before the weights are written: a link that leads out of the model is refused here
    for line in _differing_files(variant):
        typer.echo(f"Note: {line}.", err=True)
    if not allow_unrelated:
        check_related(variant)
    total = sum(info.num_elements for info in variant.base.infos.values())
    with bar("Merging", total) as advance:
        written = write_all(
            outputs,
            max_shard_bytes=shard_bytes,
            sha256=sha256,
            replace=replace,
            advance=advance,
            verify=_verifier(outputs) if verify else None,
        )
    for one, variant in zip(written, outputs.values(), strict=True):
        typer.echo(one.directory)
        _tell_rounding(one, variant)
        _write_card(one.directory, variant, is_adapter=False, rounding_loss=one.rounding_loss)


def _write_card(directory: Path, variant: Variant, *, is_adapter: bool, rounding_loss: float | None = None) -> None:
    """Write README.md, which says what was merged and that its safety was not measured."""
    from backmerge.reporting.merge_card import unmeasured_card
    from backmerge.runs import write_whole

    card = unmeasured_card(directory.name, variant, is_adapter=is_adapter, rounding_loss=rounding_loss)
    write_whole(directory / "README.md", card)


def _tell_rounding(written: Written, variant: Variant) -> None:
    """Print how much of the change the checkpoint holds, and warn if rounding lost much of it."""
    from backmerge.merging.rounding import REMEDIES, rounding_line
    from backmerge.merging.served import served_dtype

    if written.rounding_loss is not None:
        remedies = REMEDIES if variant.rounding == "nearest" else ""
        line = rounding_line(written.directory.name, written.rounding_loss, served_dtype(variant), remedies)
        typer.echo(line, err=True)


def _differing_files(variant: Variant) -> Iterator[str]:
    """What config, tokenizer and chat template differ in, and whose files the merged model has."""
    from backmerge.checkpoints.differences import differences

    for tuned in variant.tuned_models:
        for topic, line in differences(variant.base, tuned):
            if topic not in ("adapter", "tensors"):
                yield f"{topic} of {tuned.directory.name} differs ({line})"
    yield from variant.companions.notes
    if len(variant.tuned_models) > 1:
        first = variant.tuned_models[0].directory.name
        yield f"of the tuned models' files the first one's count as the tuned side's, {first}"


def check_related(variant: Variant) -> None:
    """Refuse models that do not look like parent and child, from 1 % of their elements.

    Raises:
        MergeError: they are too far apart for fine-tuning.
    """
    from backmerge.checkpoints.adapter import AdapterOnBase
    from backmerge.checkpoints.compare import check_same_shape
    from backmerge.errors import MergeError
    from backmerge.merging.changes import relation
    from backmerge.merging.survey import survey

    for tuned in variant.tuned_models:
        if isinstance(tuned, AdapterOnBase):
            continue  # was checked against its base as it was opened
        check_same_shape(variant.base, tuned, is_cast=variant.dtype is not None)
        found = relation(survey(variant.base, tuned, lams=(), sample=SAMPLE))
        if found.verdict == "doubtful":
            raise MergeError(
                f"{tuned.directory} does not look like a child of {variant.base.directory}: {'; '.join(found.reasons)}",
                remedy="give the base that it was tuned from (`backmerge diff` tells more); --allow-unrelated merges "
                "them all the same.",
            )


def numbers(option: str, text: str) -> list[float]:
    """Numbers with commas between.

    Raises:
        ConfigError: something else stands there.
    """
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(
            f"{option} {text}: expected numbers with commas between", remedy="such as 0.2,0.4,0.6"
        ) from None


def _pairs(option: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"{option} {text}: expected NAME=VALUE")
        pairs.append((name, value))
    return pairs


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
