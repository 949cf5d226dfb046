"""Check where commands write: never over their inputs, and only over what backmerge wrote.

A model that backmerge writes has a manifest, `backmerge.json`, which lists its files with their sizes and digests.
`--force` replaces a folder only if it has such a manifest and nothing that the manifest does not list; a result counts
as done only if its files match the manifest.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash
from pydantic import BaseModel, ConfigDict, NonNegativeInt, TypeAdapter, ValidationError

from backmerge.errors import RunError, check_utf8

MANIFEST = "backmerge.json"
DIGESTS = "digests.json"  # of the results, samples and records of a run
CARD = "README.md"  # the model card, next to the weights; each report rewrites it
SEAL = "<!-- backmerge {} -->\n"  # a card's last line, with the digest of the text above it
CURVE = "curve.png"  # shown in the card
EVAL_RESULTS = ".eval_results/backmerge.yaml"  # in the hub's format; written with the card
NAMES = frozenset({"name", "method", "mode", "device", "dtype", "rule", "executor"})  # settings that are never a folder
BLOCK = 1 << 24  # bytes hashed at a time


class ListedFile(BaseModel):
    """A file of a model, as it was written.

    Attributes:
        bytes: Its size.
        xxh3: The XXH3 (128 bit) of its content; `None` if the manifest's fingerprint covers it.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    bytes: NonNegativeInt
    xxh3: str | None = None


class Manifest(BaseModel):
    """The common part of every `backmerge.json`.

    Attributes:
        backmerge: The version that wrote it.
        files: Each file of the folder except the manifest, by its path within the folder; `None` before version 0.4.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    backmerge: str
    files: dict[str, ListedFile] | None = None


def listed_files(directory: Path, *, without_digest: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Return the manifest's list of a folder's files, as plain data.

    Args:
        directory: All its files are listed, except the manifest.
        without_digest: Files that are too large to be read again; a fingerprint covers their content.
    """
    skipped = set(without_digest)
    return {
        name: ListedFile(
            bytes=(directory / name).stat().st_size, xxh3=None if name in skipped else digest_of(directory / name)
        ).model_dump(exclude_none=True)
        for name in _names_in(directory)
    }


def manifest_of(directory: Path) -> Manifest | None:
    """Read the manifest of a folder; `None` if there is none or it is damaged."""
    try:
        return Manifest.model_validate_json((directory / MANIFEST).read_bytes())
    except (OSError, ValidationError):
        return None


def damage_of(directory: Path) -> str | None:
    """Return how a model's files differ from its manifest, or `None` if they are as written.

    Files that a user added are not damage. A manifest without a list of files shows no damage.
    """
    manifest = manifest_of(directory)
    if manifest is None:
        return f"{MANIFEST} is missing or damaged"
    for name, listed in (manifest.files or {}).items():
        file = directory / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != listed.bytes:
            return f"{name} has {size:,} bytes, and {listed.bytes:,} were written"
        if listed.xxh3 is not None and digest_of(file) != listed.xxh3:
            return f"{name} was changed after it was written"
    return None


def sealed_card(text: str) -> str:
    """Return a model card with a last line by which later commands see that nobody has edited it."""
    return text + SEAL.format(xxhash.xxh3_128_hexdigest(text.encode()))


def is_own_card(file: Path) -> bool:
    """Return whether a file is a model card exactly as backmerge wrote it."""
    if file.is_symlink() or not file.is_file():
        return False
    content = file.read_bytes()
    text = content[: content.rfind(SEAL.partition("{")[0].encode())]
    return content == text + SEAL.format(xxhash.xxh3_128_hexdigest(text)).encode()


def is_free(place: Path) -> bool:
    """Return whether a path is unused or an empty folder."""
    return not os.path.lexists(place) or (place.is_dir() and not any(place.iterdir()))


def check_replaceable(place: Path) -> None:
    """Check that the content of a path may be replaced.

    Raises:
        RunError: it is a file, a folder without our manifest, or a folder with more than the manifest lists.
    """
    if is_free(place):
        return
    if not place.is_dir():
        raise RunError(f"{place} is a file, which --force does not replace", remedy="give another --out.")
    manifest = manifest_of(place)
    if manifest is None or manifest.files is None:
        raise RunError(
            f"{place} has no {MANIFEST} that lists its files, so backmerge does not know which of them it wrote, and "
            "--force does not replace it",
            remedy="give another --out, or remove that folder yourself.",
        )
    ours = {*manifest.files, *([CARD, CURVE, EVAL_RESULTS] if is_own_card(place / CARD) else [])}
    foreign = [name for name in _names_in(place) if name not in ours]
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise RunError(
            f"{place} has files that backmerge did not write: {', '.join(foreign[:3])}{more}; replacing it would "
            "delete them",
            remedy="move them elsewhere, or give another --out.",
        )


def is_to_write(
    place: Path, is_same: Callable[[], bool], damage: Callable[[Path], str | None] = damage_of, *, force: bool
) -> bool:
    """Return whether a model still has to be written: not if it is there already, and complete.

    Args:
        place: The model's path.
        is_same: Whether the manifest shows that the same command wrote it.
        damage: How the model at the path differs from what was written.
        force: Whether backmerge's own output is replaced.

    Raises:
        RunError: something else is there, the model is damaged, or `force` would delete files that are not ours.
    """
    if is_free(place):
        return True
    if force:
        check_replaceable(place)
        return True
    if not (place / MANIFEST).is_file() or not is_same():
        raise RunError(f"{place} already exists, and is not what this command would write", remedy=_ways_out(place))
    found = damage(place)
    if found is not None:
        raise RunError(
            f"{place} was written by this command earlier and damaged afterwards: {found}",
            remedy=_ways_out(place),
        )
    return False


def _ways_out(place: Path) -> str:
    try:
        check_replaceable(place)
    except RunError:
        return "give another --out; nothing was changed."
    return "give another --out, or --force to replace it."


def check_apart(out: Path, reads: Iterable[Path]) -> None:
    """Check that a command writes neither to, above nor inside its inputs, nor over the user's own folders.

    Links are followed on both sides: of `out`, of the inputs, and of the files directly in an input folder.

    Args:
        out: The output folder.
        reads: Files and folders that the command reads; missing ones are skipped.

    Raises:
        RunError: they overlap, and the message names both; or the output cannot be made.
    """
    check_reachable(out)
    place = _resolved(out)
    for name, own in (("the working directory", Path.cwd()), ("your home", Path.home()), ("the root", Path("/"))):
        if _is_in(_resolved(own), place):
            raise RunError(f"--out {out} is {name}, or above it", remedy="give a separate folder, such as out.")
    for name, cache in _caches():
        if _overlap(place, _resolved(cache)):
            raise RunError(f"--out {out} overlaps {name} in {cache}, which commands read", remedy="give another --out.")
    for path in reads:
        for source in _with_links(path):
            if _overlap(place, source):
                how = "is" if place == source else "holds" if _is_in(source, place) else "is inside"
                raise RunError(
                    f"--out {out} {how} {path}, which this command reads: writing there would destroy it",
                    remedy="give an --out outside the models and data that are read.",
                )


def check_reachable(out: Path) -> None:
    """Check that an output can be made if it does not exist: its parent is a folder that may be written to.

    Raises:
        RunError: it cannot.
    """
    place = _resolved(out)
    if os.path.lexists(place):
        return
    above = next(parent for parent in place.parents if os.path.lexists(parent))
    if not above.is_dir():
        raise RunError(
            f"--out {out} is below {above}, which is a file", remedy="give an --out that is inside a folder."
        )
    if not os.access(above, os.W_OK | os.X_OK):
        is_read_only = bool(os.statvfs(above).f_flag & os.ST_RDONLY)
        reason = f"{above} may not be written to" + (f": {os.strerror(errno.EROFS)}" if is_read_only else "")
        raise RunError(
            f"--out {out} cannot be made: {reason}",
            remedy="give an --out elsewhere, or fix that folder's permissions.",
        )


def paths_read(settings: BaseModel) -> list[Path]:
    """Return the local files and folders that settings name: models, adapters, data, judges' models."""
    return list(dict.fromkeys(_paths_in(settings.model_dump(mode="json"), "")))


def _paths_in(value: Any, key: str) -> Iterable[Path]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _paths_in(inner, str(name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _paths_in(inner, key)
    elif isinstance(value, str) and value:
        try:
            path = Path(value).expanduser()
            # the name of a benchmark or method may also be a user's file; a folder with that name is unrelated
            if path.is_file() or (path.is_dir() and key not in NAMES):
                yield path
        except (OSError, RuntimeError, ValueError):  # too long for a path, or the home of an unknown user
            return


def _names_in(directory: Path) -> list[str]:
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if (path.is_symlink() or not path.is_dir()) and path != directory / MANIFEST
    )


def digest_of(file: Path) -> str:
    """Return the XXH3 (128 bit) of a file's content."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_digests(run: Path) -> None:
    """Check that the results of a finished run are unchanged; runs of earlier versions have no digests.

    Raises:
        RunError: a file, or the list of digests, was changed after the run.
    """
    file = run / DIGESTS
    if not file.is_file():
        return
    remedy = "run that run's command again: it rebuilds its results from finished work."
    try:
        digests = TypeAdapter(dict[str, str]).validate_json(file.read_bytes(), strict=True)
    except ValidationError as error:
        raise RunError(f"{file} is damaged", remedy=remedy) from error
    for name, digest in digests.items():
        if (run / name).is_file() and digest_of(run / name) != digest:
            raise RunError(f"{run / name} was changed after the run wrote it", remedy=remedy)


def _overlap(one: Path, other: Path) -> bool:
    return _is_in(one, other) or _is_in(other, one)


def _is_in(inner: Path, outer: Path) -> bool:
    """Return whether a resolved path is another, or is inside it.

    One folder may have several names (on file systems that ignore case, or through bind mounts), so files are compared
    as well.
    """
    if inner.is_relative_to(outer):
        return True
    try:
        there = outer.stat()
    except OSError:
        return False
    for place in (inner, *inner.parents):
        try:
            if os.path.samestat(place.stat(), there):
                return True
        except OSError:  # it does not exist yet
            continue
    return False


def _resolved(path: Path) -> Path:
    try:
        place = path.expanduser().resolve()
    except (OSError, RuntimeError) as error:  # a loop of links; a name that is too long
        raise RunError(f"'{path}' cannot be used as a path: {error}", remedy="give another path.") from error
    check_utf8(str(place))
    return place


def _with_links(path: Path) -> list[Path]:
    """Return a path and the files that its links lead to, all resolved."""
    place = _resolved(path)
    if not place.is_dir():
        return [place]
    return [place, *(_resolved(entry) for entry in place.iterdir() if entry.is_symlink())]


def _caches() -> list[tuple[str, Path]]:
    """Return where models and answers are cached for later commands."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or user / "huggingface") / "hub"
    return [
        ("the Hugging Face cache", Path(hub)),
        ("the cache of answers", Path(os.environ.get("BACKMERGE_CACHE") or user / "backmerge")),
    ]


def models_in(place: Path) -> list[Path]:
    """Return the models in a folder that backmerge wrote, without what a user put next to them."""
    if not place.is_dir():
        return []
    return sorted(directory for directory in place.iterdir() if (directory / MANIFEST).is_file())
