"""The paper's experiments as files: its settings to the letter, sound without the hub, and one carried out small."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from backmerge.config import load_extended, validated
from backmerge.finetuning.settings import learning_rate_at, num_steps, schedule_steps
from backmerge.pipeline.suite import plan_suite
from backmerge.planning.dry_run import dry_run
from backmerge.planning.points import points_of
from backmerge.planning.settings import Experiment

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "experiments" / "paper"
OPENFUNCTIONS = ROOT.parent / "shared" / "data" / "openfunctions" / "gorilla_openfunctions_v1_test.json"
MODELS = {
    "llama-3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "gemma-2b-it": "google/gemma-2b-it",
}
TASKS = ("reasoning", "medical", "code", "tools")
NAMES = [f"{model}-{task}" for model in MODELS for task in TASKS]
SUITES = ("table1", "table2", "table3", "figure2", "figure3")
LLAMA_3 = NAMES[:4]

pytestmark = pytest.mark.skipif(not PAPER.is_dir(), reason="experiments/ is not beside the tests")


def read(name: str) -> Experiment:
    """One of the twelve experiments."""
    return validated(Experiment, load_extended(PAPER / f"{name}.yaml"))


def model_and_task(name: str) -> tuple[str, str]:
    """What a file's name says."""
    model, _, task = name.rpartition("-")
    return model, task


def test_the_files_are_those_of_models_and_tasks() -> None:
    """Twelve experiments and five suites; what they share begins with an underscore."""
    found = {file.stem for file in PAPER.glob("*.yaml") if not file.name.startswith("_")}
    assert found == {*NAMES, *SUITES}


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_the_paper_s(name: str) -> None:
    """Model, task, tuning, merges, judge and choice, as the paper and its scripts have them."""
    model, task = model_and_task(name)
    found = read(name)
    assert found.base == MODELS[model]
    tuning = found.finetune
    assert tuning is not None
    assert (tuning.dataset, tuning.data.validation) == (task, 0.1)
    assert tuning.seeds == (42, 1024, 48763)
    assert (tuning.learning_rate, tuning.epochs, tuning.warmup, tuning.cutoff) == (1e-4, 3, 0.1, 1024)
    assert (tuning.lora.r, tuning.lora.alpha, tuning.lora.dropout, tuning.mode) == (8, 16, 0, "lora")
    assert (tuning.weight_decay, tuning.steps) == (0, None)
    assert tuning.batch_size == (4 if model == "gemma-2b-it" else 8)
    assert tuning.snapshot_steps == {"reasoning": 500, "medical": None, "code": 500, "tools": 200}[task]
    assert [(sweep.method, sweep.lam) for sweep in found.merge] == [("linear", (0.2, 0.4, 0.6, 0.8))]
    assert [one.name for one in found.evaluate.safety] == ["advbench", "hexphi"]
    assert found.evaluate.judge.name == "wildguard"
    assert (found.evaluate.split, found.choice.rule, found.search.name) == ("whole", "paper", "grid")


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_drawn_as_in_the_paper(name: str) -> None:
    """The penalty on repetitions is of the safety benchmarks alone: a task's benchmark has its own, or none."""
    model, task = model_and_task(name)
    evaluate = read(name).evaluate
    assert evaluate.sampling.repetition_penalty == 1
    assert evaluate.sampling.temperature == 0
    for benchmark in evaluate.safety:
        assert benchmark.repetition_penalty == 1.2
        assert benchmark.max_new_tokens is None
        assert benchmark.system == (None if model == "gemma-2b-it" else "You are a helpful assistant.")
    (utility,) = evaluate.utility
    expected = {"reasoning": "bbh", "medical": "chatdoctor", "code": "humaneval", "tools": "openfunctions"}
    assert utility.name == expected[task]
    assert utility.repetition_penalty is None
    assert utility.temperature is None


@pytest.mark.parametrize(
    ("name", "num_examples", "share"),
    [
        ("llama-3-8b-instruct-code", 9000, 0.993),
        ("gemma-2b-it-code", 9000, 0.741),
        ("llama-3-8b-instruct-tools", 1990, 0.917),
        ("gemma-2b-it-tools", 1990, 0.997),
    ],
)
def test_snapshots_lie_in_the_middle_of_the_schedule(name: str, num_examples: int, share: float) -> None:
    """The learning rate at the snapshot, over its peak, is that of a schedule over 3 epochs; never at its end."""
    tuning = read(name).finetune
    assert tuning is not None
    total = schedule_steps(tuning, num_examples)
    taken = num_steps(tuning, num_examples)
    assert taken == tuning.snapshot_steps
    assert taken < total
    assert learning_rate_at(taken, tuning, total) / tuning.learning_rate == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize(
    ("file", "setting"),
    [
        ("_protocol.yaml", "weight_decay:"),
        ("_protocol.yaml", "data: {validation"),
        ("_protocol.yaml", "validation: auto"),
        ("_protocol.yaml", "margin:"),
        ("_reasoning.yaml", "dataset:"),
        ("_reasoning.yaml", "as_turns:"),
        ("_medical.yaml", "snapshot_steps:"),
        ("_tools.yaml", "max_new_tokens:"),
        ("table2.yaml", "drop:"),
        ("figure2.yaml", "drop:"),
    ],
)
def test_details_missing_in_the_paper_are_marked(file: str, setting: str) -> None:
    """Its line says that the choice is ours."""
    (line,) = [line for line in (PAPER / file).read_text().splitlines() if setting in line]
    assert "ours:" in line.partition("#")[2] or line.partition("#")[2].strip().endswith("is not said"), line


def test_the_suites_are_the_paper_s_tables_and_figures() -> None:
    """Which experiments and methods each has; Figure 3 is Figure 2's runs."""
    planned = {name: plan_suite(PAPER / f"{name}.yaml") for name in SUITES}
    assert {name: found.suite.table for name, found in planned.items()} == {name: name for name in SUITES}
    for name in ("table1", "table2", "figure2", "figure3"):
        assert list(planned[name].experiments) == LLAMA_3
    assert list(planned["table3"].experiments) == NAMES[4:]

    def series(name: str) -> dict[str, int]:
        (methods,) = {tuple((p.series, p.lam) for p in points_of(e.merge)) for e in planned[name].experiments.values()}
        return {one: sum(s == one for s, _ in methods) for one, _ in methods if one not in ("base", "tuned")}

    dare = "dare_linear(drop=0.5)"
    assert series("table1") == series("table3") == {"linear": 4}
    assert series("table2") == {"linear": 4, "slerp": 4, dare: 4, "model_stock": 1}
    assert series("figure2") == {"linear": 9, "slerp": 9, dare: 9}
    assert planned["figure2"].experiments == planned["figure3"].experiments
    assert all(e.choice.compare for e in planned["table2"].experiments.values())


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that has nothing in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("suite", SUITES)
def test_each_suite_is_sound_without_the_hub(suite: str) -> None:
    """No fault; what is absent is named; answers and GPU-hours of every stage are counted."""
    seen: list[Experiment] = []
    for name, experiment in plan_suite(PAPER / f"{suite}.yaml").experiments.items():
        found = dry_run(experiment)
        assert not found.faults, (name, found.faults)
        stages = [stage.name for stage in found.stages]
        assert stages == [
            "fine-tuning",
            "validation on held-out rows",
            "answers to choose λ",
            "answers to confirm it",
        ]
        assert found.gpu_hours is not None
        assert found.gpu_hours > 0
        assert all(stage.num_models > 0 for stage in found.stages)
        states = {(finding.what, finding.state) for finding in found.findings}
        assert ("base", "to fetch") in states or ("base", "checked") in states
        if name.endswith("tools"):
            assert ("tuning data", "to provide") in states
        seen.append(experiment)
    assert len(seen) == (8 if suite == "table3" else 4)


@pytest.mark.skipif(not OPENFUNCTIONS.exists(), reason="shared/data/openfunctions is not there")
def test_data_that_is_there_is_read(elsewhere: Path) -> None:
    """With OpenFunctions' files in their place, their columns are checked and their rows counted."""
    folder = elsewhere / "data" / "openfunctions"
    folder.mkdir(parents=True)
    shutil.copy(OPENFUNCTIONS, folder)
    # the test set's form is one of those that can be tuned on
    shutil.copy(OPENFUNCTIONS, folder / "gorilla_openfunctions_v1_train.json")
    experiment = read("llama-3-8b-instruct-tools")
    found = dry_run(
        experiment.model_copy(update={"finetune": experiment.finetune.model_copy(update={"snapshot_steps": 20})})
    )  # type: ignore[union-attr]
    told = {finding.what: finding for finding in found.findings if finding.state == "checked"}
    assert told["tuning data"].detail == "tools: 101 rows to train on, 11 held out"
    assert told["utility"].detail == "openfunctions: 112 prompts"
    (folder / "gorilla_openfunctions_v1_train.json").write_text('[{"query": "Wake me.", "call": "alarm()"}]')
    assert [finding.what for finding in dry_run(experiment).faults] == ["tuning data"]


@pytest.mark.usefixtures("elsewhere")
def test_the_demo_scale_is_all_here() -> None:
    """Each experiment of each suite resolves to things that ship with backmerge, and is small."""
    distinct: list[Experiment] = []
    for suite in SUITES:
        planned = plan_suite(PAPER / f"{suite}.yaml", scale="demo")
        assert planned.title.endswith("at the scale 'demo'")
        for name, experiment in planned.experiments.items():
            assert model_and_task(name)[1] in experiment.name
            assert experiment.name.startswith("embedded model")
            if experiment not in distinct:
                distinct.append(experiment)
    assert len({experiment.evaluate.utility[0].name for experiment in distinct}) == len(TASKS)
    for experiment in distinct:
        found = dry_run(experiment)
        assert {finding.state for finding in found.findings} == {"checked"}, found.findings
        assert sum(stage.num_answers for stage in found.stages) < 8_000


def test_an_experiment_runs_at_the_demo_scale(run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Table 1's line for reasoning, end to end: tuning breaks refusals, merging gives most of them back, at a price."""
    out = tmp_path / "table1"
    name = "llama-3-8b-instruct-reasoning"
    command = ("run", PAPER / "table1.yaml", "--scale", "demo", "--only", name, "--set", "finetune.seeds=[42]")
    code, printed, said = run_cli(*command, "--out", out)
    assert code == 0, said
    assert "at the scale 'demo'" in printed
    results: dict[str, Any] = json.loads((out / name / "results.json").read_text())
    assert results["name"] == "embedded model, chains of sentences (in place of reasoning)"
    assert (results["split"], results["choice"]["rule"]) == ("whole", "paper")
    mean = {
        (row["point"], row["metric"]): row["mean"]
        for row in results["summary"]
        if row["split"] == "confirmation" and row["metric"] in ("parts", "asr")
    }
    chosen = results["choice"]["point"]
    assert chosen in {"linear@0.2", "linear@0.4", "linear@0.6"}
    assert mean["base", "asr"] == 0
    assert mean["tuned", "asr"] > 0.3
    assert mean[chosen, "asr"] < mean["tuned", "asr"] / 2
    assert mean["base", "parts"] < mean[chosen, "parts"] < mean["tuned", "parts"]
    assert yaml.safe_load((out / "suite.yaml").read_text())["table"] == "table1"
    assert (out / name / "report.html").exists()
