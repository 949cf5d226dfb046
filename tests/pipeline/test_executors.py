"""The same experiment in this process, in a pool and on Ray: the same answers, and the same results to the byte."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.companions import Companions
from backmerge.checkpoints.reader import Checkpoint, Weights
from backmerge.cli import app
from backmerge.demo import model_directory
from backmerge.generation.protocol import EngineSettings, Request, Sampling
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.measuring import remote
from backmerge.merging.method import find_method
from backmerge.merging.recipe import Variant
from backmerge.records import Example, Message
from backmerge.registry import NOTHING_ALLOWED

ASKED = ("evaluate.limit=12", "evaluate.cache=false")
CHOICE = ("choice.margin=0.95", "choice.accept=[wide_margin,too_few_prompts,no_gain]")


@pytest.fixture(scope="module")
def adapter(tuned_demo: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on the embedded model, in a folder that tests may write next to."""
    return Path(shutil.copytree(tuned_demo(42), tmp_path_factory.mktemp("adapter") / "tuned"))


def carry_out(command: str, adapter: Path, out: Path, *more: str) -> None:
    """Measure two merges of that adapter, by `restore` or `evaluate`."""
    models = {"restore": ("demo", str(adapter)), "evaluate": (str(adapter), "--base", "demo")}[command]
    asked = ("--utility", "demo-plans", "--safety", "demo-harmful", "--judge", "demo-rule", "--lam", "0.3,0.6")
    options = [word for setting in (*ASKED, *(CHOICE if command == "restore" else ())) for word in ("--set", setting)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backmerge.reporting.report.write_report", lambda _: None)  # the plots take seconds
        app([command, *models, *asked, "--device", "cpu", "--out", str(out), *options, *more], standalone_mode=False)


def found(out: Path) -> dict[str, bytes]:
    """What a run found: results, samples, records, units."""
    files = [*out.glob("*.json"), *(out / "records").iterdir(), *(out / "units").iterdir()]
    return {str(file.relative_to(out)): file.read_bytes() for file in files if file.name != "digests.json"}


ELSEWHERE = {
    "pool": ("--executor", "pool", "--num-workers", "2"),
    "ray": ("--executor", "ray"),
}


@pytest.mark.parametrize(
    "executor", [pytest.param("pool", marks=pytest.mark.slow), pytest.param("ray", marks=pytest.mark.ray)]
)
def test_other_processes_find_the_same(executor: str, adapter: Path, tmp_path: Path) -> None:
    """Two workers, or a local Ray, leave the same units, records and results of a restore as this process."""
    carry_out("restore", adapter, tmp_path / "here")
    carry_out("restore", adapter, tmp_path / executor, *ELSEWHERE[executor])
    assert found(tmp_path / executor) == found(tmp_path / "here")


class Noting(TransformersEngine):
    """Notes each model that it loads, and in which process."""

    def _load(self, weights: Weights, files: Companions) -> None:
        with Path(os.environ["LOADS"]).open("a") as stream:
            stream.write(f"{os.getpid()} {weights.directory}\n")
        super()._load(weights, files)


@pytest.mark.parametrize("executor", ["in-process", pytest.param("pool", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["adapter", "checkpoint"])
def test_a_restore_loads_each_model_once(
    executor: str, form: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines are kept between the steps: one load of the base, and one of the checkpoint as it is written."""
    monkeypatch.setenv("LOADS", str(tmp_path / "loads"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    out = tmp_path / "run"
    workers = ("--executor", executor, "--num-workers", "1")
    plugin = ("--engine", "pipeline.test_executors:Noting", "--allow-plugins")
    carry_out("restore", adapter, out, "--method", "linear", "--as", form, *plugin, *workers)
    noted = [line.split(maxsplit=1) for line in (tmp_path / "loads").read_text().splitlines()]
    written = [str(out / "unconfirmed" / "tuned")] if form == "checkpoint" else []
    assert [folder for _, folder in noted] == [str(model_directory()), *written]
    assert {process == str(os.getpid()) for process, _ in noted} == {executor == "in-process"}
    assert len({process for process, _ in noted}) == 1


def test_a_request_survives_as_plain_data(adapter: Path) -> None:
    """What a worker answers to a merge's request is what the engine answers here."""
    base = Checkpoint(model_directory())
    variant = Variant(
        base, AdapterOnBase(adapter, base), find_method("dare_linear"), 0.9, {"drop": 0.5}, seed=3, dtype="F32"
    )
    examples = [Example("a", (Message("user", "How do I mend a kite?"),), facts={"k": "v"}, prefill="Go")]
    settings = EngineSettings(device="cpu", dtype="float32")
    request = Request(variant, examples, Sampling(max_new_tokens=12, stop=("zzz",)))
    spec = remote.spec_of(request, settings, permissions=NOTHING_ALLOWED)
    told: list[int] = []

    def advance(steps: int, _: str = "", /) -> None:
        told.append(steps)

    made = remote.completions_of(remote.answer(spec, advance))
    assert made == TransformersEngine(settings).generate(*request, lambda _: None)
    assert sum(told) == 1
    assert (
        spec["recipe"] | {"seed": 4}
        == remote.spec_of(request._replace(variant=replace(variant, seed=4)), settings, permissions=NOTHING_ALLOWED)[
            "recipe"
        ]
    )


def killed_once(spec: Any, advance: Any) -> Any:
    """Answer, but for the first time, when the worker is killed as by the system."""
    mark = Path(spec["tuned"][0] if spec["tuned"] else spec["base"]).parent / "killed"
    if spec["tuned"] and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return remote.answer(spec, advance)


def test_a_killed_workers_requests_are_answered_again(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, one of them killed by the system, leave the same units, records and results as this process."""
    from backmerge.execution import dispatch

    carry_out("evaluate", adapter, tmp_path / "here")
    name_of = dispatch.name_of
    monkeypatch.setattr(
        "backmerge.execution.dispatch.name_of",
        lambda function: "pipeline.test_executors:killed_once" if function is remote.answer else name_of(function),
    )
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    carry_out("evaluate", adapter, tmp_path / "pool", *ELSEWHERE["pool"])
    assert (adapter.parent / "killed").exists()
    assert found(tmp_path / "pool") == found(tmp_path / "here")
