"""Rows of data sets on the hub, or a clear word on how to do without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backmerge.errors import DataError


def rows_of_hub(title: str, repository: str, split: str = "train", config: str | None = None) -> Sequence[Any]:
    """All rows of a data set's split.

    Raises:
        DataError: the hub cannot be reached and the data set is not in its cache; or it is gated.
    """
    from datasets import load_dataset

    try:
        rows: Sequence[Any] = load_dataset(repository, config, split=split)
    except (OSError, ValueError) as error:  # datasets raises both for what the hub does not give
        raise _out_of_reach(title, error) from error
    return rows


def folder_of_hub(title: str, repository: str, pattern: str) -> Path:
    """The files of a data set whose names match a pattern.

    Raises:
        DataError: as `rows_of_hub`.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=pattern))
    except (OSError, ValueError) as error:
        raise _out_of_reach(title, error) from error


def _out_of_reach(title: str, error: Exception) -> DataError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return DataError(
        f"{title} could not be fetched from the hub: {reason}",
        remedy="give your own copy of its data, as NAME=FILE; for gated data set HF_TOKEN, once you have been let in.",
    )
