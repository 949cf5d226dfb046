"""A dry run: its counts are a run's, its arithmetic is docs/scale.md's, and it neither asks the hub nor writes."""

import importlib
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backmerge.benchmarks.catalogue import find_of_any_kind
from backmerge.benchmarks.protocol import BenchmarkSettings
from backmerge.checkpoints.reader import Checkpoint
from backmerge.config import Document, validated
from backmerge.demo import model_directory
from backmerge.finetuning.settings import FinetuneSettings
from backmerge.generation.protocol import made_engine
from backmerge.pipeline.stages import run_experiment
from backmerge.planning.declared import BENCHMARKS as DECLARED
from backmerge.planning.declared import MODELS
from backmerge.planning.dry_run import DryRun, dry_run
from backmerge.planning.estimate import Load, answering_stage, remember_speed, speed_key, training_stage
from backmerge.planning.findings import Finding, offline, size_of
from backmerge.planning.held_out import num_validation_answers
from backmerge.planning.points import points_of
from backmerge.planning.prepare import prepare
from backmerge.planning.settings import Experiment
from backmerge.progress import Rates
from backmerge.registry import BENCHMARKS, Permissions

DATA = Path(__file__).parents[2].parent / "shared" / "data"
TINY: dict[str, Any] = {
    "base": "demo",
    "finetune": {
        "dataset": "demo-plans",
        "data": {"validation": 0},
        "seeds": [1, 2],
        "steps": 2,
        "batch_size": 4,
        "device": "cpu",
    },
    "merge": [{"method": "linear", "lam": [0.5]}, {"method": "model_stock"}],
    "evaluate": {
        "utility": ["demo-plans"],
        "safety": ["demo-harmful"],
        "judge": "demo-rule",
        "engine": {"device": "cpu", "dtype": "float32"},
        "limit": 5,
        "cache": False,
    },
    "report": {"text": "none"},
}


def experiment(*changes: tuple[str, Any]) -> Experiment:
    """The tiny experiment with other values at key paths."""
    values = {key: (dict(value) if isinstance(value, dict) else value) for key, value in TINY.items()}
    for path, value in changes:
        *above, last = path.split(".")
        place: Any = values
        for key in above:
            place[key] = dict(place[key])
            place = place[key]
        place[last] = value
    return validated(Experiment, Document("the test", values, {}))


def details(found: DryRun, state: str) -> list[str]:
    """What was found of one state, with its role."""
    return [f"{finding.what}: {finding.detail}" for finding in found.findings if finding.state == state]


def answers(found: DryRun) -> dict[str, int]:
    """Stage to its answers."""
    return {stage.name: stage.num_answers for stage in found.stages}


@pytest.mark.usefixtures("without_report")
def test_counts_are_those_of_a_run(tmp_path: Path) -> None:
    """As many answers as a run of halves writes down: none of its prompts is asked of a model twice."""
    asked = experiment(("choice", {"rule": "weighted"}), ("merge", [{"method": "linear", "lam": [0.4, 0.5]}]))
    found = dry_run(asked)
    assert {finding.state for finding in found.findings} == {"checked"}
    # base, two tuned, two of each λ, ten prompts each; then base, two tuned, and two of the chosen λ
    assert answers(found) == {"fine-tuning": 0, "answers to choose λ": 70, "answers to confirm it": 50}
    run_experiment(asked, tmp_path / "run")
    made = [file.read_text().splitlines() for file in (tmp_path / "run" / "units").glob("completions-*")]
    assert sum('"example"' in line for lines in made for line in lines) == 120


def test_a_merge_of_all_is_one_model() -> None:
    """Model Stock makes one of all seeds' models, and is confirmed as one where methods are compared."""
    found = dry_run(experiment(("choice", {"rule": "weighted", "compare": True})))
    assert answers(found) == {
        "fine-tuning": 0,
        "answers to choose λ": (1 + 2 + 2 + 1) * 10,
        "answers to confirm it": (1 + 2 + 2 + 1) * 10,
    }


@pytest.mark.parametrize("limit", [5, None])
def test_counts_of_validation_and_of_a_comparison(limit: int | None) -> None:
    """Held-out rows are counted as the validation counts them; of compared series, one point each is confirmed."""
    asked = experiment(
        ("finetune.data", {"validation": 0.1, "num_examples": 60}),
        ("merge", [{"method": "linear", "lam": [0.4, 0.5]}, {"method": "slerp", "lam": [0.5]}]),
        ("evaluate.split", "whole"),
        ("evaluate.limit", limit),
        ("choice", {"rule": "paper", "compare": True}),
    )
    found = dry_run(asked)
    prepared = prepare(asked)
    points = points_of(asked.merge)
    assert answers(found)["validation on held-out rows"] == num_validation_answers(prepared, points)
    num_prompts = sum(len(prepared.splits[name]["selection"]) for name in ("demo-plans", "demo-harmful"))
    assert num_prompts == (2 * limit if limit else 440 + 1100)
    assert answers(found)["answers to choose λ"] == (1 + 2 + 3 * 2) * num_prompts
    assert answers(found)["answers to confirm it"] == (1 + 2 + 2 * 2) * num_prompts


def test_declared_sizes_count_like_local_ones() -> None:
    """A benchmark as declared gives the same counts as its data, where the data is here."""
    if not DATA.is_dir():
        pytest.skip("shared/data is not there")
    sets: dict[str, Any] = {
        "advbench": str(DATA / "advbench" / "harmful_behaviors.csv"),
        "openfunctions": str(DATA / "openfunctions" / "gorilla_openfunctions_v1_test.json"),
    }
    here = experiment(
        ("evaluate.limit", None),
        ("evaluate.utility", [{"name": "openfunctions", "data": sets["openfunctions"]}]),
        ("evaluate.safety", [{"name": "advbench", "data": sets["advbench"]}]),
        ("evaluate.judge", "refusal-phrases"),
    )
    gone = experiment(
        ("evaluate.limit", None),
        ("evaluate.utility", ["openfunctions"]),
        ("evaluate.safety", ["advbench"]),
        ("evaluate.judge", "refusal-phrases"),
    )
    found, declared = dry_run(here), dry_run(gone)
    assert not found.faults
    assert not declared.faults
    assert details(declared, "to provide") == [
        "utility: openfunctions: its file, as its 'data'; we know of no copy on the hub"
    ]
    assert answers(found) == answers(declared)
    assert answers(found)["answers to choose λ"] == 6 * (520 + 112) // 2
    assert sum(s.output_tokens for s in found.stages) == pytest.approx(sum(s.output_tokens for s in declared.stages))


# docs/scale.md, steps 1 to 3: a 70.55B model on a node of 8 H100
LARGE = 70.55e9
TASKS = {
    "reasoning": (6511, 1, 150, 150),
    "medical": (1000, 1, 150, 250),
    "code": (164, 50, 200, 200),
    "tools": (112, 1, 300, 80),
}


def test_the_arithmetic_is_that_of_the_70b_sweep() -> None:
    """Tokens and hours of the page's 3 seeds × 18 merges of 4 tasks, on half of the prompts, come out as it says."""
    written = read = hours = 0.0
    for prompts, samples, prompt, answer in TASKS.values():
        halves = [prompts * samples / 2, 1100 / 2]
        loads = [
            Load(halves[0], halves[0] / samples * prompt, halves[0] * answer),  # type: ignore[arg-type]
            Load(halves[1], halves[1] * 60, halves[1] * 300, num_judged=halves[1]),  # type: ignore[arg-type]
        ]
        stage = answering_stage("merged", 3 * 18, loads[0].plus(loads[1]), LARGE, ())
        written += stage.output_tokens
        read += stage.input_tokens
        assert stage.gpu_hours is not None
        hours += stage.gpu_hours
    assert written == pytest.approx(113.3e6, rel=1e-3)
    assert hours == pytest.approx((written / 10_000 + read / 24_000) / 3600 * 8, rel=1e-9)
    # both methods: twice the 14.4 GPU-hours of one
    assert hours == pytest.approx(2 * 14.4, rel=5e-3)


def test_the_arithmetic_of_training_and_of_the_judge() -> None:
    """6.4 GPU-hours for the page's tunings; about 0.6 for a 7B judge of 139,700 answers."""
    stages = [
        training_stage(FinetuneSettings(dataset="x", snapshot_steps=steps), 9000, LARGE)
        for steps in (500, 500, 500, 200)
    ]
    assert sum(stage.gpu_hours or 0 for stage in stages) == pytest.approx(6.4, rel=1e-2)
    load = Load(139_700, num_judged=139_700)
    judged = answering_stage("judged", 1, load, LARGE, (7e9,))
    assert judged.num_judged == 139_700
    assert judged.gpu_hours == pytest.approx(0.63, rel=0.2)
    assert answering_stage("judged", 1, load, LARGE, (None,)).gpu_hours is None


HUB = experiment(
    ("base", "meta-llama/Meta-Llama-3-8B-Instruct"),
    ("finetune.dataset", "code"),
    ("evaluate.utility", ["humaneval"]),
    ("evaluate.safety", ["advbench", "hexphi"]),
    ("evaluate.judge", {"name": "wildguard", "engine": {"name": "vllm"}}),
)


def test_the_hub_is_not_asked_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection is tried, though the hub's libraries were free to; afterwards they are as before."""
    import huggingface_hub.constants as hub

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a connection was tried")

    datasets: Any = importlib.import_module("datasets.config")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.chdir(tmp_path)
    found = dry_run(HUB)
    assert list(tmp_path.iterdir()) == []
    assert not found.faults
    assert (hub.HF_HUB_OFFLINE, datasets.HF_HUB_OFFLINE) == (False, False)
    fetched = details(found, "to fetch")
    for words in ("base: meta-llama/", "judge: allenai/wildguard", "AdvBench, 520", "HEx-PHI, 330", "Magicoder"):
        assert any(words in line for line in fetched), (words, fetched)
    assert found.num_bytes_to_fetch == 2 * (8.03e9 + 7.25e9)
    # two seeds, and as many adapters and merged models: 20,971,520 parameters in float32, and the base's size
    assert found.num_bytes_to_write == 2 * (4 * 20_971_520 + 2 * 8.03e9)


def test_hub_libraries_go_offline_even_if_imported_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within, both are offline; a setting from outside holds again afterwards, also where the block fails."""
    import huggingface_hub.constants as hub

    datasets: Any = importlib.import_module("datasets.config")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "HF_HUB_OFFLINE", False)
    seen: list[object] = []

    def looked() -> None:
        with offline():
            seen.extend((hub.is_offline_mode(), datasets.HF_HUB_OFFLINE, os.environ["HF_HUB_OFFLINE"]))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        looked()
    assert seen == [True, True, "1"]
    assert not hub.is_offline_mode()
    assert os.environ["HF_HUB_OFFLINE"] == "0"


def test_a_model_of_unknown_size_makes_no_hours_up() -> None:
    """An id that nothing is declared of is fetched without a size, and the hours are unknown."""
    found = dry_run(experiment(("base", "owner/some-model")))
    assert details(found, "to fetch") == [
        "base: owner/some-model, its size is not known; not checked: not on this machine"
    ]
    assert not found.faults
    assert found.gpu_hours is None
    assert found.num_bytes_to_fetch == 0


FAULTS: dict[str, tuple[tuple[tuple[str, Any], ...], str]] = {
    "no such folder": ((("base", "./nowhere"),), "base: there is no model folder at './nowhere'"),
    "misspelt data set": ((("finetune.dataset", "demo-plan"),), "tuning data: .*did you mean 'demo-plans'"),
    "missing file to tune on": ((("finetune.dataset", "mine.jsonl"),), "tuning data: there is no file 'mine.jsonl'"),
    "own copy that is missing": (
        (("finetune.dataset", "code"), ("finetune.data", {"file": "mine.jsonl"})),
        "tuning data: there is no file 'mine.jsonl'",
    ),
    "snapshot beyond the schedule": ((("finetune.snapshot_steps", 7),), "finetune: finetune.snapshot_steps is 7"),
    "misspelt benchmark": ((("evaluate.safety", ["advbnch"]),), "safety: .*did you mean 'advbench'"),
    "misspelt option": (
        (("evaluate.safety", [{"name": "advbench", "options": {"limt": 3}}]),),
        "safety: advbench has no option 'limt'",
    ),
    "own copy of a benchmark that is missing": (
        (("evaluate.safety", [{"name": "advbench", "data": "nowhere.csv"}]),),
        "safety: .*nowhere.csv",
    ),
    "benchmark of another kind": ((("evaluate.safety", ["demo-plans"]),), "safety: 'demo-plans' measures utility"),
    "misspelt judge": ((("evaluate.judge", "wildgard"),), "judge: .*did you mean 'wildguard'"),
    "misspelt engine": ((("evaluate.engine", {"name": "vlm"}),), "engine: .*did you mean 'vllm'"),
    "misspelt engine of the judge": (
        (("evaluate.judge", {"name": "wildguard", "engine": {"name": "vlm"}}),),
        "judge's engine: .*did you mean 'vllm'",
    ),
    "server": ((("evaluate.engine", {"name": "openai"}),), "engine: a server has its own models"),
    "misspelt method": ((("merge", [{"method": "liner"}]),), "merge: .*did you mean 'linear'"),
    "misspelt parameter": (
        (("merge", [{"method": "dare_linear", "parameters": {"dorp": 0.5}}]),),
        "merge: dare_linear has no parameter 'dorp'",
    ),
    "λ for a method without one": (
        (("merge", [{"method": "model_stock", "lam": [0.5]}]),),
        "merge: model_stock has no",
    ),
    "one seed for a method of several": ((("finetune.seeds", [1]),), "merge: model_stock takes at least 2"),
    "search that the rule does not fit": (
        (("search", {"name": "race"}), ("choice", {"rule": "weighted"})),
        "search: search 'race' does not work with rule 'weighted'",
    ),
    "judge that finds no refusals": (
        (("evaluate.over_refusal", ["demo-harmless"]), ("evaluate.judge", "llama-guard-3")),
        "judge: the judge llama-guard-3 does not report refusals",
    ),
    "code of one's own without leave": (
        (("evaluate.judge", "mine:judge"),),
        "judge: the judge 'mine:judge' is your own code",
    ),
    "too few prompts for two halves": (
        (("evaluate.utility", ["one.jsonl"]),),
        "evaluate: 'one' has too few prompts",
    ),
    "no prompt column": ((("evaluate.safety", ["odd.jsonl"]),), "safety: odd.jsonl, line 1: no prompt in the columns"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_a_run_would_end_with_is_a_fault(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is found, by the name of what it befalls, and no work is counted."""
    monkeypatch.chdir(tmp_path)
    Path("one.jsonl").write_text('{"prompt": "What is 2 + 3?", "answer": "5"}\n')
    Path("odd.jsonl").write_text('{"text": "What is 2 + 3?"}\n')
    changes, words = FAULTS[case]
    found = dry_run(experiment(*changes))
    faults = "\n".join(details(found, "fault"))
    assert found.faults, found.findings
    assert re.search(words, faults), faults
    assert found.stages == ()


def test_every_benchmark_is_declared() -> None:
    """A new row of the table needs its size here, unless it is made by backmerge itself."""
    made_here = {name for name, place in BENCHMARKS.entries.items() if place.startswith("backmerge.demo.")}
    assert set(BENCHMARKS.entries) - made_here <= set(DECLARED)
    for name, known in DECLARED.items():
        module = BENCHMARKS.entries.get(name, BENCHMARKS.entries["bbh"]).partition(":")[0]
        texts = [importlib.import_module(one).__doc__ or "" for one in (module, module.removesuffix("_benchmark"))]
        assert known.hub is None or any(known.hub in text for text in texts), name
        assert known.num_samples == 1 or name == "humaneval"


COPIES = {
    "advbench": "advbench/harmful_behaviors.csv",
    "humaneval": "humaneval/HumanEval.jsonl.gz",
    "openfunctions": "openfunctions/gorilla_openfunctions_v1_test.json",
    "xstest": "xstest/xstest_prompts.csv",
    "xstest-unsafe": "xstest/xstest_prompts.csv",
}


@pytest.mark.parametrize("name", COPIES)
def test_declared_sizes_are_those_of_the_data(name: str) -> None:
    """Prompts, limit and samples, where a copy of the data is here."""
    if not (DATA / COPIES[name]).exists():
        pytest.skip(f"shared/data/{COPIES[name]} is not there")
    settings = BenchmarkSettings(name=name, data=str(DATA / COPIES[name]))
    benchmark = find_of_any_kind(settings, "safety", Permissions(code_execution=True))
    known = DECLARED[name]
    assert len(benchmark.examples) == known.num_prompts
    assert benchmark.max_new_tokens == known.max_new_tokens
    assert benchmark.sampling.get("num_samples", 1) == known.num_samples


def test_a_model_s_size_is_read_from_its_files(make_model: Callable[..., Path]) -> None:
    """Parameters are those of the headers; rows and columns are those of the attention's and MLP's seven layers."""
    from backmerge.checkpoints.reader import Checkpoint

    size = size_of(Checkpoint(make_model("llama", seed=0)))
    hidden, inner, keys = 32, 48, 16
    layer = 2 * 2 * hidden + 2 * (hidden + keys) + 3 * (hidden + inner)
    assert size.lora_dims == 2 * layer
    assert size.num_parameters > 20_000
    # the same sum by hand for Llama-3-8B and Gemma-2B
    llama, gemma = MODELS["meta-llama/Meta-Llama-3-8B-Instruct"], MODELS["google/gemma-2b-it"]
    assert llama.lora_dims == 32 * (2 * 2 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert gemma.lora_dims == 18 * (2 * 2 * 2048 + 2 * (2048 + 256) + 3 * (2048 + 16384))


def test_tuned_models_are_checked_against_the_base(
    make_model: Callable[..., Path], make_adapter: Callable[..., Path]
) -> None:
    """One that fits is checked; one of another shape is a fault; one on the hub is to be fetched."""
    base = make_model("llama", seed=0)
    values: tuple[tuple[str, Any], ...] = (("base", str(base)), ("finetune", None), ("merge", [{"method": "linear"}]))
    fits = dry_run(experiment(*values, ("tuned", [str(make_adapter(base))])))
    assert any(finding.what == "tuned" and finding.state == "checked" for finding in fits.findings)
    odd = dry_run(experiment(*values, ("tuned", [str(make_model("gemma", seed=0))])))
    assert any(finding.what == "tuned" for finding in odd.faults)
    away = dry_run(experiment(*values, ("tuned", ["owner/tuned"])))
    assert (
        Finding("tuned", "to fetch", "owner/tuned, its size is not known; not checked: not on this machine")
        in away.findings
    )


def test_a_base_without_a_template_is_a_fault(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """It is found before any training."""
    import shutil

    folder = shutil.copytree(make_model("llama", seed=0), tmp_path / "base")
    for file in folder.glob("*.jinja"):
        file.unlink()
    found = dry_run(experiment(("base", str(folder))))
    assert any(line.startswith("base: ") and "has no chat template" in line for line in details(found, "fault"))


def test_command_prints_and_writes_nothing(
    run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 0 with a table of the work, 2 with the faults; no run directory in either case."""
    import yaml

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BACKMERGE_CACHE", str(tmp_path.parent / "speeds"))
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    code, printed, said = run_cli("run", file, "--dry-run")
    assert code == 0, said
    assert "answers to choose λ" in printed
    assert "60" in printed
    assert "GPU-hours = tokens × parameters / rate" in printed
    assert "On this machine: not measured yet" in printed
    assert "Nothing was written" in printed
    engine = made_engine(experiment().evaluate.engine)
    remember_speed(speed_key(engine.identity, Checkpoint(model_directory())), Rates(0, 0.0, 1, 1.0))
    code, printed, said = run_cli("run", file, "--dry-run")
    assert "Estimated time of the answers on this machine: about 73 min, as measured" in printed
    code, printed, said = run_cli("run", file, "--dry-run", "--set", "merge.0.method=liner")
    assert code == 2
    assert "did you mean 'linear'" in printed
    assert "the experiment 'tiny' cannot run as it is" in said
    given = ("--utility", "demo-plans", "--judge", "demo-rule", "--device", "cpu", "--out", "run", "--dry-run")
    code, printed, said = run_cli("restore", "demo", "tuned", "--safety", "demo-harmfull", *given)
    assert code == 2, "a tuned model that is not there, and a misspelt benchmark, are both told"
    assert "TUNED: there is no model folder at 'tuned'" in printed
    assert "--safety: there is no benchmark named 'demo-harmfull'; did you mean 'demo-harmful'" in printed
    given = ("--safety", "demo-harmful", "--judge", "demo-rule", "--device", "cpu", "--out", "run", "--dry-run")
    for command in (("evaluate", "demo"), ("check", "demo", "--against", "demo")):
        code, printed, said = run_cli(*command, *given, "--limit", "3")
        assert code == 0, said
        assert f"at most {3 * (1 if command[0] == 'evaluate' else 2)} answers" in printed
        assert "Nothing was written" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
