"""Find the folder for a model's name: a folder, a hub id, or the name of an embedded model."""

from __future__ import annotations

import re
from pathlib import Path

from backmerge.checkpoints.model_config import check_links
from backmerge.errors import CheckpointError, check_utf8
from backmerge.registry import MODELS, resolve

HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")

# weights as safetensors and the files next to them: never Python files or pickles
HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.txt",
    "tokenizer.model",
    "LICENSE*",
    "README.md",
]


def locate_model(name: str) -> Path:
    """Return the folder of a model or adapter.

    Args:
        name: A folder, a hub id (`owner/name` or `owner/name@revision`), or a name from the table of models.

    Raises:
        CheckpointError: there is no such folder, or it cannot be downloaded from the hub.
        RunError: its path is not valid UTF-8.
    """
    path = folder_named(name)
    if path.is_dir():
        check_utf8(str(path.resolve()))
        check_links(path.resolve())
        return path.resolve()
    if name in MODELS.entries:
        directory: Path = resolve(MODELS, name)()
        return directory
    match = HUB_ID.fullmatch(name)
    if path.exists() or match is None or name.startswith(("./", "../", "/", "~")):
        where = "" if path.is_absolute() else f" (a path relative to {Path.cwd()})"
        raise CheckpointError(
            f"there is no model folder at '{name}'{where}",
            remedy="give a folder with config.json and safetensors, a hub id (owner/name), or 'demo'.",
        )
    return _from_hub(match["repo"], match["revision"])


def folder_named(name: str) -> Path:
    """Return a name as a path, with `~` as the home folder; `~somebody` is kept if there is no such user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def short_name(name: str) -> str:
    """Return a short name for a model's folder: never empty, and never a path that leads elsewhere, such as `..`."""
    path = folder_named(name)
    if not path.is_dir():
        return Path(name.partition("@")[0]).name  # a hub id, perhaps with a revision
    return path.name if path.name not in {"", ".."} else path.resolve().name or "model"


def _from_hub(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"'{repo}' is not a folder, and could not be downloaded from the Hugging Face hub: {reason}",
            remedy="check the name, the network (HF_HUB_OFFLINE) and, for gated models, `hf auth login`; "
            "or download it elsewhere and give the folder.",
        ) from error
