"""The base that an adapter names, against the base that it was given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from backmerge.checkpoints.adapter import open_weights
from backmerge.checkpoints.reader import Checkpoint
from backmerge.errors import CheckpointError

Make = Callable[..., Path]


@pytest.fixture
def naming(make_model: Make, make_adapter: Make, tmp_path: Path) -> Callable[[str], Path]:
    """`naming(name)`: an adapter on the model of seed 0 that names this base."""

    def named(name: str) -> Path:
        place = shutil.copytree(make_adapter(make_model("llama")), tmp_path / "adapter")
        config = json.loads((place / "adapter_config.json").read_text())
        (place / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        return place

    return named


def test_another_folder_with_other_weights_is_refused(naming: Callable[[str], Path], make_model: Make) -> None:
    """It fits in shape, and is certainly another model."""
    adapter = naming(str(make_model("llama", seed=1)))
    with pytest.raises(CheckpointError, match="other_base"):
        open_weights(adapter, Checkpoint(make_model("llama")))


@pytest.mark.parametrize("command", ["diff", "merge"])
def test_commands_refuse_it(
    command: str,
    naming: Callable[[str], Path],
    make_model: Make,
    run_cli: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    """Exit code 2 and the finding's name."""
    adapter = naming(str(make_model("llama", seed=1)))
    out = [] if command == "diff" else ["--lam", "0.5", "--out", str(tmp_path / "out")]
    code, _, errors = run_cli(command, make_model("llama"), adapter, *out)
    assert code == 2
    assert "other_base" in errors


def test_a_copy_in_another_dtype_is_the_same_base(
    naming: Callable[[str], Path], make_model: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounding is not a contradiction."""
    adapter = naming(str(make_model("llama", dtype="bfloat16")))
    open_weights(adapter, Checkpoint(make_model("llama")))
    assert "other_base" not in capsys.readouterr().err


def test_other_names_that_fit_are_a_warning(
    naming: Callable[[str], Path], make_model: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hub id may well be the same weights; the folder's own name adds nothing."""
    open_weights(naming("someone/aligned-7b"), Checkpoint(make_model("llama")))
    assert "other_base" in capsys.readouterr().err


def test_a_folder_of_the_same_name_is_not_warned_of(
    naming: Callable[[str], Path], make_model: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a download of the hub's `owner/name` to `./name` is."""
    base = make_model("llama")
    open_weights(naming(f"someone/{base.name}"), Checkpoint(base))
    assert "other_base" not in capsys.readouterr().err
