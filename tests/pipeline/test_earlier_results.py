"""Results and models of other settings or inputs are kept, in `earlier/`, and never pass for those of the new ones."""

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from backmerge.benchmarks.files import from_file
from backmerge.benchmarks.protocol import BenchmarkSettings
from backmerge.errors import ConfigError, RunError
from backmerge.judging.protocol import Judge, JudgeSettings
from backmerge.measuring.evaluate import Evaluator
from backmerge.outputs import check_digests
from backmerge.pipeline.checking import CheckSettings, check_model
from backmerge.pipeline.rescoring import score_answers
from backmerge.pipeline.sharding import measured_on
from backmerge.pipeline.single import SingleEvaluation, evaluate_model, plan_evaluation
from backmerge.pipeline.stages import run_experiment
from backmerge.planning.prepare import prepare
from backmerge.planning.settings import Experiment
from backmerge.records import Completion, Example, Verdict
from backmerge.registry import JUDGES, NOTHING_ALLOWED, Permissions

from .test_resume import COST

QUESTIONS = ("mend a kite", "paint the fence", "fill one bucket", "ring that bell", "polish some mirror", "fold a map")


class HarmlessJudge(Judge):
    """Takes every answer for a refusal: what random models say would make the base look unaligned."""

    name = identity = "harmless"

    def __init__(self, settings: JudgeSettings) -> None:
        del settings

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per completion."""
        assert len(examples) == len(completions)
        return [Verdict(c.example, harmful=False, refusal=True, sample=c.sample) for c in completions]


@pytest.fixture
def experiment(make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """Two tuned models; a margin so wide that everything passes."""
    monkeypatch.setitem(cast("dict[str, str]", JUDGES.entries), "harmless", f"{__name__}:HarmlessJudge")
    for name in ("utility", "safety"):
        lines = [json.dumps({"prompt": question, "answer": "yes"}) for question in QUESTIONS]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return Experiment.model_validate(
        {
            "base": str(make_model("llama", seed=0)),
            "tuned": [str(make_model("llama", seed=seed)) for seed in (1, 2)],
            "merge": [{"lam": [0.5]}],
            "evaluate": {
                "utility": [str(tmp_path / "utility.jsonl")],
                "safety": [str(tmp_path / "safety.jsonl")],
                "judge": "harmless",
                "engine": {"device": "cpu"},
                "max_new_tokens": 2,
            },
            "choice": {
                "margin": 0.99,
                "accept": ["wide_margin", "too_few_prompts", "answers_cut", "no_gain"],
            },
        }
    )


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a run but its log, lock, costs, looks, units, and what is kept of earlier settings."""
    files = (
        file
        for file in directory.rglob("*")
        if file.is_file() and file.name not in {"log.txt", "looks.jsonl", ".lock", "sessions.jsonl"}
    )
    return {
        str(file.relative_to(directory)): COST.sub(b"", file.read_bytes())
        for file in files
        if file.parent.name != "units" and "earlier" not in file.relative_to(directory).parts
    }


def stop(*_: Any, **__: Any) -> None:
    """What Ctrl-C does, at a moment of our choosing."""
    raise KeyboardInterrupt


def add_prompts(experiment: Experiment) -> None:
    """Change the prompts in the file of the experiment."""
    with Path(experiment.evaluate.safety[0].name).open("a") as stream:
        stream.write('\n{"prompt": "carry the ladder"}\n{"prompt": "light every lamp"}\n')


def test_results_of_other_prompts_are_kept_apart(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run stopped on other prompts leaves the earlier results, report and models whole, in `earlier/1`."""
    out = tmp_path / "run"
    run_experiment(experiment, out)
    assert len(list((out / "merged").iterdir())) == 2
    before = contents(out)
    add_prompts(experiment)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(experiment, out)
    assert sorted(path.name for path in out.iterdir() if path.name[0] != ".") == [
        "earlier",
        "experiment.yaml",
        "log.txt",
        "looks.jsonl",
        "sessions.jsonl",
        "units",
    ]
    kept = contents(out / "earlier" / "1")
    assert kept == {name: text for name, text in before.items() if name != ".gitignore"}
    check_digests(out / "earlier" / "1")
    run_experiment(experiment, out)
    run_experiment(experiment, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")
    assert contents(out / "earlier" / "1") == kept


@pytest.mark.usefixtures("without_report")
def test_killed_while_results_are_moved_loses_nothing(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before any of the moves, the next run ends with the same files in `earlier/1`."""
    out = tmp_path / "run"
    run_experiment(experiment, out)
    before = contents(out)
    add_prompts(experiment)
    replace = Path.replace
    for number in range(1, 100):
        moved: list[Path] = []

        def killed(path: Path, target: Path, moved: list[Path] = moved, number: int = number) -> Path:
            if "earlier" in target.parts and path.name[0] != ".":
                moved.append(path)
                if len(moved) == number:
                    raise KeyboardInterrupt
            return replace(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed)
            patch.setattr(Evaluator, "evaluate", stop)
            with pytest.raises(KeyboardInterrupt):
                run_experiment(experiment, out)
        if len(moved) < number:
            break
    assert number > 3
    assert [place.name for place in (out / "earlier").iterdir()] == ["1"]
    assert contents(out / "earlier" / "1") == {name: text for name, text in before.items() if name != ".gitignore"}


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize("kind", ["evaluate", "check", "score"])
def test_other_settings_of_other_commands_keep_earlier_results(
    experiment: Experiment, tmp_path: Path, kind: str
) -> None:
    """Another model or other answers move what was found before to `earlier/1`; the same ones again move nothing."""
    answers = tmp_path / "answers.jsonl"

    def carry_out(number: int) -> None:
        if kind == "evaluate":
            evaluate_model(
                SingleEvaluation(model=experiment.tuned[number], evaluate=experiment.evaluate), tmp_path / "out"
            )
        elif kind == "check":
            settings = CheckSettings(
                model=experiment.tuned[number], against=experiment.base, evaluate=experiment.evaluate
            )
            check_model(settings, tmp_path / "out")
        else:
            ids = [example.id for example in from_file(tmp_path / "safety.jsonl", "safety").examples]
            answers.write_text("".join(json.dumps({"id": i, "completion": str(number)}) + "\n" for i in ids))
            score_answers(
                answers,
                str(tmp_path / "safety.jsonl"),
                JudgeSettings(name="harmless"),
                tmp_path / "out",
                kind="safety",
                max_unscored=0.02,
                permissions=NOTHING_ALLOWED,
            )

    carry_out(0)
    before = contents(tmp_path / "out")
    carry_out(0)
    assert contents(tmp_path / "out") == before
    assert not (tmp_path / "out" / "earlier").exists()
    carry_out(1)
    assert contents(tmp_path / "out") != before
    assert contents(tmp_path / "out" / "earlier" / "1") == {n: text for n, text in before.items() if n != ".gitignore"}


@pytest.mark.usefixtures("without_report")
def test_findings_stay_where_nothing_changed(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command again takes nothing away, even for a moment."""
    out = tmp_path / "run"
    run_experiment(experiment, out)
    before = contents(out)
    monkeypatch.setattr(Evaluator, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, out)
    assert contents(out) == before


@pytest.mark.usefixtures("without_report")
def test_stopped_between_two_models_that_are_moved(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one of two models in `merged/` and no results yet, the run continues and ends with the same bytes."""
    out = tmp_path / "run"
    replace = Path.replace

    def second_fails(path: Path, target: Path) -> Path:
        if path.parent == out / "unconfirmed" and (out / "merged").exists() and any((out / "merged").iterdir()):
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", second_fails)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(experiment, out)
    assert [len(list((out / place).iterdir())) for place in ("merged", "unconfirmed")] == [1, 1]
    run_experiment(experiment, out)
    run_experiment(experiment, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.usefixtures("without_report")
def test_user_files_next_to_the_models_are_kept(experiment: Experiment, tmp_path: Path) -> None:
    """Files and folders in `merged/` that backmerge did not write outlive a change of everything."""
    out = tmp_path / "run"
    run_experiment(experiment, out)
    (out / "merged" / "notes.txt").write_text("mine")
    (out / "merged" / "quantised").mkdir()
    (out / "merged" / "quantised" / "model.gguf").write_text("mine")
    changed = experiment.model_copy(update={"tuned": experiment.tuned[:1]})
    run_experiment(changed, out)
    assert sorted(path.name for path in (out / "merged").iterdir()) == sorted(
        ["notes.txt", "quantised", Path(experiment.tuned[0]).name]
    )
    assert len(list((out / "earlier" / "1" / "merged").iterdir())) == 2


@pytest.mark.parametrize("place", ["merged", "unconfirmed"])
@pytest.mark.usefixtures("without_report")
def test_another_model_at_a_merges_path_is_neither_used_nor_replaced(
    experiment: Experiment, tmp_path: Path, place: str
) -> None:
    """A model that a user put where the merge goes is not confirmed as if it were the merge, and is not lost."""
    out = tmp_path / "run"
    run_experiment(experiment, out)
    name = Path(experiment.tuned[0]).name
    shutil.rmtree(out / "merged" / name)
    shutil.copytree(experiment.tuned[0], out / place / name)
    before = contents(out / place / name)
    with pytest.raises(RunError, match="not a model of this run"):
        run_experiment(experiment, out)
    assert contents(out / place / name) == before


@pytest.mark.usefixtures("without_report")
def test_experiments_and_evaluations_do_not_share_a_directory(experiment: Experiment, tmp_path: Path) -> None:
    """Neither overwrites the other's results."""
    single = SingleEvaluation(model=experiment.base, evaluate=experiment.evaluate)
    run_experiment(experiment, tmp_path / "run")
    evaluate_model(single, tmp_path / "single")
    for carry_out, settings, place in (
        (evaluate_model, single, tmp_path / "run"),
        (run_experiment, experiment, tmp_path / "single"),
    ):
        before = contents(place)
        with pytest.raises(RunError, match="contains"):
            carry_out(settings, place)
        assert contents(place) == before


@pytest.mark.usefixtures("without_report")
def test_a_damaged_configuration_is_one_clear_error(experiment: Experiment, tmp_path: Path) -> None:
    """An experiment.yaml that was edited to no YAML is named, not a traceback."""
    out = tmp_path / "run"
    (out / "units").mkdir(parents=True)
    (out / "experiment.yaml").write_text("base: [")
    with pytest.raises(RunError, match="damaged"):
        run_experiment(experiment, out)


@pytest.mark.usefixtures("without_report")
def test_damaged_merged_model_is_not_accepted_on_resume(experiment: Experiment, tmp_path: Path) -> None:
    """Resumed over a merged model that was altered, a run says so, and writes it again once it is removed."""
    out = tmp_path / "run"
    run_experiment(experiment, out)
    file = next(iter(sorted(out.glob("merged/*/model.safetensors"))))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RunError, match="damaged after this run wrote it"):
        run_experiment(experiment, out)
    shutil.rmtree(file.parent)
    run_experiment(experiment, out)
    assert next(iter(sorted(out.glob("merged/*/model.safetensors")))).read_bytes() == whole


OWN = """
from backmerge.benchmarks.metrics import PerAnswer
from backmerge.benchmarks.protocol import Benchmark
from backmerge.merging.method import merge_method
from backmerge.records import Example, Message


@merge_method(has_exact_endpoints=True, is_idempotent=True)
def own(base, tuned, /, *, lam):
    return base + lam * (tuned - base)


@merge_method(has_exact_endpoints=False, is_idempotent=True)
def flat(base, tuned, /):
    return base


def asked(settings):
    example = Example("a", (Message("user", "fold a map"),), reference="x")
    return Benchmark("asked", "utility", (example,), 2, PerAnswer({"mine": lambda example, text: 1.0}))
"""


@pytest.mark.usefixtures("without_report")
def test_changed_code_of_the_user_is_measured_again(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of a method or a benchmark is among the inputs of runs, and in the keys of answers and values."""
    monkeypatch.syspath_prepend(tmp_path)
    allowed, changing = Permissions(plugins=True), experiment.model_dump(mode="json")
    evaluate = experiment.evaluate.model_copy(
        update={"utility": (BenchmarkSettings(name="own_code_1:asked"),), "safety": ()}
    )
    single = SingleEvaluation(
        model=experiment.tuned[0], base=experiment.base, lam=(0.5,), method="own_code_1:own", evaluate=evaluate
    )
    measured: list[dict[str, Any]] = []
    values: list[float] = []
    for code in (OWN, OWN.replace("1.0", "0.0")):
        (tmp_path / "own_code_1.py").write_text(code)
        monkeypatch.delitem(sys.modules, "own_code_1", raising=False)
        importlib.invalidate_caches()
        found = evaluate_model(single, tmp_path / "run", allowed)
        values.append(found.scores[0].value)
        merge = [{"method": "own_code_1:own", "lam": [0.5]}]
        measured.append(
            {**found.inputs, "restore": measured_on(prepare(Experiment(**changing | {"merge": merge}), allowed), {})}
        )
    assert values == [1.0, 0.0]
    first, second = measured
    assert {key for key in first if first[key] != second[key]} == {"models", "benchmarks", "restore"}
    assert (tmp_path / "run" / "earlier" / "1" / "results.json").exists()
    assert {key for key in first["restore"] if first["restore"][key] != second["restore"][key]} == {"methods"}
    with pytest.raises(ConfigError, match="own_code_1:flat has no λ"):
        plan_evaluation(single.model_copy(update={"method": "own_code_1:flat"}), tmp_path / "no", allowed)
    alone = single.model_copy(update={"method": "own_code_1:flat", "lam": ()})
    assert [row.model for row in evaluate_model(alone, tmp_path / "flat", allowed).scores] == ["own_code_1:flat"]
