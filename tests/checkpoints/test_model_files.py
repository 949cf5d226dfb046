"""A model's own files: settings of the wrong kind, names of wrappers, dead links, packed numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from backmerge.checkpoints.adapter import open_weights
from backmerge.checkpoints.companions import copy_companions
from backmerge.checkpoints.locate import locate_model
from backmerge.checkpoints.model_config import read_json
from backmerge.checkpoints.reader import Checkpoint
from backmerge.errors import BackmergeError, CheckpointError, GenerationError
from backmerge.generation import chat
from backmerge.generation.chat import load_tokenizer
from backmerge.generation.loading import load_model

ModelFactory = Callable[..., Path]


@pytest.fixture
def model(make_model: ModelFactory, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(make_model("llama"), tmp_path / "model"))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def rename(folder: Path, name: Callable[[str], str | None]) -> None:
    """Give tensors other names; leave out those without one."""
    file = folder / "model.safetensors"
    tensors = {new: tensor for old, tensor in load_file(file).items() if (new := name(old))}
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
def test_names_of_wrappers_are_refused_and_merge_writes_plain_ones(model: Path, prefix: str) -> None:
    """Loaded, such a folder would be random numbers; the remedy reads its tensors by the model's own names."""
    names = set(load_file(model / "model.safetensors"))
    rename(model, lambda name: prefix + name)
    with pytest.raises(CheckpointError, match="random numbers") as caught:
        Checkpoint(model)
    assert "backmerge merge" in str(caught.value.remedy)
    unwrapped = Checkpoint(model, unwrap=True)
    assert set(unwrapped.infos) == names
    assert unwrapped.tensor("model.norm.weight").numel() == 32


def test_missing_tensor_is_never_random(model: Path) -> None:
    """A hole in a layer is refused when the model is loaded."""
    rename(model, lambda name: None if name.endswith("layers.1.mlp.up_proj.weight") else name)
    with pytest.raises(GenerationError, match=r"missing, such as 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_model(model, "auto")


def test_unknown_tensor_is_refused(model: Path) -> None:
    """A tensor that the architecture has no place for is named."""
    rename(model, lambda name: "score.weight" if name == "lm_head.weight" else name)
    with pytest.raises(GenerationError, match=r"unknown to it, such as 'score\.weight'"):
        load_model(model, "auto")


def test_other_shape_is_refused(model: Path) -> None:
    """A config of another width names the tensor and both shapes."""
    edit(model / "config.json", lambda v: v.update(intermediate_size=40))
    with pytest.raises(GenerationError, match=r"\(48, 32\) on disk and \(40, 32\) in it"):
        load_model(model, "auto")


def test_missing_layers_are_refused_unloaded(model: Path) -> None:
    """Whoever opens the weights, merge too, learns that layers are missing."""
    edit(model / "config.json", lambda v: v.update(num_hidden_layers=4, layer_types=None))
    with pytest.raises(CheckpointError, match=r"tensors of 2 layers, but its config\.json describes 4"):
        Checkpoint(model)


def test_another_vocabulary_is_refused_unloaded(model: Path) -> None:
    """The rows of the embeddings and vocab_size must agree."""
    edit(model / "config.json", lambda v: v.update(vocab_size=1088))
    with pytest.raises(CheckpointError, match=r"vocab_size of 1088, but .* has 300 rows"):
        Checkpoint(model)


def test_config_of_a_giant_takes_no_memory(model: Path) -> None:
    """Sizes far beyond the weights are refused before memory is taken for them."""
    edit(model / "config.json", lambda v: v.update(intermediate_size=10**9))
    with pytest.raises(GenerationError, match="describes a model of"):
        load_model(model, "auto")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"num_hidden_layers": "two"}),
        ("config.json", {"max_position_embeddings": [1]}),
        ("config.json", {"rms_norm_eps": "small"}),
        ("config.json", {"hidden_act": 7}),
        ("generation_config.json", {"eos_token_id": {"a": 1}}),
        ("tokenizer_config.json", {"chat_template": 5}),
        ("tokenizer_config.json", {"eos_token": [1, 2]}),
        ("tokenizer.json", {"model": {"type": "NewBPE"}}),
    ],
)
def test_wrong_kinds_of_value_are_one_clear_error(model: Path, file: str, change: dict[str, Any]) -> None:
    """Whatever a library would fail with, the message names the folder, and is short."""
    edit(model / file, lambda v: v.update(change))
    load: Callable[[Path], object] = (
        load_tokenizer if file.startswith("tokenizer") else lambda folder: load_model(folder, "auto")
    )
    with pytest.raises(BackmergeError) as caught:
        load(model)
    assert str(model) in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_deep_nesting_is_a_clear_error(tmp_path: Path) -> None:
    """JSON that no recursion can read ends no command with a traceback."""
    (tmp_path / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        read_json(tmp_path / "config.json")


def test_a_tokenizer_without_pad_and_eos_still_pads(model: Path) -> None:
    """Any token will do, since what is padded is masked."""
    edit(model / "tokenizer_config.json", lambda v: [v.pop("pad_token"), v.pop("eos_token")])
    tokenizer = load_tokenizer(model)
    assert tokenizer.pad_token_id is not None


def test_dead_link_of_a_hub_cache_is_named(tmp_path: Path, make_model: ModelFactory) -> None:
    """The remedy fetches the repository again."""
    snapshot = tmp_path / "models--me--it" / "snapshots" / "abc"
    shutil.copytree(make_model("llama"), snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../blobs/gone")
    with pytest.raises(CheckpointError, match="which does not exist") as caught:
        locate_model(str(snapshot))
    assert "hf download me/it" in str(caught.value.remedy)


def test_quantised_base_is_the_cause_that_is_named(model: Path, make_adapter: ModelFactory) -> None:
    """An adapter on packed numbers is refused for these, not for another base."""
    adapter = make_adapter(model)
    base = Checkpoint(model)
    edit(model / "config.json", lambda v: v.update(quantization_config={"quant_method": "bitsandbytes"}))
    with pytest.raises(CheckpointError, match=r"quantised \(bitsandbytes\)"):
        open_weights(adapter, base)


@pytest.mark.parametrize(
    "template",
    ["{{ 'a' * 6000000000 }}", "{% for a in range(99999) %}{% for b in range(99999) %}" + 2 * "{% endfor %}"],
)
def test_template_without_bounds_is_refused(model: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped in a separate process, long before it fills the memory of this one."""
    assert "(10, 10)" in chat.PROBE
    monkeypatch.setattr(chat, "PROBE", chat.PROBE.replace("(10, 10)", "(1, 1)"))  # seconds
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(GenerationError, match="too much memory or time"):
        load_tokenizer(model)


def test_link_out_of_the_model_is_not_copied(model: Path, tmp_path: Path) -> None:
    """Whatever it points to would become part of the merged model."""
    (tmp_path / "private.txt").write_text("private")
    (model / "LICENSE.md").symlink_to(tmp_path / "private.txt")
    with pytest.raises(CheckpointError, match="outside the model's folder"):
        copy_companions(model, tmp_path)
    assert not (tmp_path / "LICENSE.md").exists()


def test_links_of_a_hub_cache_are_copied(tmp_path: Path, make_model: ModelFactory) -> None:
    """A snapshot's links to the blobs of the same repository are the cache's own."""
    snapshot = tmp_path / "models--me--it" / "snapshots" / "abc"
    shutil.copytree(make_model("llama"), snapshot)
    blobs = tmp_path / "models--me--it" / "blobs"
    blobs.mkdir()
    (snapshot / "config.json").rename(blobs / "1234")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    out = tmp_path / "out"
    out.mkdir()
    copy_companions(snapshot, out)
    assert read_json(out / "config.json")["model_type"] == "llama"


def test_processors_and_more_templates_come_along(model: Path, tmp_path: Path) -> None:
    """What vision-language models and tool templates need is copied, too."""
    names = ["preprocessor_config.json", "processor_config.json", "additional_chat_templates/tool_use.jinja"]
    for name in names:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    copy_companions(model, out)
    assert all((out / name).is_file() for name in names)
