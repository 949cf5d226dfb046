"""Write merges without measuring them: from models and a recipe to folders, in one pass for all λs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backmerge.errors import ConfigError
from backmerge.progress import say
from backmerge.registry import Permissions

if TYPE_CHECKING:
    from backmerge.checkpoints.reader import Weights
    from backmerge.merging.method import Method
    from backmerge.merging.recipe import Variant
    from backmerge.merging.to_disk import Written

SAMPLE = 0.01  # share of the elements to check before the merge
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Writing:
    """The settings for writing merges.

    Attributes:
        form: `checkpoint`; `adapter`, which must be exact; or `auto`, an adapter if that is exact.
        rank: Rank to which an adapter is compressed.
        max_shard_bytes: Largest size of a checkpoint's files.
        sha256: Whether the files' SHA-256 is recorded too.
        allow_unrelated: Whether models may be merged that do not look like parent and child.
        verify: Whether an adapter's merge is compared with transformers and peft before it is kept.
        replace: Whether to replace a model that backmerge wrote in the same place.
    """

    form: str = "checkpoint"
    rank: int | None = None
    max_shard_bytes: int = SHARD_BYTES
    sha256: bool = False
    allow_unrelated: bool = False
    verify: bool = True
    replace: bool = False


def write_outputs(outputs: Sequence[Mapping[Path, Variant]], writing: Writing, read: Sequence[Path] = ()) -> list[Path]:
    """Write merges, each whole or not at all; one that exists already, by the same recipe, is kept.

    Args:
        outputs: Groups of folders with their variants; each group differs in λ alone and is written in one pass.
        writing: The settings.
        read: Files in addition to the models that must not be overwritten.

    Returns:
        All folders.

    Raises:
        BackmergeError: a user error; everything that can be refused is refused before the first is written.
    """
    are_adapters = [_is_adapter(together, writing.form) for together in outputs]
    if writing.rank is not None and not all(are_adapters):
        raise ConfigError("rank is only for adapters", remedy="write the merge as an adapter.")
    left = [
        _still_to_do(together, writing.rank, read, is_adapter=is_adapter, force=writing.replace)
        for together, is_adapter in zip(outputs, are_adapters, strict=True)
    ]
    for together, is_adapter in zip(left, are_adapters, strict=True):
        if together and is_adapter:
            _write_adapters(together, writing)
        elif together:
            _write_checkpoints(together, writing)
    return [place for together in outputs for place in together]


def recipes_of(
    base: str,
    tuned: Sequence[str],
    method: Method,
    models: Mapping[str, str],
    extra_rows: str,
) -> dict[str, Variant]:
    """Return the recipes by the names of their folders; several tuned models are in one recipe or in one each."""
    from backmerge.checkpoints.adapter import open_weights
    from backmerge.checkpoints.locate import locate_model, short_name
    from backmerge.checkpoints.reader import Checkpoint
    from backmerge.merging.recipe import Variant

    if len({short_name(name) for name in tuned}) < len(tuned):
        raise ConfigError("two tuned models have the same folder name", remedy="merge them one at a time.")
    takes_several = method.takes_several
    weights = Checkpoint(locate_model(base), unwrap=True)
    extra = {name: open_weights(locate_model(folder), weights) for name, folder in models.items()}
    if weights.wrapper is not None:
        say(f"Note: '{weights.wrapper}' is removed from the names of the merged tensors.")
    recipes: dict[str, Variant] = {}
    opened: dict[str, Weights] = {}
    for name in tuned:
        theirs = open_weights(locate_model(name), weights, unwrap=True)
        ours: Weights = weights
        if extra_rows == "tuned" and isinstance(theirs, Checkpoint):
            from backmerge.checkpoints.compare import GrownBase

            if takes_several:
                raise ConfigError(
                    "added rows can be kept from only one tuned model",
                    remedy="use linear, slerp or dare_linear.",
                )
            ours = GrownBase(weights, theirs)
        if note := getattr(theirs, "note", None):
            say(f"Note: {note}.")
        opened[short_name(name)] = theirs
        recipes[short_name(name)] = Variant(ours, theirs, method, extra=extra)
    if takes_several:
        return {"": Variant(weights, tuple(opened.values()), method, extra=extra)}
    return recipes if len(recipes) > 1 else {"": next(iter(recipes.values()))}


def with_inputs(
    recipes: Mapping[str, Variant], guard: str | None, task_inputs: Path | None, permissions: Permissions
) -> dict[str, Variant]:
    """Return the recipes with statistics of layers' inputs, collected if they are not known yet.

    Raises:
        MergeError: the method takes none, or needs some.
        CheckpointError: a file of statistics belongs to another model.
    """
    from backmerge.merging.inputs import InputStatistics
    from backmerge.merging.method import INPUTS, check_inputs

    names = dict(zip(INPUTS, (guard, task_inputs), strict=True))
    given = [name for name, value in names.items() if value is not None]
    recipe = next(iter(recipes.values()))
    check_inputs(recipe.method, given)
    if guard is None:
        return dict(recipes)
    # imported here: other merges need neither benchmarks nor transformers
    from backmerge.benchmarks.guards import GuardSettings, find_guards
    from backmerge.generation.protocol import EngineSettings
    from backmerge.generation.quiet import quieten
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


def outputs_of(
    recipes: Mapping[str, Variant],
    out: Path,
    lams: Sequence[float],
    where: Mapping[str, Any],
    fixed: Mapping[str, Any],
) -> list[dict[Path, Variant]]:
    """Return folders with their variants, in groups that differ in λ alone and are written in one pass."""
    from backmerge.merging.recipe import lam_name

    if not lams:
        raise ConfigError("lam has no numbers: there is nothing to merge", remedy="for example 0.2,0.4,0.6.")
    groups = []
    for name, recipe in recipes.items():
        place = out / name if name else out
        shared = replace(recipe, **fixed)
        values = list(dict.fromkeys(lams))
        groups.append(
            {
                place / f"lam-{lam_name(lam)}" if len(values) > 1 else place: shared.at(
                    {**where, "rest": lam} if where else lam
                )
                for lam in values
            }
        )
    return groups


def from_mergekit(config: Path, fixed: Mapping[str, Any]) -> Variant:
    """Return the recipe of a mergekit YAML file; print where backmerge differs from the file.

    Args:
        config: The file.
        fixed: Fields of the recipe that replace the file's; one that is `None` does not.
    """
    from backmerge.config import load_yaml
    from backmerge.merging.mergekit.file import read_mergekit
    from backmerge.merging.mergekit.recipe import opened

    recipe = read_mergekit(load_yaml(config))
    for note in recipe.notes:
        say(f"Note: {note}.")
    given = {name: value for name, value in fixed.items() if value is not None}
    return replace(opened(recipe, seed=fixed["seed"]), **given)


def lams_of(method: Method, given: Sequence[float] | None) -> list[float]:
    """Return the requested λs, or the method's default, which is printed.

    Raises:
        ConfigError: the method has no λ, or one is outside its range.
    """
    if not method.has_lam:
        if given is not None:
            raise ConfigError(f"{method.name} has no λ: it computes its own ratio", remedy="remove λ.")
        return [1.0]
    if given is not None:
        outside = next((lam for lam in given if not 0 <= lam <= method.max_lam), None)
        if outside is not None:
            most = f"to {method.max_lam:g}" if method.max_lam < float("inf") else "on"
            raise ConfigError(
                f"lam {outside:g} is out of range: λ is the share of the tuned side", remedy=f"give it from 0 {most}."
            )
        return list(given)
    default = method.parameters["lam"].default
    lam = 0.5 if default is method.parameters["lam"].empty else float(default)
    say(f"λ is {lam:g}, the default of {method.name}; `backmerge restore` chooses it by measuring.")
    return [lam]


def _still_to_do(
    outputs: Mapping[Path, Variant], rank: int | None, read: Sequence[Path], *, is_adapter: bool, force: bool
) -> dict[Path, Variant]:
    """Return the outputs without those that exist already, made by the same recipe from the same models.

    Raises:
        RunError: something else exists there, it is damaged, or it overlaps an input.
    """
    from backmerge.outputs import check_apart, damage_of, is_to_write

    left: dict[Path, Variant] = {}
    for target, variant in outputs.items():
        models = (variant.base, *variant.tuned_models, *variant.extra.values())
        files = [*read, *(statistics.path for statistics in variant.inputs.values())]
        check_apart(target, [*(path for weights in models for path in places_of(weights)), *files])
        is_same = partial(_is_made_by, target, variant, rank, is_adapter=is_adapter)
        if not is_to_write(target, is_same, damage_of if is_adapter else _damage_of_merged, force=force):
            say(f"{target} already exists, from the same models by the same recipe.")
            continue
        left[target] = variant
    return left


def _damage_of_merged(target: Path) -> str | None:
    from backmerge.merging.to_disk import damage_of_merged  # imports torch, which adapters do not need

    return damage_of_merged(target)


def places_of(weights: Weights) -> list[Path]:
    """Return the folders that weights are read from: an adapter's own, its base's, and the one in its config."""
    from backmerge.checkpoints.adapter import AdapterOnBase

    places = [weights.directory, weights.companions]
    named = weights.config.base_model_name_or_path if isinstance(weights, AdapterOnBase) else None
    if named and os.path.isdir(named):  # noqa: PTH112 - Path's own raises where a name is too long
        places.append(Path(named))
    return places


def _is_made_by(target: Path, variant: Variant, rank: int | None, *, is_adapter: bool) -> bool:
    """Return whether a folder has a merge by this recipe; computes models' fingerprints only if all else agrees."""
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
        raise ConfigError(f"this merge cannot be an adapter: {obstacle}", remedy="write it whole, as a checkpoint.")
    return obstacle is None


def _verifier(outputs: Mapping[Path, Variant]) -> Callable[[Path, Variant], None] | None:
    """Return a function that checks a merge of adapters; `None` for checkpoints, which do not need transformers."""
    from backmerge.checkpoints.adapter import AdapterOnBase
    from backmerge.merging.served import verification_obstacle

    variant = next(iter(outputs.values()))
    if not any(isinstance(weights, AdapterOnBase) for weights in variant.tuned_models):
        return None
    if obstacle := verification_obstacle(variant.base):
        say(obstacle)  # before transformers and peft are imported: that takes longer than an adapter's merge
        return None
    from backmerge.generation.quiet import quieten
    from backmerge.generation.verification import verify_written

    quieten()
    return verify_written


def _write_adapters(outputs: Mapping[Path, Variant], writing: Writing) -> None:
    from backmerge.merging.lowrank import WrittenAdapter, write_adapters

    def add_card(place: Path, written: WrittenAdapter) -> None:
        _write_card(place, written.directory.name, outputs[written.directory], is_adapter=True)

    check = _verifier(outputs) if writing.verify and writing.rank is None else None
    write_adapters(outputs, rank=writing.rank, replace=writing.replace, add_files=add_card, verify=check)


def _write_checkpoints(outputs: Mapping[Path, Variant], writing: Writing) -> None:
    from backmerge.merging.to_disk import keep_freed_memory, write_all
    from backmerge.progress import bar

    keep_freed_memory()

    variant = next(iter(outputs.values()))
    # before the weights are written, so that a link that leads out of the model is refused
    for line in _differing_files(variant):
        say(f"Note: {line}.")
    if not writing.allow_unrelated:
        check_related(variant)

    def add_card(place: Path, one: Written) -> None:
        name, recipe = one.directory.name, outputs[one.directory]
        _write_card(place, name, recipe, is_adapter=False, rounding_loss=one.rounding_loss)

    total = sum(info.num_elements for info in variant.base.infos.values())
    with bar("Merging", total) as advance:
        written = write_all(
            outputs,
            max_shard_bytes=writing.max_shard_bytes,
            sha256=writing.sha256,
            replace=writing.replace,
            advance=advance,
            add_files=add_card,
            verify=_verifier(outputs) if writing.verify else None,
        )
    for one, variant in zip(written, outputs.values(), strict=True):
        _tell_rounding(one, variant)


def _write_card(
    folder: Path, name: str, variant: Variant, *, is_adapter: bool, rounding_loss: float | None = None
) -> None:
    """Write README.md, which describes the merge and says that its safety was not measured."""
    from backmerge.reporting.merge_card import unmeasured_card, write_card

    write_card(folder, unmeasured_card(name, variant, is_adapter=is_adapter, rounding_loss=rounding_loss))


def _tell_rounding(written: Written, variant: Variant) -> None:
    """Print how much of the change the checkpoint contains, and warn if rounding lost much of it."""
    from backmerge.merging.rounding import REMEDIES, rounding_line
    from backmerge.merging.served import served_dtype

    if written.rounding_loss is not None:
        remedies = REMEDIES if variant.rounding == "nearest" else ""
        say(rounding_line(written.directory.name, written.rounding_loss, served_dtype(variant), remedies))


def _differing_files(variant: Variant) -> Iterator[str]:
    """Yield differences of config, tokenizer and chat template, with the side that the merged model takes."""
    from backmerge.checkpoints.differences import differences

    for tuned in variant.tuned_models:
        for topic, line in differences(variant.base, tuned):
            if topic not in ("adapter", "tensors"):
                yield f"{topic} of {tuned.directory.name} differs ({line})"
    yield from variant.companions.notes
    if len(variant.tuned_models) > 1:
        first = variant.tuned_models[0].directory.name
        yield f"the tuned side's files are those of the first tuned model, {first}"


def check_related(variant: Variant) -> None:
    """Refuse models that do not look like parent and child, judged by 1 % of their elements.

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
            continue  # it was checked against its base when it was opened
        check_same_shape(variant.base, tuned, is_cast=variant.dtype is not None)
        found = relation(survey(variant.base, tuned, lams=(), sample=SAMPLE))
        if found.verdict == "doubtful":
            raise MergeError(
                f"{tuned.directory} does not look like it was made from {variant.base.directory}: "
                f"{'; '.join(found.reasons)}",
                remedy="give the base that it was made from (`backmerge diff` shows more); --allow-unrelated merges "
                "them anyway.",
            )
