"""Merges by direction from end to end: statistics gathered once, kept by what they depend on, and used everywhere."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backmerge.benchmarks.guards import GuardSettings, find_guards
from backmerge.checkpoints.reader import CARD, Checkpoint
from backmerge.errors import CheckpointError, GenerationError
from backmerge.generation.cache import cache_directory
from backmerge.generation.protocol import EngineSettings, Request, Sampling
from backmerge.generation.vllm_worker import described, variant_of
from backmerge.measuring import remote
from backmerge.merging.inputs import InputStatistics
from backmerge.merging.method import find_method
from backmerge.merging.recipe import Variant
from backmerge.pipeline import chatting, guarding
from backmerge.pipeline.chatting import triple_of_run
from backmerge.pipeline.guarding import gathered_statistics, statistics_of_run
from backmerge.pipeline.single import SingleEvaluation, evaluate_model
from backmerge.pipeline.stages import run_experiment
from backmerge.planning.settings import Experiment
from backmerge.registry import NOTHING_ALLOWED
from input_cases import statistics

from .test_earlier_results import QUESTIONS, experiment  # noqa: F401 - fixtures

Factory = Callable[..., Path]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def guard_file(tmp_path: Path) -> Path:
    """Prompts that nothing measures."""
    file = tmp_path / "guard.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"verb{n} noun{n}"}) for n in range(6)))
    return file


def guards_of(file: Path, **settings: Any) -> dict[Any, Any]:
    """A guard with its prompts."""
    asked = GuardSettings(source=str(file), max_new_tokens=2, **settings)
    return find_guards([asked], [], NOTHING_ALLOWED)[0]


def test_statistics_are_collected_once_and_stored_by_their_inputs(
    make_model: Factory, guard_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run takes them from the cache; other weights, prompts, answers' length or dtype are gathered again."""
    collect, made = guarding.collect, []
    monkeypatch.setattr(guarding, "collect", lambda *a, **k: made.append(1) or collect(*a, **k))
    base, engine = Checkpoint(make_model("llama", seed=1)), EngineSettings(device="cpu")
    first = next(iter(gathered_statistics(guards_of(guard_file), base, engine, run=tmp_path / "1").values()))
    second = next(iter(gathered_statistics(guards_of(guard_file), base, engine, run=tmp_path / "2").values()))
    assert (len(made), first.fingerprint) == (1, second.fingerprint)
    assert first.path.is_relative_to(tmp_path / "1")
    assert second.path.is_relative_to(tmp_path / "2")
    assert (first.provenance.num_prompts, first.provenance.max_new_tokens) == (6, 2)
    assert "verb" not in first.path.read_bytes().decode("latin-1")
    for file, settings, model, dtype in (
        (guard_file, {"num_prompts": 3}, base, "auto"),
        (guard_file, {"max_directions": 5}, base, "auto"),
        (guard_file, {}, Checkpoint(make_model("llama", seed=2)), "auto"),
        (guard_file, {}, base, "bfloat16"),
    ):
        before = len(made)
        gathered_statistics(guards_of(file, **settings), model, EngineSettings(device="cpu", dtype=dtype))
        assert len(made) == before + 1


def test_damaged_statistics_are_never_used(
    make_model: Factory, guard_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the cache are collected again, which is printed; those that a run has are an error."""
    base, engine = Checkpoint(make_model("llama", seed=1)), EngineSettings(device="cpu")

    def gathered(run: str) -> InputStatistics:
        return next(iter(gathered_statistics(guards_of(guard_file), base, engine, run=tmp_path / run).values()))

    first = gathered("1")
    (cached,) = cache_directory().glob(f"inputs/{first.path.name}")
    whole = first.path.read_bytes()
    cached.unlink()  # a hard link of the run's
    cached.write_bytes(whole[:-64] + bytes(64))
    assert gathered("2").fingerprint == first.fingerprint
    assert cached.read_bytes() == whole
    assert f"{cached} was changed after it was written" in capsys.readouterr().err
    first.path.unlink()
    first.path.write_bytes(whole[:-64] + bytes(64))
    with pytest.raises(CheckpointError, match="was changed after") as raised:
        gathered("1")
    assert f"delete {first.path}" in str(raised.value.remedy)


def test_guards_share_an_engine_and_leave_the_runs_own_loaded(
    make_model: Factory, guard_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is loaded once for all guards, and a run on transformers goes on with it."""
    from backmerge.generation import transformers_engine

    load, loads = transformers_engine.load_model, []
    monkeypatch.setattr(transformers_engine, "load_model", lambda *a: loads.append(a[0]) or load(*a))
    base, settings = Checkpoint(make_model("llama", seed=1)), EngineSettings(device="cpu")
    two = guards_of(guard_file) | guards_of(guard_file, num_prompts=3)
    alone = gathered_statistics(two, base, settings, run=tmp_path / "1", is_cached=False)
    assert len(loads) == 1
    engine = transformers_engine.TransformersEngine(settings)
    shared = gathered_statistics(two, base, settings, run=tmp_path / "2", is_cached=False, running=engine)
    engine.loaded(Variant(base))
    assert len(loads) == 2
    assert [one.fingerprint for one in shared.values()] == [one.fingerprint for one in alone.values()]


@pytest.mark.usefixtures("without_report")
def test_an_experiment_compares_guards_and_writes_what_it_chose(
    experiment: Experiment,  # noqa: F811 - the fixture
    guard_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Linear, a file's guard and the base's own prompts in one run; the measured prompts have none of the guard's."""
    sweeps = [
        {"method": "anchored", "lam": [0.5], "guard": {"source": source, "max_new_tokens": 2, "num_prompts": 4}}
        for source in (str(guard_file), "own", experiment.evaluate.safety[0].name)
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"row{n} task{n}", "answer": "yes"}) for n in range(3)))
    sweeps.append({**sweeps[1], "label": "RegMean", "task": str(rows)})
    settings = experiment.model_dump(mode="json") | {"merge": [{"lam": [0.5]}, *sweeps]}
    finished = run_experiment(Experiment.model_validate(settings), tmp_path / "run")
    points = {row.point: row for row in finished.results.points}
    changed = "max_new_tokens=2:num_prompts=4"
    assert points.keys() == {
        "base", "tuned", "linear@0.5", f"anchored(guard=guard:{changed})@0.5", f"anchored(guard=own:{changed})@0.5",
        f"anchored(guard=safety:{changed})@0.5", "RegMean@0.5",
    }  # fmt: skip
    # six prompts, less the two that a guard took: a quarter, rounded up
    sizes = {row.name: row.sizes for row in finished.results.benchmarks}
    assert sizes["safety"].selection + sizes["safety"].confirmation == len(QUESTIONS) - 2
    assert len(list((tmp_path / "run" / "inputs").glob("*.safetensors"))) == 3 + len(experiment.tuned)
    assert {row.guard: row.description for row in finished.results.guards} == {
        f"guard:{changed}": "4 file prompts of guard",
        f"own:{changed}": "4 prompts that the base wrote",
        f"safety:{changed}": "2 file prompts of safety",
        "rows": "3 rows of rows",
    }
    chosen = finished.results.choice.point
    assert chosen is not None
    for folder in (tmp_path / "run" / "merged").iterdir():
        recipe = json.loads((folder / CARD).read_text())["recipe"]
        assert recipe["method"] == points[chosen].method
        assert ("inputs" in recipe) is (recipe["method"] == "anchored")
    # the run's chat makes the same merge again, from the statistics that it kept
    for row in points.values():
        if row.method != "anchored":
            continue
        choice = finished.results.choice.model_copy(update={"point": row.point, "lam": 0.5, "series": row.series})
        results = finished.results.model_copy(update={"choice": choice})
        monkeypatch.setattr(chatting, "read_run", lambda _, found=results: SimpleNamespace(results=found))
        named = {row.parameters["guard"], row.parameters.get("task")}
        merged = triple_of_run(tmp_path / "run").merged
        models = {"guard_inputs": merged.base.fingerprint, "task_inputs": merged.tuned_models[0].fingerprint}
        assert merged.weights_identity["inputs"] == {
            known.role: known.fingerprint
            for known in results.guards
            if known.guard in named and known.model == models[known.role]
        }
        assert ("task_inputs" in merged.inputs) is (row.point == "RegMean@0.5")


def test_other_processes_make_the_same_merge(make_model: Factory, guard_file: Path, tmp_path: Path) -> None:
    """A worker of a pool, of Ray or of vLLM gets the file of statistics with the recipe."""
    base, tuned = (Checkpoint(make_model("llama", seed=seed)) for seed in (1, 2))
    (known,) = gathered_statistics(guards_of(guard_file), base, EngineSettings(device="cpu"), run=tmp_path).values()
    variant = Variant(base, tuned, find_method("anchored"), 0.5, inputs={"guard_inputs": known})
    text = described(variant)
    assert text is not None
    assert variant_of(json.loads(text)).identity == variant.identity
    spec = remote.spec_of(Request(variant, (), Sampling()), EngineSettings(device="cpu"), permissions=NOTHING_ALLOWED)
    assert spec["inputs"] == {"guard_inputs": str(known.path.absolute())}
    assert remote.answer(spec, lambda _: None) == []


def test_commands_gather_merge_and_refuse(
    run_cli: Cli, make_model: Factory, make_adapter: Factory, guard_file: Path, tmp_path: Path
) -> None:
    """`inputs`, then `merge` with guard and task; statistics of other weights are refused."""
    base = make_model("llama", seed=1)
    lora = make_adapter(base, seed=2)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"ask {n}", "answer": f"say {n}"}) for n in range(4)))
    guard, task = tmp_path / "guard.safetensors", tmp_path / "task.safetensors"
    common = ("--device", "cpu", "--max-new-tokens", 2)
    code, printed, _ = run_cli("inputs", base, "--guard", guard_file, *common, "--out", guard)
    assert code == 0
    assert "on 6 file prompts" in printed
    assert run_cli("inputs", lora, "--base", base, "--task", rows, *common, "--out", task)[0] == 0
    assert InputStatistics(task).provenance.kind == "task"
    both = ("--method", "anchored", "--lam", 0.5, "--guard", guard, "--task-inputs", task, "--no-verify")
    code, _, errors = run_cli("merge", base, lora, *both, "--as", "adapter", "--out", tmp_path / "merged")
    assert (code, errors) == (0, "")
    card = json.loads((tmp_path / "merged" / CARD).read_text())
    assert card["recipe"]["inputs"].keys() == {"guard_inputs", "task_inputs"}
    file = tmp_path / "mergekit.yml"
    models = {"base_model": str(base), "models": [{"model": str(lora)}]}
    file.write_text(json.dumps({"merge_method": "anchored", **models, "parameters": {"lambda": 0.5, "ridge": 0.1}}))
    code, _, errors = run_cli("merge", "--config", file, "--guard", guard, "--no-verify", "--out", tmp_path / "config")
    assert code == 0, errors
    card = json.loads((tmp_path / "config" / CARD).read_text())
    assert (card["recipe"]["lam"], card["recipe"]["parameters"]) == (0.5, {"ridge": 0.1})
    assert run_cli("merge", "--config", file, "--out", tmp_path / "no")[0] == 2
    other = make_model("llama", seed=3)
    code, _, errors = run_cli("merge", other, base, "--method", "anchored", "--guard", guard, "--out", tmp_path / "no")
    assert code == 2
    assert "has the inputs of other weights" in errors
    code, _, errors = run_cli("merge", base, lora, "--guard", guard, "--out", tmp_path / "no")
    assert (code, "linear takes no input statistics" in errors) == (2, True)


def test_statistics_of_other_weights_are_refused(make_model: Factory, guard_file: Path, tmp_path: Path) -> None:
    """A file given as the guard must be of this base."""
    first, second = (Checkpoint(make_model("llama", seed=seed)) for seed in (1, 2))
    (known,) = gathered_statistics(guards_of(guard_file), first, EngineSettings(device="cpu"), run=tmp_path).values()
    guards, _ = find_guards([GuardSettings(source=str(known.path))], [], NOTHING_ALLOWED)
    with pytest.raises(CheckpointError, match="other weights"):
        gathered_statistics(guards, second, EngineSettings(device="cpu"))


def test_a_model_that_writes_no_prompts_is_merged_without_a_guard(
    make_model: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`restore` asks for the base's own prompts by default, so the error names the way without."""

    def nothing(*_: Any) -> None:
        raise GenerationError("the model wrote no prompt")

    monkeypatch.setattr("backmerge.generation.layer_inputs.own_prompts", nothing)
    guards = find_guards([GuardSettings(source="own")], [], NOTHING_ALLOWED)[0]
    with pytest.raises(GenerationError, match="wrote no prompt") as raised:
        gathered_statistics(guards, Checkpoint(make_model("llama")), EngineSettings(device="cpu"), run=tmp_path)
    assert "--guard none" in str(raised.value.remedy)


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize("kind", ["restore", "evaluate"])
def test_results_of_a_replaced_file_of_statistics_are_kept_apart(
    experiment: Experiment,  # noqa: F811 - the fixture
    tmp_path: Path,
    kind: str,
) -> None:
    """The file's content is among the inputs, under its whole name: other statistics make another run."""
    base, asked = Checkpoint(Path(experiment.base)), {}
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        asked[folder] = tmp_path / folder / "g.safetensors"
        statistics(base, asked[folder], seed=len(asked))
    sweeps = [
        {"method": "anchored", "label": folder, "lam": [0.5], "guard": str(file)} for folder, file in asked.items()
    ]
    settings = Experiment.model_validate(
        experiment.model_dump(mode="json") | {"merge": sweeps, "tuned": experiment.tuned[:1]}
    )
    single = SingleEvaluation(
        model=experiment.tuned[0],
        base=experiment.base,
        lam=(0.5,),
        method="anchored",
        guard=GuardSettings(source=str(asked["one"])),
        evaluate=experiment.evaluate,
    )
    out = tmp_path / "run"

    def carried_out() -> dict[str, Any]:
        results = run_experiment(settings, out).results if kind == "restore" else evaluate_model(single, out)
        for row in results.guards:  # as chat finds them
            known = statistics_of_run(results.guards, {"guard_inputs": GuardSettings(source=row.source)}, out)
            assert [one.path for one in known.values()] == [Path(row.source)]
        guards: dict[str, Any] = results.inputs["guards"]
        return guards

    before = carried_out()
    assert set(before) == {str(file) for file in (asked.values() if kind == "restore" else [asked["one"]])}
    statistics(base, asked["one"], seed=9)
    after = carried_out()
    assert {file for file in before if before[file] != after[file]} == {str(asked["one"])}
    assert json.loads((out / "earlier" / "1" / "results.json").read_text())["inputs"]["guards"] == before
    if kind == "restore":
        assert len((out / "looks.jsonl").read_text().splitlines()) == 2
