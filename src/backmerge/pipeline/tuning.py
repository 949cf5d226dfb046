"""One tuned model per seed, each made unless it is there already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from backmerge.checkpoints.adapter import open_weights
from backmerge.checkpoints.reader import Checkpoint, Weights
from backmerge.finetuning.datasets import TrainingData
from backmerge.finetuning.schedule import num_steps
from backmerge.finetuning.settings import FinetuneSettings
from backmerge.finetuning.trainer import is_trained, train_model, training_key
from backmerge.progress import bar
from backmerge.registry import MODELS


def tune_seeds(
    base: Checkpoint,
    base_name: str,
    settings: FinetuneSettings,
    training: Mapping[int, TrainingData],
    places: Mapping[int, Path],
    *,
    log: Callable[[str], None] = lambda _: None,
    replace: bool = True,
) -> dict[str, Weights]:
    """Train each seed's model to its place; gives them by the names of their folders.

    Under `accelerate launch` all processes call this together, and the first speaks and writes.

    Args:
        base: What is tuned.
        base_name: As the user calls it.
        settings: Hyper-parameters.
        training: Seed to data.
        places: Seed to folder.
        log: Told of each seed that was trained.
        replace: Whether a model that backmerge wrote in a seed's place with other settings is replaced.

    Raises:
        BackmergeError: something that the user can mend.
    """
    # a folder's name means nothing elsewhere, and a relative one not even in another folder
    is_local = base_name in MODELS.entries or Path(base_name).expanduser().exists()
    named = str(base.directory.absolute()) if is_local else base_name
    tuned: dict[str, Weights] = {}
    for seed, place in places.items():
        data = training[seed]
        if not is_trained(place, training_key(base, data, settings, seed)):
            with bar(f"Fine-tuning, seed {seed}", num_steps(settings, len(data.training))) as advance:
                train_model(base, data, settings, seed, place, advance, base_name=named, replace=replace)
            log(f"fine-tuned seed {seed}")
        tuned[place.name] = open_weights(place, base)
    return tuned
