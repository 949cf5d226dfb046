"""Push a model to the hub: private by default, in one commit, so that it appears whole or not at all.

An interrupted upload continues where it stopped: files that the hub has already are not sent again, and none of them is
visible before the commit.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from backmerge.errors import CheckpointError
from backmerge.progress import count_text, say, size_text
from backmerge.sharing.folder import Outgoing, Package
from backmerge.sharing.hub_faults import told_plainly

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN = "main"
# weights of another model that a repository may have, which would be loaded together with or instead of this one
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
INDEX = ".index.json"


class Destination(NamedTuple):
    """The destination of a model.

    Attributes:
        repo: `owner/name`.
        revision: The branch, made if absent.
        is_public: Whether a new repository is public, and an existing one may be.
        may_replace: Whether another model in the repository may be replaced.
    """

    repo: str
    revision: str = MAIN
    is_public: bool = False
    may_replace: bool = False


class Pushed(NamedTuple):
    """The result of a push.

    Attributes:
        url: Address of the commit.
        is_new: Whether anything changed there.
        deleted: Files of another model that were deleted from the branch; its history keeps them.
    """

    url: str
    is_new: bool
    deleted: tuple[str, ...]


class Remote(NamedTuple):
    """A file in the repository: its size in bytes and, for large ones, its SHA-256."""

    size: int
    sha256: str | None


def push(package: Package, to: Destination) -> Pushed:
    """Push a model.

    Raises:
        CheckpointError: the hub cannot be reached or refuses it, the repository is public and must not be, or it has
            another model that must not be replaced.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    with told_plainly(to.repo) as token:
        api = HfApi(token=token)
        _make_or_find(api, to)
        before = _files(api, to.repo, to.revision)
        stale = _stale(package.files, before)
        if stale and not to.may_replace:
            raise CheckpointError(
                f"{to.repo} ({to.revision}) has another model: {_listed(stale)}",
                remedy="give another repository or --revision; or --replace to put this model in its place, in one "
                "commit (the repository's history keeps the other).",
            )
        deleted = tuple(name for name in stale if name not in {file.name for file in package.files})
        head = api.repo_info(to.repo, revision=to.revision).sha
        files = count_text(len(package.files), "file")
        say(f"Sending {files}, {size_text(package.size)}, to {to.repo} ({to.revision}).")
        had_bars = not are_progress_bars_disabled()
        if not sys.stderr.isatty():
            disable_progress_bars()
        try:
            done = api.create_commit(
                to.repo,
                [
                    *(CommitOperationAdd(file.name, _content(file.content)) for file in package.files),
                    *(CommitOperationDelete(name) for name in deleted),
                ],
                commit_message="Upload a merged model with backmerge",
                revision=to.revision,
            )
        finally:
            if had_bars:
                enable_progress_bars()
        _check_arrived(package.files, _files(api, to.repo, done.oid), to)
    return Pushed(str(done.commit_url), done.oid != head, deleted)


def _make_or_find(api: HfApi, to: Destination) -> None:
    """Make the repository and the branch if they do not exist."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.repo_info(to.repo)
    except RepositoryNotFoundError:
        api.create_repo(to.repo, private=not to.is_public)
    else:
        if not found.private and not to.is_public:
            raise CheckpointError(
                f"{to.repo} is public, so the upload would be public at once",
                remedy="give --public if you want that, make it private in its settings, or give another name.",
            )
        if found.private and to.is_public:
            say(f"{to.repo} is private and stays private: you can change that in its settings.")
    if to.revision != MAIN and not to.revision.startswith("refs/"):
        api.create_branch(to.repo, branch=to.revision, exist_ok=True)


def _files(api: HfApi, repo: str, revision: str) -> dict[str, Remote]:
    """Return the files in the repository's root, by name."""
    from huggingface_hub.hf_api import RepoFile

    return {
        entry.path: Remote(entry.size, entry.lfs.sha256 if entry.lfs else None)
        for entry in api.list_repo_tree(repo, revision=revision)
        if isinstance(entry, RepoFile)
    }


def _stale(files: Sequence[Outgoing], remote: Mapping[str, Remote]) -> list[str]:
    """Return weights in the repository that differ from the new ones: another name, or other bytes."""
    ours = {file.name: file for file in files}
    return sorted(
        name
        for name, there in remote.items()
        if name.endswith((*WEIGHTS, INDEX)) and not (name in ours and _is_same(ours[name], there))
    )


def _is_same(file: Outgoing, there: Remote) -> bool:
    if file.name.endswith(INDEX):
        return True  # it follows from the shards, which are checked
    return there.size == file.size and there.sha256 in (None, _sha256(file.content))


def _sha256(content: Path | bytes) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _content(content: Path | bytes) -> str | bytes:
    return str(content) if isinstance(content, Path) else content


def _check_arrived(files: Sequence[Outgoing], remote: Mapping[str, Remote], to: Destination) -> None:
    """Check that every file arrived: the hub silently drops files that a `.gitignore` there names."""
    missing = [file.name for file in files if file.name not in remote or remote[file.name].size != file.size]
    if missing:
        raise CheckpointError(
            f"{to.repo} ({to.revision}) did not accept {_listed(missing)}, so the model there is incomplete",
            remedy="look for a .gitignore there that excludes them, and run the command again.",
        )


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
