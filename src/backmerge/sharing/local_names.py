"""Names of this machine's folders, told apart from other words and shortened to their last part."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

ORIGIN = "name_or_path"  # the end of the keys under which transformers and peft note where a model came from
_ROOTED = re.compile(r"(/|~[\w.-]*/|\.{1,2}/|file:|[A-Za-z]:[\\/]|\\\\)")


def is_folder_name(text: str) -> bool:
    """Whether a word leads to a place on a machine, rather than to the hub or nowhere."""
    return bool(_ROOTED.match(text)) or (bool(text) and "\n" not in text and len(text) < 4096 and Path(text).exists())


def last_part(text: str) -> str:
    """A folder's or file's own name; nothing of where it lies."""
    path = PureWindowsPath(text) if "\\" in text else PurePosixPath(text)
    return path.name


def without_folders(value: Any, *, is_ours: bool) -> Any:
    """Plain data in which folders of this machine go by their own name.

    Args:
        value: What a JSON file holds.
        is_ours: Whether every word may be one, as in `backmerge.json`. In others' files only those that are noted as a
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
