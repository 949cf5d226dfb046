"""The experiments on the real, small model as files: every one is valid, and each method compared has one budget."""

from pathlib import Path

import pytest

from backmerge.config import load_extended, validated
from backmerge.planning.points import points_of
from backmerge.planning.settings import Experiment
from backmerge.registry import Permissions

FOLDER = Path(__file__).parents[1] / "experiments" / "smollm2"
FILES = sorted(file for file in FOLDER.glob("*.yaml") if not file.name.startswith("_"))

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="experiments/ is not next to the tests")


def read(file: Path, scale: str | None = None) -> Experiment:
    """Return the experiment, at the scale if it has that."""
    return validated(Experiment, load_extended(file, scale=scale, needs_scale=False))


@pytest.mark.parametrize("file", [file for file in FILES if file.name != "fast.yaml"], ids=lambda file: file.stem)
def test_an_experiment_is_valid(file: Path) -> None:
    """Names and settings, without any model or data."""
    assert read(file).evaluate.safety
    assert read(file, "fast").merge


def test_each_rival_has_four_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method with more recipes could win by chance."""
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    allowed = Permissions(plugins=True)
    merge = read(FOLDER / "rivals.yaml").merge
    assert len({sweep.label or sweep.method for sweep in merge}) == len(merge)
    assert {len(list(points_of([sweep], allowed))) - 2 for sweep in merge} == {4}  # without base and tuned
