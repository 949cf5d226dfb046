"""Find names of this machine's folders, and shorten them to their last part."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

ORIGIN = "name_or_path"  # the end of keys in which transformers and peft record a model's origin
_ROOTED = re.compile(r"(/|~[\w.-]*/|\.{1,2}/|file:|[A-Za-z]:[\\/]|\\\\)")


def is_folder_name(text: str) -> bool:
    """Return whether a word is a path on a machine, rather than a hub id or anything else."""
    return bool(_ROOTED.match(text)) or (bool(text) and "\n" not in text and len(text) < 4096 and Path(text).exists())


def last_part(text: str) -> str:
    """Return a folder's or file's own name, without its path."""
    path = PureWindowsPath(text) if "\\" in text else PurePosixPath(text)
    return path.name


def without_folders(value: Any, *, is_ours: bool) -> Any:
    """Return plain data with this machine's folders shortened to their own names.

    Args:
        value: The contents of a JSON file.
        is_ours: Whether every word may be a folder, as in `backmerge.json`. In other files only words recorded as a
            model's origin: a token or a template may begin with a slash, too.
    """
    if isinstance(value, dict):
        return {
            key: without_folders(inner, is_ours=is_ours)
            if is_ours or str(key).endswith(ORIGIN) or isinstance(inner, (dict, list))
            else inner
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [
            without_folders(inner, is_ours=is_ours) if is_ours or isinstance(inner, (dict, list)) else inner
            for inner in value
        ]
    if isinstance(value, str) and is_folder_name(value):
        return last_part(value)
    return value
