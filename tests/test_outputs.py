"""Outputs: apart from what is read, over nothing but what backmerge wrote, and as they were written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from backmerge.cli import app
from backmerge.errors import RunError
from backmerge.finetuning.settings import FinetuneSettings
from backmerge.merging.inputs import GatheredLayer, LayerInputs, Provenance, write_statistics
from backmerge.outputs import (
    check_apart,
    check_replaceable,
    damage_of,
    is_to_write,
    listed_files,
    paths_read,
    sealed_card,
)
from backmerge.reporting.merge_card import write_card
from backmerge.reporting.user_folder import added_to
from backmerge.runs import RunDirectory, whole_directory


def written(directory: Path, **files: str) -> Path:
    """Make a folder that backmerge wrote."""
    directory.mkdir(parents=True)
    for name, text in files.items():
        (directory / name).write_text(text)
    manifest = {"backmerge": "0.1", "files": listed_files(directory)}
    (directory / "backmerge.json").write_text(json.dumps(manifest))
    return directory


@pytest.mark.parametrize(
    "out", ["models", "models/base", "models/base/inner", "link", "models/../models/base", "blobs"]
)
def test_an_output_that_overlaps_what_is_read_is_refused(tmp_path: Path, out: str) -> None:
    """Above, at, inside; through links of the output and of the files that are read."""
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "one").write_text("weights")
    (base / "model.safetensors").symlink_to(tmp_path / "blobs" / "one")
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(RunError, match="this command reads"):
        check_apart(tmp_path / out, [base])
    check_apart(tmp_path / "models" / "other", [base])


def test_an_output_that_cannot_be_made_is_refused_before_work(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below a file, also before a guard's prompts are answered; in a folder that may not be written to."""
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("backmerge.pipeline.guarding.gathered_statistics", lambda *_: pytest.fail("too late"))
    asked = ["merge", str(tiny_base), str(tiny_base), "--method", "anchored", "--guard", "own", "--lam", "0.5"]
    for out in ("file/merged", "file/deep/merged"):
        done = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / out)])
        assert isinstance(done.exception, RunError), done.output
        assert f"is below {tmp_path / 'file'}, which is a file" in str(done.exception)
    monkeypatch.setattr("os.access", lambda path, _: path != tmp_path)
    with pytest.raises(RunError, match="may not be written to"):
        check_apart(tmp_path / "new" / "merged", [])
    check_apart(tmp_path / "file", [])


def test_a_user_s_own_places_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory, home, the root, what is above them, and the caches."""
    home, cache = tmp_path / "users" / "me", tmp_path / "cache"
    (home / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.chdir(home / "work")
    for place in (".", "..", str(tmp_path / "users"), "/", str(cache), str(cache / "hub" / "models--a--b")):
        with pytest.raises(RunError, match=r"above it|overlaps the Hugging Face cache"):
            check_apart(Path(place), [])
    check_apart(Path("out"), [])


def test_links_in_a_circle_are_one_message(tmp_path: Path) -> None:
    """A loop of links is the user's to fix."""
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(RunError, match="cannot be used as a path"):
        check_apart(tmp_path / "a" / "out", [])


def test_force_replaces_only_what_the_manifest_lists(tmp_path: Path) -> None:
    """A folder without manifest, one with a user's file in it, and a file are refused by name."""
    ours = written(tmp_path / "ours", weights="w")
    check_replaceable(ours)
    (ours / "README.md").write_text(sealed_card("the card"))
    check_replaceable(ours)
    (ours / "notes.txt").write_text("precious")
    with pytest.raises(RunError, match=r"notes\.txt"):
        check_replaceable(ours)
    (tmp_path / "theirs").mkdir()
    check_replaceable(tmp_path / "theirs")
    (tmp_path / "theirs" / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match=r"no backmerge\.json"):
        check_replaceable(tmp_path / "theirs")
    with pytest.raises(RunError, match="is a file"):
        check_replaceable(tmp_path / "theirs" / "thesis.tex")


@pytest.mark.parametrize(
    ("content", "found"), [(None, "missing"), ("", "0 bytes"), ("half", "4 bytes"), ("othertext", "was changed")]
)
def test_a_damaged_result_is_not_done(tmp_path: Path, content: str | None, found: str) -> None:
    """A file that is gone, cut or altered is named, and the same command does not take the result for done."""
    ours = written(tmp_path / "ours", weights="whole one")
    assert not is_to_write(ours, lambda: True, force=False)
    if content is None:
        (ours / "weights").unlink()
    else:
        (ours / "weights").write_text(content)
    assert found in str(damage_of(ours))
    with pytest.raises(RunError, match="damaged afterwards"):
        is_to_write(ours, lambda: True, force=False)
    assert is_to_write(ours, lambda: True, force=True)


def test_settings_report_the_files_that_they_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of data is found among the settings; a folder called like a method is not treated as one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "lora").mkdir()
    assert paths_read(FinetuneSettings(dataset="rows.jsonl")) == [Path("rows.jsonl")]


def test_no_command_deletes_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`finetune --force` with its data inside `--out`, and `merge --force` over its own models, are refused."""
    monkeypatch.chdir(tmp_path)
    out = written(tmp_path / "out", weights="w")
    (out / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    (out / "tuned").mkdir()
    for command in (
        ["finetune", "demo", "--data", "out/rows.jsonl", "--out", "out", "--force", "--safety", "none"],
        ["evaluate", "demo", "--utility", "out/rows.jsonl", "--out", "out"],
        ["score", "out/rows.jsonl", "--benchmark", "demo-plans", "--out", "out"],
    ):
        done = CliRunner().invoke(app, command)
        assert isinstance(done.exception, RunError), (command, done.output, done.exception)
        assert "this command reads" in str(done.exception)
        assert (out / "rows.jsonl").is_file()


def test_an_edited_card_is_kept_and_not_replaced(tmp_path: Path) -> None:
    """A card that a user wrote or edited keeps its text, under another name, when a new one is written."""
    ours = written(tmp_path / "ours", weights="w")
    write_card(ours, "first\n")
    write_card(ours, "second\n")
    assert sorted(path.name for path in ours.iterdir()) == ["README.md", "backmerge.json", "weights"]
    edited = (ours / "README.md").read_text().replace("second", "my own words")
    (ours / "README.md").write_text(edited)
    with pytest.raises(RunError, match=r"README\.md"):
        check_replaceable(ours)
    write_card(ours, "third\n")
    assert (ours / "README.earlier-1.md").read_text() == edited
    assert (ours / "README.md").read_text() == sealed_card("third\n")


def test_one_folder_under_two_names_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of one folder differ where a file system ignores case; here, as far as paths can tell, too."""
    (tmp_path / "models" / "base").mkdir(parents=True)
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **how: stat(Path(str(path).replace("Models", "models")), **how))
    for out in ("Models", "Models/base", "Models/base/inner"):
        with pytest.raises(RunError, match="this command reads"):
            check_apart(tmp_path / out, [tmp_path / "models" / "base"])
    check_apart(tmp_path / "Models" / "other", [tmp_path / "models" / "base"])


def test_experiment_file_alone_is_not_a_run_directory(tmp_path: Path) -> None:
    """A user's folder with an experiment.yaml of the user's is not treated as a run, whose settings are replaced."""
    (tmp_path / "experiment.yaml").write_text("base: mine\n")
    with pytest.raises(RunError, match="not a run directory"), RunDirectory(tmp_path).held():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["experiment.yaml"]


def test_leftovers_of_one_path_are_not_assigned_to_another(tmp_path: Path) -> None:
    """Of `lam-0` and `lam-0.2`, each gets back its own model that was moved aside."""
    kept = written(tmp_path / ".lam-0.2.77-0123abcd.old.partial", weights="w")
    with whole_directory(tmp_path / "lam-0") as place:
        (place / "weights").write_text("other")
    assert (tmp_path / "lam-0" / "weights").read_text() == "other"
    assert kept.is_dir()
    with pytest.raises(RunError, match="already exists"), whole_directory(tmp_path / "lam-0.2"):
        pass
    assert (tmp_path / "lam-0.2" / "weights").read_text() == "w"


def test_a_user_s_folder_takes_files_over_none_of_the_user_s(tmp_path: Path) -> None:
    """A comparison may be written again, but not over a file of that name that the user put there."""

    def add(**files: str) -> None:
        with added_to(tmp_path) as made:
            for name, text in files.items():
                (made / f"{name}.csv").write_text(text)

    add(a="old")
    add(a="new")
    assert (tmp_path / "a.csv").read_text() == "new"
    (tmp_path / "b.csv").write_text("precious")
    with pytest.raises(RunError, match=r"b\.csv already exists"):
        add(a="newest", b="other")
    assert (tmp_path / "a.csv").read_text() == "new"
    assert (tmp_path / "b.csv").read_text() == "precious"


def test_force_is_named_only_for_what_it_replaces(tmp_path: Path, tiny_base: Path) -> None:
    """`inputs` over its own earlier file names --force; over another file it does not."""
    out = tmp_path / "inputs.safetensors"
    asked = ["inputs", str(tiny_base), "--guard", "own", "--out", str(out)]
    out.write_text("mine")
    assert "--force" not in str(CliRunner().invoke(app, asked).exception)
    provenance = Provenance(
        model="m", kind="own", source="0", num_prompts=1, num_tokens=9, max_new_tokens=0, dtype="float32",
        max_directions=8,
    )  # fmt: skip
    inputs = LayerInputs(np.eye(3, dtype=np.float32), np.ones(3, np.float32))
    write_statistics(out, provenance, {"l": GatheredLayer(("l",), inputs)})
    done = CliRunner().invoke(app, asked)
    assert "give another --out, or --force to replace it." in str(done.exception)


@pytest.mark.parametrize("out", ["base/model.safetensors", "base/inputs.safetensors", "link.safetensors"])
def test_input_statistics_never_replace_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path, out: str
) -> None:
    """`inputs --force` refuses the model that it reads, also by a hard link, and any file that is not statistics."""
    monkeypatch.chdir(tmp_path)
    base = shutil.copytree(tiny_base, tmp_path / "base")
    weights = (base / "model.safetensors").read_bytes()
    (tmp_path / "link.safetensors").hardlink_to(base / "model.safetensors")
    done = CliRunner().invoke(app, ["inputs", "base", "--guard", "own", "--out", out, "--force"])
    assert isinstance(done.exception, RunError), done.output
    assert (base / "model.safetensors").read_bytes() == (tmp_path / "link.safetensors").read_bytes() == weights
    assert not (base / "inputs.safetensors").exists()


def test_a_path_that_is_not_utf8_is_refused_before_anything_is_read(
    run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an argument, and as the folder that relative paths belong to."""
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"caf\xe9")
    tuning = ("finetune", "demo", "--task", "demo-plans", "--out", f"{name}/t")
    for command in (("merge", "demo", name, "--out", "m"), tuning):
        code, _, said = run_cli(*command)
        assert code == 2
        assert "is not valid UTF-8" in said
        assert "caf\\xe9" in said
    assert list(tmp_path.iterdir()) == []
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    code, _, said = run_cli("merge", "demo", "demo", "--out", "m")
    assert (code, "is not valid UTF-8" in said) == (2, True)
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    code, _, said = run_cli("merge", "demo", "a b/\udcc3\udcbc", "--out", "m")
    assert (code, "'a b/ü'" in said, "PYTHONUTF8=1" in said) == (2, True, True)
