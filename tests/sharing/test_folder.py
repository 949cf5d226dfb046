"""What of a model's folder may go: an allow-list of whole files, of the very weights that were measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from backmerge.checkpoints.reader import Checkpoint
from backmerge.errors import BackmergeError, CheckpointError, RunError
from backmerge.merging.lowrank import write_adapters
from backmerge.merging.recipe import Variant
from backmerge.sharing.folder import is_folder_name, last_part, model_in, package_of, without_folders

from .models import finished_run

# what a run or a user may have next to a model, and nobody else shall see
SECRETS = (
    "records.jsonl",
    "completions-0123.jsonl",
    "modeling_custom.py",
    "pytorch_model.bin",
    "optimizer.pt",
    "training_args.bin",
    "scaler.pkl",
    "LICENSE.py",
    "tokenizer.json.123-abc.partial",
    "model-00009-of-00009.safetensors.partial",
    ".env",
    "log.txt.bak",
)


def names(model: Path) -> set[str]:
    """What goes."""
    return {file.name for file in package_of(model).files}


def test_what_makes_a_model_goes(model: Path) -> None:
    """Every shard with the index, configuration, tokenizer with its template, card and recipe."""
    package = package_of(model)
    shards = {file.name for file in model.glob("*.safetensors")}
    assert len(shards) > 1
    wanted = {"model.safetensors.index.json", "config.json", "tokenizer.json", "README.md", "backmerge.json"}
    assert shards | wanted <= {file.name for file in package.files}
    assert {path.name for path in model.iterdir()} == {file.name for file in package.files}
    assert package.is_confirmed
    assert package.kept == ()
    assert package.size == sum(file.stat().st_size for file in model.iterdir())


@pytest.mark.parametrize("name", SECRETS)
def test_nothing_else_goes(model: Path, name: str) -> None:
    """Records, answers, code, pickles and halves of files stay, and are named as staying."""
    (model / name).write_text("not for others")
    package = package_of(model)
    assert name not in {file.name for file in package.files}
    assert name in package.kept


def test_folders_within_stay(model: Path) -> None:
    """Nothing below the model's own folder goes, whatever it is called."""
    (model / "records").mkdir()
    (model / "records" / "config.json").write_text("{}")
    assert names(model) == {path.name for path in model.iterdir()} - {"records"}


def test_a_shard_that_no_index_names_stays(model: Path) -> None:
    """Weights that are not part of the model would be loaded by nobody, or in its place."""
    shutil.copyfile(next(model.glob("*.safetensors")), model / "model-00042-of-00042.safetensors")
    assert "model-00042-of-00042.safetensors" not in names(model)


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        ("model-00001-of-", "is missing, though"),
        ("model.safetensors.index.json", "has no safetensors"),
        ("config.json", "has no config.json"),
        ("README.md", "has no README.md"),
        ("backmerge.json", "has no backmerge.json"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(model: Path, lost: str, told: str) -> None:
    """Each part that is missing is named."""
    for path in model.iterdir():
        if path.name.startswith(lost):
            path.unlink()
    with pytest.raises(CheckpointError, match=told):
        package_of(model)


def test_a_torn_shard_is_refused(model: Path) -> None:
    """A file that is shorter than its header says is not a model."""
    shard = next(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        package_of(model)


@pytest.mark.parametrize("name", ["weights", "config.json", "tokenizer_config.json", "samples.json"])
def test_a_model_that_was_changed_since_is_refused(model: Path, name: str) -> None:
    """What was found is of the model as it was written: one other byte or file of its kind, and it is another."""
    if name == "weights":
        shard = next(model.glob("*.safetensors"))
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    else:
        values = json.loads((model / name).read_text()) if (model / name).exists() else {}
        (model / name).write_text(json.dumps(values | {"added": 1}))
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        package_of(model)


def test_a_card_of_other_weights_is_refused(tmp_path: Path, tiny_base: Path, tiny_tuned: Path) -> None:
    """A confirmed model's card put next to another model doesn't confirm that one."""
    run = finished_run(
        tmp_path / "run", tiny_base, tiny_tuned, tuned=("a", "b"), own_verdicts=("restored", "not shown")
    )
    good, bad = run / "merged" / "a", run / "unconfirmed" / "b"
    assert package_of(good).is_confirmed
    assert not package_of(bad).is_confirmed
    shutil.copyfile(good / "README.md", bad / "README.md")
    with pytest.raises(CheckpointError, match="but for other weights"):
        package_of(bad)


def test_a_card_of_one_s_own_confirms_nothing(model: Path) -> None:
    """Without what a run writes into it, a card is words."""
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Confirmed: perfectly safe\n")
    assert not package_of(model).is_confirmed


def test_an_adapter_may_go(tmp_path: Path, make_model: Any, make_adapter: Any) -> None:
    """A merge that is an adapter goes as its two files, and a folder on this machine is not named as its base."""
    base = make_model("llama", seed=1)
    adapter = make_adapter(base)
    from backmerge.checkpoints.adapter import AdapterOnBase

    weights = Checkpoint(base)
    out = tmp_path / "adapter"
    write_adapters({out: Variant(weights, AdapterOnBase(adapter, weights), lam=0.5)})
    (out / "README.md").write_text("# An adapter\n")
    package = package_of(out)
    files = {file.name: file.content for file in package.files}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "backmerge.json"} <= files.keys()
    assert str(base) in (out / "adapter_config.json").read_text()
    sent = files["adapter_config.json"]
    assert isinstance(sent, bytes)
    assert json.loads(sent)["base_model_name_or_path"] == base.name
    assert str(base).encode() not in sent
    assert not package.is_confirmed


def test_tuned_model_is_not_accepted_as_a_merged_model(tmp_path: Path, model: Path) -> None:
    """The tuned side was measured to be unsafe: its folder has a note of backmerge, too, but no recipe."""
    (model / "backmerge.json").write_text(json.dumps({"base": "/home/alice/base", "key": "0"}))
    with pytest.raises(CheckpointError, match="is not a merged model"):
        package_of(model)


def test_local_folders_are_not_shown(model: Path) -> None:
    """What backmerge.json says of places goes by their last part; the file here stays as it is."""
    file = model / "backmerge.json"
    values = json.loads(file.read_text())
    values["recipe"]["parameters"] = {"mask": "/home/alice/secret/mask.pt", "near": "../alice/x", "share": 0.5}
    file.write_text(json.dumps(values))
    before = file.read_bytes()
    (sent,) = [each.content for each in package_of(model).files if each.name == "backmerge.json"]
    assert isinstance(sent, bytes)
    assert b"alice" not in sent
    assert json.loads(sent)["recipe"]["parameters"] == {"mask": "mask.pt", "near": "x", "share": 0.5}
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/alice/models/base", "base"),
        ("/home/alice/models/base/", "base"),
        ("~/models/base", "base"),
        ("./base", "base"),
        ("../alice/base", "base"),
        ("C:\\Users\\alice\\base", "base"),
        ("file:///home/alice/base", "base"),
        ("someone/aligned-7b", None),
        ("linear", None),
        ("42848bddea63d5d56b060a246187c4ef", None),
        ("", None),
    ],
)
def test_paths_are_distinguished_from_names(text: str, expected: str | None) -> None:
    """Hub ids, methods and hashes are not places; what leads anywhere on a machine is one."""
    assert is_folder_name(text) is (expected is not None)
    if expected is not None:
        assert last_part(text) == expected


def test_tokens_and_templates_are_not_paths() -> None:
    """In files of others only a model's origin is shortened: a token may begin with a slash."""
    values = {"_name_or_path": "/home/alice/base", "prefix": "/s", "extra": [{"content": "/inst"}, "/x"]}
    assert without_folders(values, is_ours=False) == values | {"_name_or_path": "base"}
    assert without_folders(values, is_ours=True)["prefix"] == "s"


def test_run_means_its_only_model(run: Path, model: Path) -> None:
    """One model in merged/ needs no naming; a model's own folder is itself."""
    assert model_in(run) == model
    assert model_in(model) == model


def test_of_several_models_one_must_be_named(tmp_path: Path, tiny_base: Path, tiny_tuned: Path) -> None:
    """The names are listed, and the command to give."""
    run = finished_run(tmp_path / "run", tiny_base, tiny_tuned, tuned=("a", "b"))
    with pytest.raises(RunError, match=r"has 2 models to choose from: a, b") as error:
        model_in(run)
    assert str(run / "merged" / "a") in str(error.value.remedy)


def test_unconfirmed_model_is_accepted_only_with_the_option(tmp_path: Path, tiny_base: Path, tiny_tuned: Path) -> None:
    """A run without a confirmed model stands for none, unless asked otherwise."""
    run = finished_run(tmp_path / "run", tiny_base, tiny_tuned, verdict="not shown")
    with pytest.raises(RunError, match=r"no model in merged/; 1 in unconfirmed/ were not shown to be safe"):
        model_in(run)
    assert model_in(run, may_be_unconfirmed=True) == run / "unconfirmed" / "seed-1"


@pytest.mark.parametrize(("made", "told"), [((), "does not exist"), (("notes.txt",), "neither a model's folder")])
def test_folders_without_a_model_are_refused(tmp_path: Path, made: tuple[str, ...], told: str) -> None:
    """A folder that is missing, or that holds something else."""
    place = tmp_path / "place"
    for name in made:
        place.mkdir(exist_ok=True)
        (place / name).write_text("")
    with pytest.raises(BackmergeError, match=told):
        model_in(place)
