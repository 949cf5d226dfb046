"""Whose config, tokenizer, templates and processors a merged model has."""

import json
from pathlib import Path
from typing import Any

import pytest

from backmerge.checkpoints.companions import Companions, companions_of
from backmerge.checkpoints.model_config import ROPE_TYPES
from backmerge.errors import CheckpointError

WORDS = {"model": {"vocab": {"a": 0, "b": 1}}}


def folder(place: Path, files: dict[str, Any]) -> Path:
    """A folder with files: texts as they are, all else as JSON."""
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return place


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base with one of each kind of file."""
    files: dict[str, Any] = {
        "config.json": {"model_type": "llama", "rope_theta": 1e4, "vocab_size": 8, "torch_dtype": "bfloat16"},
        "generation_config.json": {"eos_token_id": 1},
        "tokenizer.json": WORDS,
        "tokenizer_config.json": {"chat_template": "base's"},
        "preprocessor_config.json": {"size": 1},
        "additional_chat_templates/tool_use.jinja": "base's",
        "LICENSE": "base's",
    }
    return folder(tmp_path / "base", files)


def chosen(base: Path, tuned: Path, **options: Any) -> Companions:
    """The files of a merge of the two."""
    return companions_of(base, tuned, stored=base, **options)


def value(found: Companions, name: str) -> Any:
    """The content of a JSON file."""
    return json.loads(found.content(name) or b"null")


def test_what_only_the_base_has_is_kept(base: Path, tmp_path: Path) -> None:
    """Law 4: nothing is dropped, and a tuned side without files changes nothing."""
    tuned = folder(tmp_path / "tuned", {"adapter_config.json": {}})
    found = chosen(base, tuned, is_adapter=True)
    assert found.names == sorted(path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file())
    assert found.notes == ()
    assert found.folder() == base
    assert found.digest == companions_of(base, None, stored=base).digest


def test_config_is_the_tuned_sides_but_for_what_describes_the_tensors(base: Path, tmp_path: Path) -> None:
    """RoPE and context are learned with the weights; dtype and rows are those of the tensors that are written."""
    config = {"model_type": "llama", "rope_theta": 5e6, "vocab_size": 8, "dtype": "float32", "max_position": 99}
    tuned = folder(tmp_path / "tuned", {"config.json": config, "generation_config.json": {"eos_token_id": 7}})
    found = chosen(base, tuned)
    assert value(found, "config.json") == config | {"dtype": "bfloat16"}
    assert value(found, "generation_config.json") == {"eos_token_id": 7}
    assert any("config.json" in note and "the merged model has the tuned model's" in note for note in found.notes)
    kept = chosen(base, tuned, config_from="base")
    assert kept.content("config.json") == (base / "config.json").read_bytes()
    assert any("the merged model has the base's" in note for note in kept.notes)


def test_an_adapters_folder_decides_nothing_about_the_config(base: Path, tmp_path: Path) -> None:
    """An adapter is loaded with its base's config."""
    tuned = folder(tmp_path / "tuned", {"config.json": {"rope_theta": 5e6}, "chat_template.jinja": "adapter's"})
    found = chosen(base, tuned, is_adapter=True)
    assert value(found, "config.json")["rope_theta"] == 1e4
    assert found.content("chat_template.jinja") == b"adapter's"


def test_tokenizer_files_come_from_one_model(base: Path, tmp_path: Path) -> None:
    """Added tokens are kept, and no file of the base's other vocabulary stays among them."""
    folder(base, {"tokenizer.model": "pieces", "added_tokens.json": {}})
    grown = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 7, "content": "<new>"}]}
    tuned = folder(tmp_path / "tuned", {"tokenizer.json": grown, "tokenizer_config.json": {"chat_template": "new"}})
    found = chosen(base, tuned)
    assert value(found, "tokenizer.json") == grown
    assert value(found, "tokenizer_config.json") == {"chat_template": "new"}
    assert "tokenizer.model" not in found.names
    assert any("tokenizer.model" in note and "omitted" in note for note in found.notes)
    kept = chosen(base, tuned, tokenizer_from="base")
    assert value(kept, "tokenizer.json") == WORDS
    assert "tokenizer.model" in kept.names


def test_files_of_the_same_vocabulary_stay(base: Path, tmp_path: Path) -> None:
    """A sentencepiece model that only the base has belongs to the same tokens."""
    folder(base, {"tokenizer.model": "pieces"})
    tuned = folder(tmp_path / "tuned", {"tokenizer.json": WORDS, "tokenizer_config.json": {}})
    assert "tokenizer.model" in chosen(base, tuned).names


def test_a_template_in_one_file_is_not_hidden_by_the_others_in_another(base: Path, tmp_path: Path) -> None:
    """chat_template.jinja comes before tokenizer_config.json, whichever side each is from."""
    folder(base, {"chat_template.jinja": "base's newer"})
    tuned = folder(tmp_path / "tuned", {"tokenizer.json": WORDS, "tokenizer_config.json": {"chat_template": "tuned's"}})
    found = chosen(base, tuned)
    assert "chat_template.jinja" not in found.names
    assert value(found, "tokenizer_config.json") == {"chat_template": "tuned's"}


def test_template_from_an_unused_file_becomes_a_separate_file(base: Path, tmp_path: Path) -> None:
    """A tuned model saved without its template is asked with the base's."""
    tuned = folder(tmp_path / "tuned", {"tokenizer.json": WORDS, "tokenizer_config.json": {"eos_token": "b"}})
    found = chosen(base, tuned)
    assert value(found, "tokenizer_config.json") == {"eos_token": "b"}
    assert found.content("chat_template.jinja") == b"base's"
    place = found.folder()
    assert place not in (base, tuned)
    assert (place / "additional_chat_templates" / "tool_use.jinja").read_text() == "base's"


def test_tokens_without_embeddings_are_not_taken(base: Path, tmp_path: Path) -> None:
    """A pad token that was added to an adapter's tokenizer alone would be looked up beyond the embeddings' end."""
    grown = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 8, "content": "[PAD]"}]}
    tuned = folder(tmp_path / "tuned", {"tokenizer.json": grown})
    found = chosen(base, tuned, is_adapter=True)
    assert value(found, "tokenizer.json") == WORDS
    assert any("without embeddings" in note for note in found.notes)


def test_a_changed_file_is_seen(base: Path, tmp_path: Path) -> None:
    """What was chosen before is forgotten when a file changes."""
    tuned = folder(tmp_path / "tuned", {"chat_template.jinja": "old"})
    before = chosen(base, tuned).digest
    folder(tuned, {"chat_template.jinja": "newer"})
    assert chosen(base, tuned).digest != before


@pytest.mark.parametrize(
    ("name", "setting", "words"),
    [
        ("config.json", '"hidden_size": "64"', "hidden_size: Input should be a valid integer"),
        ("config.json", '"num_attention_heads": 0', "num_attention_heads"),
        ("config.json", '"head_dim": 0', "head_dim: .*must be at least 1"),
        ("config.json", '"rms_norm_eps": NaN', "rms_norm_eps: Input should be a finite number"),
        ("config.json", '"rope_parameters": {"rope_type": "nope"}', "no rope_type 'nope'"),
        ("config.json", '"text_config": {"rope_scaling": {"type": "nope"}}', "no rope_type 'nope'"),
        ("generation_config.json", '"eos_token_id": {}', "eos_token_id"),
        ("tokenizer_config.json", '"chat_template": 5', "chat_template"),
    ],
)
def test_settings_that_transformers_refuses_are_not_written(
    name: str, setting: str, words: str, base: Path, tmp_path: Path
) -> None:
    """The error names the file of the tuned model and the field."""
    files = {"config.json": '{"model_type": "llama"}', "tokenizer.json": WORDS} | {name: f"{{{setting}}}"}
    tuned = folder(tmp_path / "tuned", files)
    with pytest.raises(CheckpointError, match=f"{tuned / name}.*{words}"):
        chosen(base, tuned)


def test_rope_types_are_known() -> None:
    """A type that transformers has is never refused."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert ROPE_INIT_FUNCTIONS.keys() <= ROPE_TYPES


def test_rope_type_of_the_base_is_accepted(base: Path, tmp_path: Path) -> None:
    """A newer architecture may have a type that only newer libraries know."""
    own = {"config.json": {"rope_parameters": {"rope_type": "newer"}}}
    assert "config.json" in chosen(folder(base, own), folder(tmp_path / "tuned", own)).names
