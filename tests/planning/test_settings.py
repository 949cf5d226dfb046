"""Settings that do not go together are told at once, with what to do."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from backmerge.benchmarks.guards import GuardSettings
from backmerge.errors import BackmergeError
from backmerge.planning.prepare import prepare
from backmerge.planning.settings import EvaluateSettings, Experiment, SweepSettings, as_stored, without_folders
from backmerge.selection import SearchSettings

MEASURED = {"utility": ["demo-plans"], "safety": ["demo-harmful"], "judge": "demo-rule"}
TUNING = {"dataset": "demo-plans", "steps": 4, "seeds": [1]}


def experiment(**more: Any) -> Experiment:
    """The embedded model, tuned, with these settings beside."""
    return Experiment.model_validate({"base": "demo", "finetune": TUNING, "evaluate": MEASURED, **more})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"path": {}}, "keep_every"),
        ({"path": {"snapshots": False}, "finetune": TUNING | {"keep_every": 2}}, "neither snapshots nor"),
        ({"layers": {}, "search": {"name": "race"}}, "starts from a λ that is fully measured"),
        ({"merge": [{"lam": []}]}, "'lam' is empty"),
        ({"layers": {}, "choice": {"rule": "paper"}}, "does not use"),
        ({"evaluate": MEASURED | {"split": "whole"}}, "rule: paper"),
        (
            {
                "evaluate": MEASURED | {"split": "whole"},
                "choice": {"rule": "paper"},
                "finetune": TUNING | {"data": {"validation": 0}},
            },
            "held-out rows",
        ),
        ({"layers": {"num_knots": 1}}, "greater than or equal to 2"),
    ],
)
def test_what_does_not_go_together(settings: dict[str, Any], words: str) -> None:
    """Each fault names the setting that resolves it."""
    with pytest.raises(ValidationError, match=words):
        experiment(**settings)


def test_the_whole_is_measured_where_no_prompt_is_chosen_on() -> None:
    """λ is chosen on held-out training rows, so that every prompt may be reported on, at every λ."""
    halves = prepare(experiment()).splits["demo-harmful"]
    whole = prepare(experiment(evaluate=MEASURED | {"split": "whole"}, choice={"rule": "paper"})).splits["demo-harmful"]
    ids = {split: {example.id for example in examples} for split, examples in halves.items()}
    assert not ids["selection"] & ids["confirmation"]
    assert {example.id for example in whole["selection"]} == ids["selection"] | ids["confirmation"]
    assert whole["selection"] == whole["confirmation"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"merge": [{"schedules": [{"*.mpl.*": 0.1, "rest": 0.5}]}]}, "no tensor of the base matches"),
        ({"merge": [{"schedules": [{"*.mlp.*": 0.1}]}]}, "no pattern of"),
        ({"merge": [{"schedules": [{"*.mlp.*": 1.7, "rest": 0.1}]}]}, "share of the tuned side"),
        ({"merge": [{"parameters": {"lam": 0.9}}]}, "give λ with 'lam' instead"),
        (
            {"merge": [{"method": "task_arithmetic", "tuned": "all", "parameters": {"weight": [1, 2, 3]}}]},
            "3 values for 1",
        ),
        ({"layers": {}, "merge": [{"method": "model_stock"}], "finetune": TUNING | {"seeds": [1, 2]}}, "has none"),
        ({"path": {}, "finetune": TUNING | {"keep_every": 9}}, "none would be stored"),
    ],
)
def test_faults_are_found_before_anything_is_tuned(settings: dict[str, Any], words: str) -> None:
    """What a merge could not be made from is reported before hours of tuning."""
    with pytest.raises(BackmergeError, match=words):
        prepare(experiment(**settings))


def test_stored_settings_are_the_same_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Local files and folders are stored with absolute paths, and hashed without them; names remain names."""
    (tmp_path / "below" / "own").mkdir(parents=True)
    for name in ("tuned", "each", "grid"):  # the last two are values of settings, which are no folders
        (tmp_path / name).mkdir()
    for name in ("rows.jsonl", "advbench", "mine"):
        (tmp_path / name).touch()

    def asked(up: str) -> Experiment:
        return Experiment(
            name="mine",
            base="demo",
            tuned=(f"{up}tuned", "owner/name"),
            merge=(
                SweepSettings(method="linear", tuned="each", guard=GuardSettings(source=f"advbench={up}rows.jsonl")),
            ),
            evaluate=EvaluateSettings.model_validate({"utility": [f"{up}rows.jsonl"], "safety": ["advbench"]}),
            search=SearchSettings(name="grid"),
        )

    monkeypatch.chdir(tmp_path)
    here, hashed = as_stored(asked("")), without_folders(asked(""))
    monkeypatch.chdir(tmp_path / "below" / "own")
    assert as_stored(asked("../../")) == here
    assert without_folders(asked("../../")) == hashed
    expected = asked(f"{tmp_path}/").model_dump(mode="json")
    assert yaml.safe_load(here) == expected
