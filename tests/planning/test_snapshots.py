"""The path of a tuning: which snapshots there are, which weights they hold, and what their averages weigh."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from backmerge.checkpoints.reader import Checkpoint
from backmerge.errors import RunError
from backmerge.planning.points import averaged, snapshot_of, steps_kept

Factory = Callable[..., Path]


@pytest.fixture
def tuned(make_model: Factory, tmp_path: Path) -> Checkpoint:
    """A tuned model with snapshots at three steps."""
    place = shutil.copytree(make_model("llama", seed=1), tmp_path / "tuned")
    for number, step in enumerate((5, 10, 15)):
        shutil.copytree(make_model("llama", seed=10 + number), place / "snapshots" / f"step-{step}")
    return Checkpoint(place)


def test_steps_are_those_that_all_kept(tuned: Checkpoint, make_model: Factory, tmp_path: Path) -> None:
    """A step that one of the seeds lacks is no point; none at all is reported with what to set."""
    assert steps_kept([tuned]) == [5, 10, 15]
    other = shutil.copytree(make_model("llama", seed=2), tmp_path / "other")
    with pytest.raises(RunError, match="no snapshots") as caught:
        steps_kept([tuned, Checkpoint(other)])
    assert "keep_every" in (caught.value.remedy or "")
    shutil.copytree(tuned.directory / "snapshots" / "step-10", other / "snapshots" / "step-10")
    assert steps_kept([tuned, Checkpoint(other)]) == [10]


def test_averages_weigh_as_by_hand(tuned: Checkpoint, make_model: Factory) -> None:
    """M ← ½·m + ½·snapshot from the first on: a quarter, a quarter, a half; one snapshot is itself."""
    base = Checkpoint(make_model("llama", seed=0))
    found = averaged(tuned, base, 15, 0.5)
    assert found.parameters["weight"] == [0.25, 0.25, 0.5]
    assert [weights.directory.name for weights in found.tuned_models] == ["step-5", "step-10", "step-15"]
    assert averaged(tuned, base, 10, 0.9).parameters["weight"] == pytest.approx([0.9, 0.1])
    (only,) = averaged(tuned, base, 5, 0.5).tuned_models
    assert only.fingerprint == snapshot_of(tuned, base, 5).fingerprint


def test_rewritten_snapshot_is_read_again(tuned: Checkpoint, make_model: Factory) -> None:
    """Trained again in its place, within one process, it is not treated as the one before."""
    base = Checkpoint(make_model("llama", seed=0))
    before = snapshot_of(tuned, base, 10).fingerprint
    place = tuned.directory / "snapshots" / "step-10"
    shutil.rmtree(place)
    shutil.copytree(make_model("llama", seed=99), place)
    assert snapshot_of(tuned, base, 10).fingerprint != before
