"""Is this the base that an adapter was trained on? The finding `other_base`: refused if certain, else a warning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from backmerge.checkpoints.adapter_config import shown
from backmerge.checkpoints.locate import folder_named
from backmerge.checkpoints.reader import Checkpoint
from backmerge.errors import CheckpointError
from backmerge.progress import say

if TYPE_CHECKING:
    from backmerge.checkpoints.adapter import AdapterOnBase

# relative difference of a tensor, in norm, that no rounding to 16 bits explains (bfloat16: at most 2^-9 an element)
OTHER_WEIGHTS = 0.005
_warned: set[tuple[Path, Path]] = set()


def check_kinship(adapter: AdapterOnBase) -> None:
    """Compare the base that an adapter names with the one that it was given.

    Names prove little: the same weights are a hub id, a mirror, or a folder. So other names that fit in shape are a
    warning. It is certain only if the named folder is here and holds other weights.

    Raises:
        CheckpointError: `other_base`.
    """
    named, given = adapter.config.base_model_name_or_path, adapter.base.companions
    if not named or _is_called(named, given):
        return
    folder = folder_named(named)
    if (folder / "config.json").is_file():
        if not _differs(adapter, folder):
            return
        raise CheckpointError(
            f"other_base: the adapter {adapter.directory} was trained on {shown(named)}, which holds other weights "
            f"than {given}: its change belongs to those",
            remedy="give that folder as the base.",
        )
    if (adapter.directory, given) not in _warned:
        _warned.add((adapter.directory, given))
        say(
            f"Note: other_base: the adapter {adapter.directory} names {shown(named)} as its base, and was given "
            f"{given}. Their shapes fit; make sure that they are the same weights."
        )


def _is_called(named: str, given: Path) -> bool:
    """Whether the name is that of the folder, of its place in the hub's cache, or of a copy of the same name."""
    repo = named.partition("@")[0].rstrip("/")
    cached = f"models--{repo.replace('/', '--')}"
    last = Path(repo).name.casefold()
    return folder_named(named).absolute() == given.absolute() or cached in given.parts or last == given.name.casefold()


def _differs(adapter: AdapterOnBase, folder: Path) -> bool:
    """Whether a tensor that the adapter changes is another one in that folder, beyond rounding."""
    other = Checkpoint(folder)
    name = min(adapter.factors.keys() & other.infos.keys(), default=None)
    if name is None or other.infos[name].shape != adapter.base.infos[name].shape:
        return True
    ours, theirs = adapter.base.tensor(name).float(), other.tensor(name).float()
    return bool((ours - theirs).norm() > OTHER_WEIGHTS * theirs.norm())
