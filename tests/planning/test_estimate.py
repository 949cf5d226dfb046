"""What a run is said to cost before it begins, beside what it does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backmerge.checkpoints.reader import Checkpoint
from backmerge.config import Document, validated
from backmerge.demo import model_directory
from backmerge.generation.chat import load_tokenizer
from backmerge.pipeline.sharding import Shard, run_shard
from backmerge.planning import estimate
from backmerge.planning.estimate import Cost, cost_of, needs_of_plan
from backmerge.planning.points import points_of
from backmerge.planning.prepare import Plan, prepare
from backmerge.planning.settings import Experiment
from backmerge.records import Completion, read_lines

LIMIT, LAMS = 6, (0.3, 0.6)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two LoRAs of two steps on the embedded model."""
    from backmerge.demo.benchmarks import plan_examples
    from backmerge.finetuning.datasets import TrainingData
    from backmerge.finetuning.settings import FinetuneSettings
    from backmerge.finetuning.trainer import train_model

    settings = FinetuneSettings(dataset="demo-plans", steps=2, batch_size=4, learning_rate=8e-3, device="cpu")
    data = TrainingData(plan_examples()[:16], (), {}, ())
    places = [tmp_path_factory.mktemp("adapter") / f"tuned-{seed}" for seed in (1, 2)]
    for seed, place in enumerate(places):
        train_model(Checkpoint(model_directory()), data, settings, seed, place, lambda *_: None)
    return [str(place) for place in places]


def experiment(adapters: list[str], **more: Any) -> Experiment:
    """A small grid on these."""
    values: dict[str, Any] = {
        "base": "demo",
        "tuned": adapters,
        "merge": [{"lam": list(LAMS)}],
        "evaluate": {
            "utility": ["demo-plans"],
            "safety": ["demo-harmful"],
            "judge": "demo-rule",
            "limit": LIMIT,
            "cache": False,
            "engine": {"device": "cpu", "dtype": "float32"},
        },
    }
    return validated(Experiment, Document("test", values | more, {}))


def planned(prepared: Plan, engine: Any = None) -> Cost:
    """The cost of all that a grid measures."""
    points = points_of(prepared.experiment.merge)
    return cost_of(prepared.experiment, needs_of_plan(prepared, points, engine=engine), points)


def test_plan_matches_the_run(adapters: list[str], tmp_path: Path) -> None:
    """Answers, prompt tokens and judged answers of a sweep from nothing are those that were planned for it."""
    prepared = prepare(experiment(adapters))
    plan = SimpleNamespace(**planned(prepared).counts)
    run_shard(prepared.experiment, tmp_path / "run", Shard(1, 1))
    units = list((tmp_path / "run" / "units").glob("completions-*.jsonl"))
    made = [completion for unit in units for completion in read_lines(Completion, unit)]
    assert plan.num_models == 1 + 2 * (1 + len(LAMS))
    assert plan.num_answers == len(made) == plan.num_models * 2 * LIMIT
    assert plan.num_merged == 2 * len(LAMS)
    assert plan.num_confirming == (1 + 2 + 2) * 2 * LIMIT
    tokenizer = load_tokenizer(model_directory())
    read = [len(tokenizer(c.prompt, add_special_tokens=False)["input_ids"]) for c in made]
    # the other half's prompts differ in length, so that only its models' share of the first can be foretold exactly
    one_model = sum(read) // plan.num_models
    assert plan.num_prompt_tokens - sum(read) == pytest.approx(5 * one_model, rel=0.2)
    assert plan.max_new_tokens >= sum(c.num_tokens for c in made)
    row = json.loads((tmp_path / "run" / "shards" / "1-of-1" / "sessions.jsonl").read_text())
    judged = row["num_judged"] + row["num_judged_once"]
    assert plan.num_judged == judged + plan.num_confirming // 2
    assert (row["num_generated"], row["num_tokens"]) == (len(made), sum(c.num_tokens for c in made))
    assert row["num_merged"] == {"live": plan.num_merged}
    whole = (model_directory() / "model.safetensors").stat().st_size
    assert row["bytes_unwritten"] == pytest.approx(plan.num_merged * whole, rel=0.01)
    assert {"answering", "judging", "scoring"} <= row["seconds_by_stage"].keys()


def test_a_second_judge_and_a_search_are_counted(adapters: list[str]) -> None:
    """Two judges judge twice as much; a search may leave something out, and the plan says so."""
    evaluate = experiment(adapters).evaluate.model_dump()
    with_two = prepare(experiment(adapters, evaluate=evaluate | {"second_judge": "refusal-phrases"}))
    plan = planned(prepare(experiment(adapters)))
    assert planned(with_two).counts == plan.counts | {"num_judged": 2 * plan.counts["num_judged"]}
    assert "To generate: at most" not in plan.sentence
    assert "To generate: at most" in planned(prepare(experiment(adapters, search={"name": "race"}))).sentence


def test_a_benchmark_of_many_prompts_is_sampled(adapters: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sample's tokens as many are reckoned as there are prompts."""
    values = experiment(adapters).evaluate.model_dump() | {"limit": None}
    prepared = prepare(experiment(adapters, evaluate=values))
    exact = planned(prepared).counts["num_prompt_tokens"]
    monkeypatch.setattr(estimate, "SAMPLE", 20)
    assert planned(prepared).counts["num_prompt_tokens"] == pytest.approx(exact, rel=0.1)
    assert planned(prepared).counts["num_prompt_tokens"] != exact


class _Ways:
    """An engine that says how merges reach it."""

    def __init__(self, way: str) -> None:
        self.realisation = lambda _: way


def test_bytes_by_realisation(adapters: list[str]) -> None:
    """In memory a merge reads base and adapter; as an adapter its own size; as a checkpoint it is written and read."""
    prepared = prepare(experiment(adapters))
    base = sum(info.num_elements * 4 for info in prepared.base.infos.values())
    tuned = sum(file.stat().st_size for place in adapters for file in Path(place).glob("*.safetensors")) / 2
    merged = 2 * len(LAMS)
    live, adapter, checkpoint = (planned(prepared, _Ways(way)) for way in ("live", "adapter", "checkpoint"))
    assert live == planned(prepared)
    assert live.bytes_written == 2 * base
    assert adapter.bytes_written == 2 * base + merged * tuned
    assert checkpoint.bytes_written == (2 + merged) * base
    assert live.bytes_read - adapter.bytes_read == merged * (base - tuned)
    assert checkpoint.bytes_read - live.bytes_read == merged * base
    halved = planned(replace(prepared, experiment=prepared.experiment.model_copy(update={"merged_dtype": "bfloat16"})))
    assert halved.bytes_written == base
