"""Rows of data sets on the hub or in a user's own copy, or a clear error that says how to do without the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from backmerge.errors import DataError
from backmerge.rows import sound_rows


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


def data_rows(
    data: str | None, title: str, repository: str, split: str = "train", config: str | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All rows of a user's own copy if `data` names one, else of the hub's, each with its place for messages.

    Raises:
        DataError: the copy cannot be read; or as `rows_of_hub`.
    """
    if data is not None:
        yield from ((row.place, row.values) for row in sound_rows(data))
        return
    for number, row in enumerate(rows_of_hub(title, repository, split, config), start=1):
        yield f"{title}, row {number}", row


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
