"""What a cleaned run loses and what it keeps; nothing that is not a run's own is ever removed."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backmerge.config import Document, validated
from backmerge.errors import ConfigError, RunError
from backmerge.generation.cache import cache_directory
from backmerge.pipeline.cleaning import PARTS, cached_answers, clean, clean_cache, space_of, to_remove
from backmerge.runs import PARTIAL

# what is always there afterwards
ALWAYS = ("experiment.yaml", "results.json", "samples.json", "log.txt", "sessions.jsonl", "labels/to_label.csv")
FILES = {
    "units": ("units/completions-a.jsonl", "answered.jsonl", "answered-model.jsonl", "layers.journal", "workers/0.log"),
    "records": ("records/completions.jsonl",),
    "training": ("tuned/.seed-1.training-abc/checkpoint-10/weights.bin",),
    "snapshots": ("tuned/seed-1/snapshots/step-10/adapter_model.safetensors",),
    "tuned": ("tuned/seed-1/adapter_model.safetensors", "tuned/seed-1/backmerge.json"),
    "unconfirmed": ("unconfirmed/seed-1/model.safetensors", "unconfirmed/seed-1/backmerge.json"),
    "merged": ("merged/seed-2/model.safetensors", "merged/seed-2/backmerge.json"),
    "report": ("report.html", "scores.csv", "summary.csv", "plots/curves.png"),
    "earlier": ("earlier/1/results.json", "earlier/1/merged/seed-1/model.safetensors"),
    "partial": (f"units/x.1-2{PARTIAL}", f"unconfirmed/.seed-1.3-4{PARTIAL}/model.safetensors"),
}
FOREIGN = ("notes.txt", "merged/mine/model.safetensors", "units/mine.txt", "tuned/README.md")


def fill(place: Path) -> Path:
    """A finished run with something of every part, each file of 100 bytes, and files of the user's own."""
    for name in (*ALWAYS, *(file for files in FILES.values() for file in files), *FOREIGN):
        file = place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x" * 100)
    (place / "experiment.yaml").write_text("base: demo\n".ljust(100))
    return place


def there(place: Path) -> set[str]:
    """Every file, but those that holding a run makes."""
    names = {str(file.relative_to(place)) for file in place.rglob("*") if file.is_file()}
    return names - {".lock", ".gitignore"}


def files_of(*parts: str) -> set[str]:
    """The files of these parts."""
    return {file for part in parts for file in FILES[part]}


def test_every_part_is_found_with_its_size(tmp_path: Path) -> None:
    """Each file counts once, in the innermost part that it belongs to; looking changes nothing."""
    run = fill(tmp_path / "run")
    before = there(run)
    sizes = {space.part.name: space.num_bytes for space in space_of(run)}
    assert sizes == {name: 100 * len(files) for name, files in FILES.items()}
    assert {part.name for part in PARTS} == FILES.keys()
    assert there(run) == before


@pytest.mark.parametrize(
    ("kept", "gone"),
    [
        (None, {"units", "training", "unconfirmed", "partial"}),
        (["merged", "report"], FILES.keys() - {"merged", "report"}),
        (["snapshots"], FILES.keys() - {"snapshots", "tuned"}),
        (["tuned"], FILES.keys() - {"tuned"}),
        ([], FILES.keys()),
    ],
)
def test_removed_and_kept_parts(kept: list[str] | None, gone: set[str], tmp_path: Path) -> None:
    """Exactly the parts that are not kept; settings, results, log, labels and the user's own files always stay."""
    run = fill(tmp_path / "run")
    before = there(run)
    freed = clean(run, kept)
    left = before - files_of(*gone)
    # what lies in a tuned model's folder goes with it
    assert there(run) == left
    assert there(run) >= {*ALWAYS, *FOREIGN}
    assert freed == 100 * len(files_of(*gone))
    assert "cleaned: " in (run / "log.txt").read_text()


def test_a_second_time_there_is_nothing(tmp_path: Path) -> None:
    """Cleaning is idempotent."""
    run = fill(tmp_path / "run")
    clean(run, None)
    assert to_remove(space_of(run), None) == []
    assert clean(run, None) == 0


@pytest.mark.parametrize("name", ["experiment.yaml", "results.json"])
def test_unfinished_runs_are_not_touched(name: str, tmp_path: Path) -> None:
    """A folder without settings is somebody else's; a run without results lives by its units."""
    run = fill(tmp_path / "run")
    (run / name).unlink()
    before = there(run)
    with pytest.raises(RunError, match="nothing was changed"):
        clean(run, None)
    assert there(run) == before
    with pytest.raises(RunError, match="not a run directory"):
        clean(tmp_path / "nowhere", None)
    assert not (tmp_path / "nowhere").exists()


def test_unneeded_files_of_an_unfinished_run_are_removed(tmp_path: Path) -> None:
    """Its work kept, the rest may go."""
    run = fill(tmp_path / "run")
    (run / "results.json").unlink()
    clean(run, ["units", "training", "tuned", "snapshots"])
    assert there(run) >= files_of("units", "training", "tuned", "snapshots")
    assert not there(run) & files_of("records", "merged", "report")


def test_run_in_use_is_not_changed(tmp_path: Path) -> None:
    """Another process holds it: nothing is removed under its hands."""
    run = fill(tmp_path / "run")
    before = there(run)
    with (run / ".lock").open("a+") as lock:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process is using"):
            clean(run, None)
    assert there(run) == before


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A part that was moved elsewhere by a link is not emptied there; a link to a model next to it stays the user's."""
    run = fill(tmp_path / "run")
    remote = tmp_path / "elsewhere"
    for part in ("units", "unconfirmed", "records"):
        shutil.move(run / part, remote / part)
        (run / part).symlink_to(remote / part)
    (run / "plots" / "big").symlink_to(remote)
    (run / "merged" / "best").symlink_to("seed-2")
    before = there(remote)
    clean(run, [])
    assert there(remote) == before
    assert not (run / "plots").exists()
    assert (run / "merged" / "best").is_symlink()


def test_an_unknown_part_is_an_error(tmp_path: Path) -> None:
    """A misspelt name must not let the part go that it meant."""
    run = fill(tmp_path / "run")
    with pytest.raises(ConfigError, match="did you mean 'merged'"):
        clean(run, ["mergd"])
    assert there(run) >= files_of(*FILES)


def test_a_cleaned_run_given_again_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers are made again, and its results are the same to the byte."""
    from backmerge.pipeline.single import SingleEvaluation, evaluate_model

    evaluate = {"safety": ["demo-harmful"], "judge": "demo-rule", "limit": 10, "engine": {"device": "cpu"}}
    values: dict[str, Any] = {"model": "demo", "evaluate": {**evaluate, "cache": False}}
    settings = validated(SingleEvaluation, Document("the test", values, {}))
    run = tmp_path / "run"
    evaluate_model(settings, run)
    before = (run / "results.json").read_bytes()
    clean(run, None)
    assert list((run / "units").iterdir()) == []
    assert json.loads(before)["scores"]
    made: list[int] = []
    from backmerge.generation.transformers_engine import TransformersEngine

    generate: Callable[..., Any] = TransformersEngine.generate
    monkeypatch.setattr(TransformersEngine, "generate", lambda *args: made.append(1) or generate(*args))
    evaluate_model(settings, run)
    assert made
    assert (run / "results.json").read_bytes() == before


def test_only_cached_answers_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files by the cache's own names alone, wherever the variable points."""
    monkeypatch.setenv("BACKMERGE_CACHE", str(tmp_path))
    assert cached_answers() == []
    folder = cache_directory() / "completions"
    folder.mkdir()
    for name in ("0" * 32 + ".jsonl", "f" * 32 + ".jsonl", "mine.jsonl", "0" * 32 + ".txt"):
        (folder / name).write_text("y" * 10)
    (tmp_path / "other.jsonl").write_text("z")
    assert clean_cache() == 20
    assert sorted(file.name for file in folder.iterdir()) == ["0" * 32 + ".txt", "mine.jsonl"]
    assert (tmp_path / "other.jsonl").exists()
