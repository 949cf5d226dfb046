"""Merged models as a run leaves them: real weights in shards, with the card that the run writes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from backmerge.checkpoints.reader import Checkpoint
from backmerge.merging.recipe import Variant
from backmerge.merging.to_disk import write_all
from backmerge.reporting.card import write_cards
from reporting.synthetic import made_results, made_run, typed


def finished_run(directory: Path, base: Path, other: Path, **options: Any) -> Path:
    """A run whose models are merges of these two in several shards; the keywords are those of its results."""
    results = made_results(**{"tuned": ("seed-1",), **options})
    run = made_run(directory, results)
    for number, row in enumerate(results["merged"]):
        folder = run / row["directory"]
        shutil.rmtree(folder)
        variant = Variant(Checkpoint(base), Checkpoint(other), lam=0.5 - 0.1 * number)
        write_all({folder: variant}, max_shard_bytes=40_000)
    write_cards(run, typed(results))
    return run
