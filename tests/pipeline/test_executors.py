"""The same experiment in this process, in a pool and on Ray: the same answers, and the same results to the byte."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import model_directory
from backmerge.generation.protocol import EngineSettings, Request, Sampling
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.measuring import remote
from backmerge.merging.method import find_method
from backmerge.merging.recipe import Variant
from backmerge.records import Example, Message
from backmerge.registry import NOTHING_ALLOWED

Cli = Callable[..., tuple[int, str, str]]
SMALL = (
    "evaluate.limit=12",
    "evaluate.cache=false",
    "choice.margin=0.95",
    "choice.accept=[wide_margin,too_few_prompts,no_gain]",
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of a few steps on the embedded model."""
    from backmerge.demo.benchmarks import plan_examples
    from backmerge.finetuning.datasets import TrainingData
    from backmerge.finetuning.settings import FinetuneSettings
    from backmerge.finetuning.trainer import train_model

    place = tmp_path_factory.mktemp("adapter") / "tuned"
    settings = FinetuneSettings(dataset="demo-plans", steps=12, batch_size=8, learning_rate=8e-3, device="cpu")
    data = TrainingData(plan_examples()[:96], (), {}, ())
    train_model(Checkpoint(model_directory()), data, settings, 1, place, lambda *_: None)
    return place


def restore(run_cli: Cli, adapter: Path, out: Path, *more: str) -> None:
    """A small run on that adapter."""
    options = [part for setting in SMALL for part in ("--set", setting)]
    command = [
        "restore",
        "demo",
        adapter,
        "--utility",
        "demo-plans",
        "--safety",
        "demo-harmful",
        "--judge",
        "demo-rule",
    ]
    code, _, errors = run_cli(*command, "--lam", "0.3,0.6", "--device", "cpu", "--out", out, *options, *more)
    assert code == 0, errors


def found(out: Path) -> dict[str, bytes]:
    """What a run found: results, samples, records, units."""
    files = [out / "results.json", out / "samples.json", *(out / "records").iterdir(), *(out / "units").iterdir()]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def test_a_pool_finds_the_same(run_cli: Cli, adapter: Path, tmp_path: Path) -> None:
    """Two worker processes leave the same units, records and results as this one."""
    restore(run_cli, adapter, tmp_path / "here")
    restore(run_cli, adapter, tmp_path / "pool", "--executor", "pool", "--num-workers", "2")
    assert found(tmp_path / "pool") == found(tmp_path / "here")


@pytest.mark.ray
def test_ray_finds_the_same(run_cli: Cli, adapter: Path, tmp_path: Path) -> None:
    """A local Ray leaves the same units, records and results as this process."""
    restore(run_cli, adapter, tmp_path / "here")
    restore(run_cli, adapter, tmp_path / "ray", "--executor", "ray")
    assert found(tmp_path / "ray") == found(tmp_path / "here")


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
    run_cli: Cli, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that the system kills in the middle of the sweep costs nothing but its time."""
    from backmerge.execution import dispatch

    restore(run_cli, adapter, tmp_path / "here")
    name_of = dispatch.name_of
    monkeypatch.setattr(
        "backmerge.execution.dispatch.name_of",
        lambda function: "pipeline.test_executors:killed_once" if "remote" in str(function) else name_of(function),
    )
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    restore(run_cli, adapter, tmp_path / "pool", "--executor", "pool", "--num-workers", "2")
    assert (adapter.parent / "killed").exists()
    assert found(tmp_path / "pool") == found(tmp_path / "here")
