"""Help that teaches: what is missing, and a filled-in command from what the folder holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backmerge.commands.suggestions import Asked, check_complete
from backmerge.errors import ConfigError

NOTHING = Asked(None, (), (), (), None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a trainer leaves: a base, an adapter within an output folder, and data; and files that say nothing."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors").touch()
    adapter = tmp_path / "out" / "checkpoint-20"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    (tmp_path / "task.jsonl").write_text('{"prompt": "2 + 3?", "answer": "5"}\n')
    (tmp_path / "harmful_mine.csv").write_text("goal\nSpoil a kite\n")
    (tmp_path / "notes.jsonl").write_text("no JSON\n")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "adapter_config.json").write_text("[")
    return tmp_path


def told(asked: Asked, folder: Path) -> ConfigError:
    """The error about what is missing."""
    with pytest.raises(ConfigError) as caught:
        check_complete(asked, folder)
    return caught.value


def test_the_example_is_filled_in_from_the_folder(folder: Path) -> None:
    """An adapter names its base; data are known by their columns, and by their names."""
    error = told(NOTHING, folder)
    assert error.message.startswith("restore needs BASE (")
    remedy = str(error.remedy)
    assert "out/checkpoint-20/adapter_config.json names the base owner/base" in remedy
    assert (
        "backmerge restore owner/base out/checkpoint-20 --utility task.jsonl --safety harmful_mine.csv --out restored"
        in remedy
    )


def test_an_adapter_alone_is_the_tuned_side(folder: Path) -> None:
    """It is not asked for again: what is missing is the base, which it names."""
    error = told(NOTHING._replace(base="out/checkpoint-20", out=Path("x")), folder)
    assert "needs BASE" in error.message
    assert "TUNED" not in error.message
    assert "restore owner/base out/checkpoint-20 " in str(error.remedy)


def test_what_was_given_is_kept(folder: Path) -> None:
    """Only what is missing is named, and the example has what was given, quoted for a shell."""
    asked = Asked("my base", ("tuned",), ("mine.jsonl",), (), None)
    error = told(asked, folder)
    assert (
        error.message == "restore needs --safety (harmful requests; or --keep) and --out (a new folder for the results)"
    )
    assert "restore 'my base' tuned --utility mine.jsonl --safety harmful_mine.csv" in str(error.remedy)


def test_an_empty_folder_gives_names_in_capitals(tmp_path: Path) -> None:
    """And the benchmark that everybody can have."""
    assert "restore BASE TUNED --utility PROMPTS_AND_ANSWERS.jsonl --safety advbench --out restored" in str(
        told(NOTHING, tmp_path).remedy
    )


def test_a_checkpoint_next_to_its_base_is_the_tuned_side(folder: Path) -> None:
    """Where there is no adapter."""
    (folder / "out" / "checkpoint-20" / "adapter_config.json").unlink()
    (folder / "full").mkdir()
    (folder / "full" / "config.json").write_text("{}")
    (folder / "full" / "model.safetensors").touch()
    assert "restore base full " in str(told(NOTHING._replace(base="base"), folder).remedy)


def test_settings_count_as_given(folder: Path) -> None:
    """`--set evaluate.safety=[...]` is as good as `--safety`."""
    check_complete(Asked("a", ("b",), (), (), Path("x")), folder, has_utility=True, has_limit=True)
