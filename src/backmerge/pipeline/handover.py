"""What is on disk of the merged models: written as unconfirmed, handed over once confirmed, withdrawn when stale."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.reader import CARD, Weights, read_json
from backmerge.errors import RunError
from backmerge.generation.verification import verify_written
from backmerge.merging.recipe import Variant
from backmerge.merging.served import is_written, opened, served_dtype, write_served
from backmerge.merging.to_disk import damage_of_merged
from backmerge.outputs import damage_of
from backmerge.pipeline.points import Point, as_output
from backmerge.pipeline.preparation import Prepared
from backmerge.progress import say
from backmerge.runs import RunDirectory
from backmerge.selection import Choice

# files that say what was found, made anew from the units
FINDINGS = ("digests.json", "results.json", "samples.json", "report.html", "scores.csv", "summary.csv")


def withdraw(run: RunDirectory, inputs: Mapping[str, Any]) -> None:
    """Take back what was found and handed over, unless it is of these very inputs: it would pass for theirs.

    Nothing is lost: units, adapters and weights stay, and what is confirmed anew goes back to `merged/`.
    """
    file = run.path / "results.json"
    if file.exists():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            found = None  # damaged; it is written again
        if isinstance(found, dict) and found.get("inputs") == inputs:
            return
        say("The results of the last time are withdrawn: what they rest on has changed.")
        run.log("withdrew the results: what they rest on has changed")
    for name in FINDINGS:
        (run.path / name).unlink(missing_ok=True)
    for directory in (run.records, run.path / "plots", run.path / "tables"):
        if directory.is_dir():
            shutil.rmtree(directory)
    for directory in _ours(run.merged):
        (directory / "README.md").unlink(missing_ok=True)  # its card tells of the confirmation
        place = run.unconfirmed / directory.name
        if place.exists():
            shutil.rmtree(directory)
        else:
            place.parent.mkdir(exist_ok=True)
            directory.replace(place)
    if run.merged.is_dir() and not any(run.merged.iterdir()):
        run.merged.rmdir()


def write_chosen(
    run: RunDirectory, prepared: Prepared, tuned: Mapping[str, Weights], chosen: Point | None
) -> dict[str, Variant]:
    """The chosen merges on disk, by tuned model: where they were handed over before, else as unconfirmed.

    Each is given as its user loads it: a checkpoint alone, an adapter on the base.

    Raises:
        RunError: something that this run did not write stands in a model's place: it must be neither taken for the
            merge nor replaced.
    """
    written: dict[str, Variant] = {}
    members = prepared.members_at(chosen, tuned) if chosen else []
    current = {
        # also the tuned model, if it was chosen as it is
        str(member.tuned): as_output(member.variant, prepared.output, allow_plugins=prepared.allow_plugins)
        for member in members
    }
    for place in (run.merged, run.unconfirmed):
        for directory in _ours(place):
            if directory.name not in current or not is_written(directory, current[directory.name]):
                shutil.rmtree(directory)
                run.log(f"removed {directory.name} from {place.name}: it is of another recipe")
    for name, variant in current.items():
        places = (run.merged / name, run.unconfirmed / name)
        for place in places:
            if place.exists() and not is_written(place, variant):
                raise RunError(f"{place} is no model that this run wrote", remedy="move it elsewhere, and run again.")
            damage = (
                (damage_of if variant.served_as == "adapter" else damage_of_merged)(place) if place.exists() else None
            )
            if damage is not None:
                raise RunError(
                    f"{place} has been damaged since this run wrote it: {damage}",
                    remedy=f"remove {place} and give the command again: it is written anew.",
                )
        directory = next((place for place in places if place.exists()), places[-1])
        if not directory.exists():
            write_served(
                variant,
                directory,
                allow_plugins=prepared.allow_plugins,
                verify=partial(verify_written, allow_plugins=prepared.allow_plugins)
                if prepared.experiment.merged_verified and _is_of_adapters(variant)
                else None,
            )
            run.log(f"wrote {name} at {chosen.name if chosen else ''}")
        written[name] = opened(directory, prepared.base)
    return written


def hand_over(
    run: RunDirectory, written: Mapping[str, Variant], confirmation: Mapping[str, Any], choice: Choice
) -> list[dict[str, Any]]:
    """Move the models whose safety is confirmed to `merged/`; the others stay in `unconfirmed/`, or go back there."""
    own = {row["tuned"]: row["verdict"] for row in confirmation["models"]}
    rows: list[dict[str, Any]] = []
    for name, variant in written.items():
        directory = _directory_of(variant)
        passed = confirmation["verdict"] == "restored" and own[name] == "restored"
        place = (run.merged if passed else run.unconfirmed) / name
        if directory != place:
            place.parent.mkdir(exist_ok=True)
            directory.replace(place)
        card = read_json(place / CARD)
        rows.append(
            {
                "tuned": name,
                "point": choice.point,
                "directory": str(place.relative_to(run.path)),
                "confirmed": passed,
                "served_as": variant.served_as,
                "dtype": served_dtype(variant),
                "rounding": card["recipe"].get("rounding", "nearest"),
                "rounding_loss": card.get("rounding_loss"),
            }
        )
    return rows


def _is_of_adapters(variant: Variant) -> bool:
    return any(isinstance(weights, AdapterOnBase) for weights in variant.tuned_models)


def _directory_of(written: Variant) -> Path:
    return (written.tuned_models or (written.base,))[0].directory


def _ours(place: Path) -> list[Path]:
    """The models in a folder that backmerge wrote; what a user put beside them is not touched."""
    if not place.is_dir():
        return []
    return sorted(directory for directory in place.iterdir() if (directory / "backmerge.json").is_file())
