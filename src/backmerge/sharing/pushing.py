"""A model to the hub: private unless asked otherwise, in one commit, so that it is there whole or not at all.

An interrupted upload goes on where it was: what the hub holds of the files already is not sent again, and until the
commit nothing of them is seen.
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
# what a repository may hold of another model, which would be loaded next to this one or in its place
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
INDEX = ".index.json"


class Destination(NamedTuple):
    """Where a model goes.

    Attributes:
        repo: `owner/name`.
        revision: The branch, made if absent.
        is_public: Whether a new repository is public, and an existing one may be.
        may_replace: Whether another model that is there may be replaced.
    """

    repo: str
    revision: str = MAIN
    is_public: bool = False
    may_replace: bool = False


class Pushed(NamedTuple):
    """What came of it.

    Attributes:
        url: Of the commit.
        is_new: Whether anything changed there.
        deleted: Files of another model that are gone from the branch; its history keeps them.
    """

    url: str
    is_new: bool
    deleted: tuple[str, ...]


class Remote(NamedTuple):
    """A file that is there: its size in bytes and, of large ones, its SHA-256."""

    size: int
    sha256: str | None


def push(package: Package, to: Destination) -> Pushed:
    """Send a model.

    Raises:
        CheckpointError: the hub cannot be reached or does not take it, the repository is public and may not be, or it
            holds another model that may not be replaced.
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
                f"{to.repo} ({to.revision}) holds another model: {_listed(stale)}",
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
    """Make the repository and the branch, as far as they are not there."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.repo_info(to.repo)
    except RepositoryNotFoundError:
        api.create_repo(to.repo, private=not to.is_public)
    else:
        if not found.private and not to.is_public:
            raise CheckpointError(
                f"{to.repo} is public, so what is sent there would be public at once",
                remedy="give --public if that is meant, make it private in its settings, or give another name.",
            )
        if found.private and to.is_public:
            say(f"{to.repo} is private and stays so: its settings change that.")
    if to.revision != MAIN and not to.revision.startswith("refs/"):
        api.create_branch(to.repo, branch=to.revision, exist_ok=True)


def _files(api: HfApi, repo: str, revision: str) -> dict[str, Remote]:
    """What lies in the repository's root, by name."""
    from huggingface_hub.hf_api import RepoFile

    return {
        entry.path: Remote(entry.size, entry.lfs.sha256 if entry.lfs else None)
        for entry in api.list_repo_tree(repo, revision=revision)
        if isinstance(entry, RepoFile)
    }


def _stale(files: Sequence[Outgoing], remote: Mapping[str, Remote]) -> list[str]:
    """Weights there that are not those that go: under another name, or under the same with other bytes."""
    ours = {file.name: file for file in files}
    return sorted(
        name
        for name, there in remote.items()
        if name.endswith((*WEIGHTS, INDEX)) and not (name in ours and _is_same(ours[name], there))
    )


def _is_same(file: Outgoing, there: Remote) -> bool:
    if file.name.endswith(INDEX):
        return True  # it follows from the shards, which are looked at themselves
    return there.size == file.size and there.sha256 in (None, _sha256(file.content))


def _sha256(content: Path | bytes) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _content(content: Path | bytes) -> str | bytes:
    return str(content) if isinstance(content, Path) else content


def _check_arrived(files: Sequence[Outgoing], remote: Mapping[str, Remote], to: Destination) -> None:
    """The hub leaves out what a `.gitignore` there names, and says nothing of it."""
    missing = [file.name for file in files if file.name not in remote or remote[file.name].size != file.size]
    if missing:
        raise CheckpointError(
            f"{to.repo} ({to.revision}) did not take {_listed(missing)}, so the model there is not whole",
            remedy="look for a .gitignore there that leaves them out, and give the command again.",
        )


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
