"""Each tracker for real, into a store on this machine, read back from it; skipped where it is not installed."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backmerge.sharing.tracked import tracked
from backmerge.sharing.trackers import report_to
from reporting.synthetic import enriched, made_results, made_samples

from .test_tracked import ANSWER, PROMPT, finished, written

# their own ways with other libraries are not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore")
EXPECTED = tracked(finished())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which trackers only read."""
    return written(tmp_path_factory.mktemp("tracked") / "run", enriched(made_results()))


def assert_nothing_secret(place: Path) -> None:
    """No file of the store holds a prompt or an answer."""
    for path in place.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert ANSWER.encode() not in content, path
            assert PROMPT.encode() not in content, path


def test_the_answers_would_be_seen(run: Path) -> None:
    """What the tests below look for is in the run itself."""
    assert made_samples(ANSWER, PROMPT)["samples"]
    with pytest.raises(AssertionError):
        assert_nothing_secret(run)


def test_mlflow_has_all_of_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, metrics, curves by step, tags and artifacts, in a separate database."""
    pytest.importorskip("mlflow")
    place = tmp_path / "store"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}")
    report_to(["mlflow"], run)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("backmerge")
    assert experiment is not None
    (kept,) = client.search_runs([experiment.experiment_id])
    assert kept.info.run_name == "synthetic"
    assert kept.data.params["finetune.seeds"] == "[1, 2]"
    assert kept.data.tags["verdict"] == "restored"
    figures = {name: value for name, value in kept.data.metrics.items() if name in EXPECTED.figures}
    assert figures == pytest.approx(dict(EXPECTED.figures))
    history = client.get_metric_history(kept.info.run_id, "linear/harmful/asr/mean")
    assert [point.step for point in history] == [0, 250, 500, 1000]
    artifacts = {file.path for file in client.list_artifacts(kept.info.run_id)}
    assert {"report.html", "results.json", "plots"} <= artifacts
    assert_nothing_secret(place)


def test_wandb_has_all_of_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config, summary, curves over λ, the table and the report, in the file that it would sync."""
    pytest.importorskip("wandb")
    place = tmp_path / "store"
    place.mkdir()
    monkeypatch.chdir(place)
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(place))
    monkeypatch.setenv("WANDB_MODE", "offline")
    report_to(["wandb"], run)
    from wandb.proto import wandb_internal_pb2

    (file,) = place.rglob("run-*.wandb")
    records = []
    for content in _records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        records.append(record)
    history = [
        {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    lams = [float(row["lam"]) for row in history if "linear/harmful/asr/mean" in row]
    assert lams == [0.0, 0.25, 0.5, 1.0]
    assert any("summary" in name for row in history for name in row)
    (artifact,) = [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"][-1:]
    assert {"report.html", "results.json"} <= {content.path for content in artifact.manifest.contents}
    whole = b"".join(_records(file))
    for name in ("finetune.seeds", "verdict", *EXPECTED.figures):
        assert name.encode() in whole
    kept = {path.name for path in place.rglob("*")}
    assert not kept & {"wandb-metadata.json", "requirements.txt", "output.log"}
    assert_nothing_secret(place)


def _records(file: Path) -> Iterator[bytes]:
    """What a file in LevelDB's log format holds: blocks of 32 KiB with records whole or in parts."""
    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_trackio_has_all_of_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config, figures, curves by step and the report, in a separate database."""
    place = tmp_path / "store"
    monkeypatch.setenv("TRACKIO_DIR", str(place))
    pytest.importorskip("trackio")
    report_to(["trackio"], run)
    from trackio.sqlite_storage import SQLiteStorage

    assert list(place.glob("*.db")), "TRACKIO_DIR is read when trackio is imported first"
    assert SQLiteStorage.get_runs("backmerge") == ["synthetic"]
    rows: list[dict[str, Any]] = SQLiteStorage.get_logs("backmerge", "synthetic")
    assert [row["step"] for row in rows if "linear/harmful/asr/mean" in row] == [0, 250, 500, 1000]
    (last,) = [row for row in rows if "asr_difference" in row]
    assert {name: last[name] for name in EXPECTED.figures} == pytest.approx(dict(EXPECTED.figures))
    config = SQLiteStorage.get_run_config("backmerge", "synthetic")
    assert config is not None
    assert config["finetune.seeds"] == "[1, 2]"
    assert config["verdict"] == "restored"
    assert len(SQLiteStorage.get_artifacts("backmerge")) == 1
    assert_nothing_secret(place)
