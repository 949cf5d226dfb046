"""Reading checkpoints: whole ones, and every way in which one can be damaged or hostile."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backmerge.checkpoints.adapter import open_weights
from backmerge.checkpoints.companions import copy_companions
from backmerge.checkpoints.locate import locate_model
from backmerge.checkpoints.reader import INDEX, SINGLE, Checkpoint, read_json
from backmerge.checkpoints.writer import write_weights
from backmerge.errors import CheckpointError


@pytest.fixture
def model(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of a model, to be damaged."""
    return shutil.copytree(tiny_base, tmp_path / "model")


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same model in two shards with an index."""
    tensors = load_file(model / SINGLE)
    names = sorted(tensors)
    halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, model / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in halves.items() for name in held}
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (model / SINGLE).unlink()
    return model


def index_of(directory: Path) -> dict[str, str]:
    """The index's weight map."""
    weight_map: dict[str, str] = read_json(directory / INDEX)["weight_map"]
    return weight_map


def write_index(directory: Path, weight_map: object) -> None:
    """Put another weight map in the index."""
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def refused(directory: Path, words: str) -> None:
    """The checkpoint is refused with those words, the folder's name, and a remedy."""
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint(directory)
    assert directory.name in caught.value.message
    assert caught.value.remedy


def test_tensors_are_read_as_stored(model: Path) -> None:
    """Names, shapes, dtypes and values are those that safetensors gives."""
    weights = Checkpoint(model)
    expected = load_file(model / SINGLE)
    assert weights.infos.keys() == expected.keys()
    for name, tensor in expected.items():
        assert weights.infos[name].shape == tuple(tensor.shape)
        assert weights.infos[name].dtype == "F32"
        assert torch.equal(weights.tensor(name).view(torch.int32), tensor.view(torch.int32))


def test_shards_are_one_model(sharded: Path, tiny_base: Path) -> None:
    """Two shards hold what the single file held, and the files' names may be anything plain."""
    pieces, whole = Checkpoint(sharded), Checkpoint(tiny_base)
    assert pieces.infos.keys() == whole.infos.keys()
    assert all(torch.equal(pieces.tensor(name), whole.tensor(name)) for name in whole.infos)


def test_symbolic_links_are_followed(model: Path, tmp_path: Path) -> None:
    """A folder of links, as in the hub's cache, is read and copied from like any other."""
    linked, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    linked.mkdir(parents=True)
    blobs.mkdir()
    for file in model.iterdir():
        shutil.copyfile(file, blobs / file.name)
        (linked / file.name).symlink_to(os.path.relpath(blobs / file.name, linked))
    assert Checkpoint(linked).fingerprint == Checkpoint(model).fingerprint
    target = tmp_path / "target"
    target.mkdir()
    copy_companions(linked, target)
    assert not (target / "config.json").is_symlink()
    assert (target / "config.json").read_bytes() == (model / "config.json").read_bytes()


def test_a_truncated_file_is_refused(model: Path) -> None:
    """Every length short of the whole is found when the file is opened: in the data, in the header, or at 0."""
    whole = (model / SINGLE).read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 300, 8, 7, 0):
        (model / SINGLE).write_bytes(whole[:length])
        refused(model, "not a complete safetensors file")


def test_trailing_bytes_are_refused(model: Path) -> None:
    """A file with more data than its header describes is not treated as whole."""
    with (model / SINGLE).open("ab") as stream:
        stream.write(b"\0" * 8)
    refused(model, "not a complete safetensors file")


@pytest.mark.parametrize(
    "damage", [b"\xff" * 8, b"\0" * 8, b'\x02\0\0\0\0\0\0\0{"', b"<html>not found</html>", b"version https://git-lfs"]
)
def test_a_corrupt_header_is_refused(model: Path, damage: bytes) -> None:
    """A header of impossible length, or a web page or git-lfs pointer in the weights' place, is refused."""
    whole = (model / SINGLE).read_bytes()
    (model / SINGLE).write_bytes(damage + whole[len(damage) :] if damage[:1] != b"<" else damage)
    refused(model, "not a complete safetensors file")


@pytest.mark.parametrize("shift", [-4, 4])
def test_offsets_that_overlap_or_leave_a_gap_are_refused(model: Path, shift: int) -> None:
    """Two tensors on the same bytes, or bytes of no tensor, are no checkpoint."""
    whole = (model / SINGLE).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    placed = sorted((entry["data_offsets"][0], name) for name, entry in header.items() if name != "__metadata__")
    header[placed[1][1]]["data_offsets"][0] += shift
    text = json.dumps(header).encode()
    (model / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    refused(model, "not a complete safetensors file")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    """An index whose shard is not there yet is an incomplete download."""
    (sharded / "two.safetensors").unlink()
    refused(sharded, "two.safetensors is missing")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", "x.bin", "x.safetensors/.."]
)
def test_an_index_names_plain_files_only(sharded: Path, tmp_path: Path, name: str) -> None:
    """Law 12: an index cannot reach outside its folder, even where such a file exists, nor name a pickle."""
    shutil.copy(sharded / "one.safetensors", tmp_path / "x.safetensors")
    weight_map = index_of(sharded)
    write_index(sharded, {**weight_map, next(iter(weight_map)): name})
    refused(sharded, "not a plain .safetensors name")


@pytest.mark.parametrize("weight_map", [None, [], "x", {"a": 1}, {"a": None}])
def test_an_index_without_a_map_is_refused(sharded: Path, weight_map: object) -> None:
    """An index of another form is refused before any file is opened."""
    write_index(sharded, weight_map)
    refused(sharded, "has no weight_map")


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    """Which of the two is meant cannot be known."""
    name = index_of(sharded).copy().popitem()[0]
    for file in ("one.safetensors", "two.safetensors"):
        tensors = load_file(sharded / file)
        save_file({**tensors, name: torch.ones(2)}, sharded / file)
    refused(sharded, f"'{name}' is in both one.safetensors and two.safetensors")


@pytest.mark.parametrize("fault", ["listed but missing", "held but not named", "in the other shard"])
def test_an_index_must_describe_its_shards(sharded: Path, fault: str) -> None:
    """Shards of another model under an old index are found, tensor by tensor."""
    weight_map = index_of(sharded)
    name = min(weight_map)
    if fault == "listed but missing":
        weight_map["model.absent.weight"] = "one.safetensors"
    elif fault == "held but not named":
        del weight_map[name]
    else:
        weight_map[name] = "two.safetensors"
    write_index(sharded, weight_map)
    refused(sharded, "does not describe its shards: 1 tensors")


def test_two_models_in_one_folder_are_refused(sharded: Path, tiny_tuned: Path) -> None:
    """Transformers loads model.safetensors before an index, so live and written merges would start from two models."""
    shutil.copy(tiny_tuned / SINGLE, sharded / SINGLE)
    refused(sharded, "transformers would load the former")


def test_an_index_of_the_single_file_is_one_model(model: Path) -> None:
    """An index that names only model.safetensors itself is not a contradiction."""
    write_index(model, dict.fromkeys(load_file(model / SINGLE), SINGLE))
    assert Checkpoint(model).infos


def test_checkpoint_without_tensors_is_refused(model: Path) -> None:
    """An empty file, or an index of nothing, is not merged into an empty model."""
    save_file({}, model / SINGLE)
    refused(model, "contains no tensors")
    write_index(model, {})
    (model / SINGLE).unlink()
    refused(model, "contains no tensors")


def test_pickles_are_not_read(model: Path) -> None:
    """Law 12: a folder with a pickle only is refused, and the pickle is not opened."""
    (model / SINGLE).unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    refused(model, "its pytorch_model.bin are pickles, which can run code")


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    """A folder without config.json, or with one that is not JSON, says so."""
    refused(tmp_path, "has no config.json")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "has no safetensors")
    (tmp_path / "x.json").write_text("[1, 2")
    with pytest.raises(CheckpointError, match=r"cannot read .*x\.json"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_json(tmp_path / "x.json")


def test_fingerprint_covers_everything_that_decides_the_answers(model: Path) -> None:
    """It changes with any bit of weights, config, tokenizer or template, and not with what is next to them."""
    before = Checkpoint(model).fingerprint
    (model / "README.md").write_text("words")
    (model / "backmerge.json").write_text("{}")
    (model / "folder.json").mkdir()
    assert Checkpoint(model).fingerprint == before
    seen = {before}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"):
        with (model / name).open("a") as stream:
            stream.write(" ")
        seen.add(Checkpoint(model).fingerprint)
    whole = bytearray((model / SINGLE).read_bytes())
    whole[-1] ^= 1
    (model / SINGLE).write_bytes(whole)
    seen.add(Checkpoint(model).fingerprint)
    assert len(seen) == 7


def test_fingerprint_changes_if_bytes_are_moved(model: Path) -> None:
    """Moving bytes from the end of one file to the start of the next makes another model."""
    for name, text in (("a.json", "[1]"), ("b.json", "[2]")):
        (model / name).write_text(text)
    before = Checkpoint(model).fingerprint
    for name, text in (("a.json", "[1][2"), ("b.json", "]")):
        (model / name).write_text(text)
    assert Checkpoint(model).fingerprint != before


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
)
def test_every_dtype_is_written_as_it_was(tmp_path: Path, dtype: str) -> None:
    """What is written reads back bit for bit, by us and by safetensors: odd sizes, scalars and empty tensors too."""
    kind = getattr(torch, dtype)
    tensors = {
        "odd": torch.arange(3).to(kind),
        "grid": torch.arange(6).reshape(2, 3).to(kind),
        "transposed": torch.arange(6).reshape(2, 3).to(kind).T,
        "scalar": torch.tensor(1).to(kind),
        "none": torch.zeros(0, 4).to(kind),
    }
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, source / SINGLE)
    infos = Checkpoint(source).infos
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("{}")
    write_weights(target, infos, ((name, tensors[name]) for name in infos))
    again, official = Checkpoint(target), load_file(target / SINGLE)
    for name, tensor in tensors.items():
        assert again.tensor(name).dtype == official[name].dtype == kind
        assert torch.equal(again.tensor(name), tensor)
        assert torch.equal(official[name], tensor)


def test_a_dtype_that_has_no_mean_is_refused(model: Path, tmp_path: Path) -> None:
    """A quantised tensor is named with its dtype before anything is written."""
    save_file({"model.weight": torch.ones(4).to(torch.float8_e4m3fn)}, model / SINGLE)
    target = tmp_path / "target"
    target.mkdir()
    weights = Checkpoint(model)
    with pytest.raises(CheckpointError, match=r"'model.weight' .* has dtype F8_E4M3"):
        write_weights(target, weights.infos, ((name, weights.tensor(name)) for name in weights.infos))
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("name", ["./no-such-folder", "no-such-name", "/no/such", "a/b/c", "a b/c", "owner/na me"])
def test_a_model_that_is_not_there(name: str) -> None:
    """A folder that does not exist, and what is no hub id either, is refused without asking the hub."""
    with pytest.raises(CheckpointError, match="there is no model folder"):
        locate_model(name)


@pytest.mark.parametrize("name", ["some-owner/some-model", "owner/model.git", "owner/a--b", "owner/name@main"])
def test_a_hub_that_does_not_answer(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Offline, and for ids that the hub's own client refuses, one clear line with the remedy."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"could not be downloaded from the Hugging Face hub: .+") as caught:
        locate_model(name)
    assert "hf auth login" in (caught.value.remedy or "")


def test_a_folder_is_found_before_the_hub_is_asked(
    model: Path, monkeypatch: pytest.MonkeyPatch, make_adapter: Callable[..., Path]
) -> None:
    """`owner/name` that is a folder here is that folder; a full checkpoint opens as one."""
    monkeypatch.chdir(model.parent.parent)
    assert locate_model(f"{model.parent.name}/{model.name}") == model.resolve()
    assert isinstance(open_weights(model, Checkpoint(model)), Checkpoint)
