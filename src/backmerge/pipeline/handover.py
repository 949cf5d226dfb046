"""Write the merged models: as unconfirmed first, then moved to `merged/` once confirmed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.reader import CARD, Weights, read_json
from backmerge.errors import RunError
from backmerge.generation.verification import verify_written
from backmerge.merging.recipe import Variant
from backmerge.merging.served import is_written, opened, served_dtype, write_served
from backmerge.merging.to_disk import damage_of_merged
from backmerge.outputs import damage_of, models_in
from backmerge.planning.points import Point, as_output
from backmerge.planning.prepare import Plan
from backmerge.results import Confirmation, MergedModel
from backmerge.runs import RunDirectory
from backmerge.selection import Choice


def write_chosen(
    run: RunDirectory, prepared: Plan, tuned: Mapping[str, Weights], chosen: Point | None
) -> dict[str, Variant]:
    """Return the chosen merges on disk, by tuned model: from where they were written before, else as unconfirmed.

    Each is returned as its user loads it: a checkpoint alone, an adapter on the base.

    Raises:
        RunError: something that this run did not write is in a model's place: it must be neither used as the merge nor
            replaced.
    """
    written: dict[str, Variant] = {}
    members = prepared.members_at(chosen, tuned) if chosen else []
    current = {
        # also the tuned model, if it was chosen unchanged
        str(member.tuned): as_output(member.local_variant, prepared.output)
        for member in members
    }
    for place in (run.merged, run.unconfirmed):
        run.set_aside(
            directory
            for directory in models_in(place)
            if directory.name not in current or not is_written(directory, current[directory.name])
        )
    for name, variant in current.items():
        places = (run.merged / name, run.unconfirmed / name)
        for place in places:
            if place.exists() and not is_written(place, variant):
                raise RunError(f"{place} is not a model of this run", remedy="move it elsewhere, and run again.")
            damage = (
                (damage_of if variant.served_as == "adapter" else damage_of_merged)(place) if place.exists() else None
            )
            if damage is not None:
                raise RunError(
                    f"{place} was damaged after this run wrote it: {damage}",
                    remedy=f"remove {place} and run the command again to write it again.",
                )
        directory = next((place for place in places if place.exists()), places[-1])
        if not directory.exists():
            write_served(
                variant,
                directory,
                verify=verify_written if prepared.experiment.merged_verified and _is_of_adapters(variant) else None,
            )
            run.log(f"wrote {name} at {chosen.name if chosen else ''}")
        written[name] = opened(directory, prepared.base)
    return written


def hand_over(
    run: RunDirectory, written: Mapping[str, Variant], confirmation: Confirmation, choice: Choice
) -> list[MergedModel]:
    """Move the models that are confirmed to `merged/`; the others stay in `unconfirmed/`, or go back there."""
    own = {row.tuned: row.verdict for row in confirmation.models}
    rows: list[MergedModel] = []
    for name, variant in written.items():
        directory = _directory_of(variant)
        passed = confirmation.verdict == "restored" and own[name] == "restored"
        place = (run.merged if passed else run.unconfirmed) / name
        if directory != place:
            place.parent.mkdir(exist_ok=True)
            directory.replace(place)
        card = read_json(place / CARD)
        rows.append(
            MergedModel(
                tuned=name,
                point=str(choice.point),
                directory=str(place.relative_to(run.path)),
                confirmed=passed,
                served_as=variant.served_as,
                dtype=served_dtype(variant),
                rounding=card["recipe"].get("rounding", "nearest"),
                rounding_loss=card.get("rounding_loss"),
            )
        )
    return rows


def _is_of_adapters(variant: Variant) -> bool:
    return any(isinstance(weights, AdapterOnBase) for weights in variant.tuned_models)


def _directory_of(written: Variant) -> Path:
    return (written.tuned_models or (written.base,))[0].directory
