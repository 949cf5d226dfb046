"""Find the one model that a user's argument means: a model's folder, or a run."""

from __future__ import annotations

from pathlib import Path

from backmerge.checkpoints.adapter_config import CONFIG as ADAPTER_CONFIG
from backmerge.errors import RunError


def model_in(directory: Path, *, may_be_unconfirmed: bool = False) -> Path:
    """Return the folder of the model.

    Args:
        directory: A merged model's folder; or a run with one model in its `merged/`.
        may_be_unconfirmed: Whether the model may be the one in a run's `unconfirmed/` if `merged/` is empty.

    Raises:
        RunError: the folder does not exist, or the run has no such model, or several.
    """
    if not directory.is_dir():
        raise RunError(f"{directory} does not exist", remedy="give a merged model's folder, or a run.")
    if (directory / "config.json").is_file() or (directory / ADAPTER_CONFIG).is_file():
        return directory
    if not (directory / "experiment.yaml").is_file():
        raise RunError(
            f"{directory} is neither a model's folder nor a run: it has no config.json and no experiment.yaml",
            remedy="give RUN or RUN/merged/NAME.",
        )
    merged, unconfirmed = _models(directory / "merged"), _models(directory / "unconfirmed")
    found = merged or (unconfirmed if may_be_unconfirmed else [])
    if len(found) == 1:
        return found[0]
    if found:
        raise RunError(
            f"{directory} has {len(found)} such models: {', '.join(path.name for path in found)}",
            remedy=f"give one of them: {found[0]}.",
        )
    held = f"; {len(unconfirmed)} in unconfirmed/ were not shown to be safe" if unconfirmed else ""
    raise RunError(
        f"{directory} has no model in merged/{held}",
        remedy="read its report.html; --unconfirmed sends a model whose card says that it is not confirmed."
        if unconfirmed
        else "the run is not finished, or chose no λ: read its report.html, or run its command again.",
    )


def _models(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
