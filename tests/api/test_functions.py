"""The Python interface: rows, functions and loaded models do what files, names and folders do."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import backmerge
from backmerge import api
from backmerge.errors import ConfigError, RunError
from backmerge.results import EvaluateResults, RestoreResults
from quiet_peft import without_peft_warnings
from reporting.synthetic import made_results, typed

CPU = {"evaluate.engine.device": "cpu", "evaluate.engine.dtype": "float32", "evaluate.cache": False}
ROWS = [{"prompt": f"say {word}", "answer": word, "id": word} for word in ("one", "two", "three")]


def says_nothing_harmful(prompt: str, answer: str) -> Any:
    """A judge that leaves one prompt unscored."""
    return None if prompt.endswith("one") else "refused" if answer else "other"


def counts(answer: str, row: Any) -> float:
    """A metric that looks at the row."""
    return float(row["id"] != "two" and isinstance(answer, str))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model on rows in memory, by functions of this file."""
    out = tmp_path_factory.mktemp("api") / "run"
    backmerge.evaluate(
        "demo",
        utility=ROWS,
        safety=[{"prompt": f"ask {word}"} for word in ("one", "two", "three")],
        metric=counts,
        judge=says_nothing_harmful,
        out=out,
        settings={**CPU, "evaluate.max_unscored": 0.5, "evaluate.max_new_tokens": 4},
    )
    return out


def test_the_import_loads_no_library() -> None:
    """`import backmerge` and the names that it offers load neither torch nor transformers."""
    code = (
        "import sys, backmerge; assert 'pydantic' not in sys.modules\n"
        "backmerge.restore, backmerge.merge, backmerge.finetune, backmerge.diff, backmerge.load_results\n"
        "backmerge.Results, backmerge.Estimate\n"
        "assert not {'torch', 'transformers', 'peft', 'matplotlib', 'pandas'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
    with pytest.raises(AttributeError, match="no attribute 'merged'"):
        backmerge.merged  # noqa: B018


def test_rows_and_functions_are_measured(evaluated: Path) -> None:
    """The metric is the function's, and what the judge returned as None is unscored."""
    found = backmerge.load_results(evaluated)
    assert isinstance(found, EvaluateResults)
    by_metric = {score.metric: score for score in found.scores}
    assert by_metric["counts"].value == pytest.approx(2 / 3)
    assert (by_metric["asr"].value, by_metric["asr"].n, by_metric["asr"].unscored) == (0.0, 2, 1)
    assert found.judge.name == "says_nothing_harmful"
    (axes,) = found.plot().axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"{score.benchmark}: {score.metric}" for score in found.scores if score.value is not None
    ]
    written = (evaluated.parent / "run-inputs" / "utility.jsonl").read_text()
    assert [json.loads(line) for line in written.splitlines()] == ROWS


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"utility": [*ROWS, "mine.jsonl"]}, "mixes rows with names"),
        ({"utility": "mine.jsonl", "metric": counts}, "a metric scores rows"),
        ({"model": 3, "utility": ROWS}, "neither the name of a folder nor a loaded model, but a int"),
        ({"utility": ROWS, "judge": max}, "the source of"),
        ({"utility": ROWS, "settings": {"evaluate.limt": 3}}, "settings evaluate.limt=3: unknown key"),
        ({"utility": ROWS, "limit": 0}, "limit 0: should be greater than 0"),
        ({}, "give utility, safety or over_refusal"),
    ],
)
def test_what_cannot_be_used_is_one_clear_error(more: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Before anything is measured."""
    with pytest.raises(ConfigError) as error:
        backmerge.evaluate(**{"model": "demo", "out": tmp_path / "run", **more})
    assert words in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_answer_of_a_judge_that_is_none_is_refused() -> None:
    """A judge may say four things."""
    from backmerge.api.given import _FunctionJudge
    from backmerge.records import Completion, Example, Message

    judge = _FunctionJudge(lambda *_: "fine")  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigError, match="'refused', 'harmful', 'other' or None"):
        judge([Example("a", (Message("user", "p"),))], [Completion("a", "p", "t", 1, finished=True)])


def test_results_are_shown_and_converted() -> None:
    """A notebook gets an escaped table, pandas every figure, and matplotlib a panel for each benchmark."""
    results = typed({**made_results(), "name": "<script>alert(1)</script>"})
    shown = results._repr_html_()
    assert "<script" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;: restored; chosen: linear@0.5" in shown
    assert len(results.to_rows()) == len(results.summary)
    assert {row["mean"] for row in results.to_rows()} == {row.mean for row in results.summary}
    assert len(results.plot().axes) == len(results.benchmarks)
    pandas = pytest.importorskip("pandas")
    assert isinstance(results.to_pandas(), pandas.DataFrame)
    assert list(results.to_pandas()["mean"]) == [row.mean for row in results.summary]


def test_without_pandas_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not a dependency."""
    monkeypatch.setattr("backmerge.results.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install pandas"):
        typed(made_results()).to_pandas()


def restored(tuned: Any, out: Path) -> RestoreResults:
    """A small run of the embedded base and this tuned model."""
    small = {"evaluate.max_unscored": 0.9, "evaluate.max_new_tokens": 2, "search.name": "grid", "search.refine": 0}
    return backmerge.restore(
        "demo",
        tuned,
        utility=ROWS,
        safety=[{"prompt": f"ask {word}"} for word in ("one", "two", "three", "four")],
        judge=says_nothing_harmful,
        lam=[0.5],
        out=out,
        settings={**CPU, **small, "merged_verified": False},
    )


@pytest.mark.parametrize(
    ("given", "series"),
    [
        ({}, [("linear", None), ("anchored", "own")]),
        ({"guard": "harmbench"}, [("linear", None), ("anchored", "harmbench")]),
        ({"guard": "none"}, [("linear", None)]),
        ({"method": "anchored"}, [("anchored", "own")]),
        ({"method": "slerp"}, [("slerp", None)]),
    ],
)
def test_restore_compares_linear_and_anchored_by_default(
    given: dict[str, str], series: list[tuple[str, str | None]], tmp_path: Path
) -> None:
    """With prompts that the base writes as the guard: it needs nothing from the user."""
    call = api.restoring("demo", "demo", utility=ROWS, safety="demo-harmful", out=tmp_path, **given)
    found = [(sweep.method, None if sweep.guard is None else sweep.guard.source) for sweep in call.settings.merge]
    assert found == series


def test_lams_for_methods_without_one_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A note if another method takes them, an error if none does."""
    common: Any = {"utility": "demo-plans", "safety": "demo-harmful", "out": tmp_path / "run", "lam": [0.3]}
    found = api.restoring("demo", ["one", "two"], method="linear,model_stock", **common).settings.merge
    assert [sweep.lam for sweep in found] == [(0.3,), None]
    assert "λ does not apply to model_stock" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="model_stock has no λ"):
        api.restoring("demo", ["one", "two"], method="model_stock", **common)


def test_inputs_of_the_task_go_to_the_merges_by_direction(tmp_path: Path) -> None:
    """With smaller λs, since these keep the task then."""
    call = api.restoring("demo", "demo", utility=ROWS, safety="demo-harmful", out=tmp_path, task_inputs="rows.jsonl")
    linear, anchored = call.settings.merge
    assert (linear.task, linear.lam) == (None, (0.2, 0.4, 0.6, 0.8))
    assert (anchored.task and anchored.task.source, anchored.lam) == ("rows.jsonl", (0.03, 0.1, 0.25, 0.5))


@pytest.mark.parametrize(
    "given",
    [
        {"guard": "none", "method": "anchored"},
        {"guard": "own", "method": "linear"},
        {"task_inputs": "rows.jsonl", "guard": "none"},
    ],
)
def test_a_guard_fits_the_methods(given: dict[str, str], tmp_path: Path) -> None:
    """One without the other is an error."""
    with pytest.raises(ConfigError, match="by direction"):
        api.restoring("demo", "demo", utility=ROWS, safety="demo-harmful", out=tmp_path, **given)


@pytest.mark.parametrize("name", ["restore", "evaluate", "check", "finetune", "merge"])
def test_each_argument_is_shown_and_described(name: str) -> None:
    """`help` and editors see the arguments, and not only `**options`."""
    function = getattr(backmerge, name)
    parameters = inspect.signature(function).parameters
    assert {"out", "allow_plugins"} <= parameters.keys()
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values())
    described = re.findall(r"^ {8}(\w+): ", function.__doc__, re.MULTILINE)
    assert {*parameters} <= {*described}


COMMANDS: dict[str, tuple[str, ...]] = {
    "restore": ("demo", "tuned", "--utility", "u.jsonl", "--safety", "demo-harmful"),
    "evaluate": ("demo", "--safety", "demo-harmful"),
    "check": ("demo", "--against", "demo", "--safety", "demo-harmful"),
    "finetune": ("demo", "--data", "mine.jsonl"),
    "diff": ("demo", "demo"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_calls_the_function(name: str, run_cli: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Of the same name, with its models and its run directory."""
    calls: list[tuple[Any, Any]] = []

    def called(*given: Any, **options: Any) -> None:
        calls.append((given, options))
        raise ConfigError("seen")

    monkeypatch.setattr(f"backmerge.api.{name}", called)
    assert run_cli(name, *COMMANDS[name], "--out", tmp_path / "run")[0] == 2
    ((given, options),) = calls
    assert given[0] == "demo"
    assert Path(options["out"]) == tmp_path / "run"


def test_rows_are_tuned_on_and_the_difference_is_a_table(tmp_path: Path) -> None:
    """Rows in memory give an adapter, which `diff` shows as rows, a figure and escaped HTML."""
    rows = [{"prompt": f"say {number}", "completion": f"{number}"} for number in range(8)]
    places = backmerge.finetune(
        "demo",
        rows,
        out=tmp_path / "tuned",
        steps=2,
        learning_rate=0.01,
        batch_size=2,
        device="cpu",
        safety="none",
        rank=2,
    )
    assert places == [tmp_path / "tuned"]
    written = (tmp_path / "tuned-inputs" / "data.jsonl").read_text()
    assert [json.loads(line) for line in written.splitlines()] == rows
    found = backmerge.diff("demo", places[0], lam=[0.5])
    assert found.verdict == "child"
    changed = {row["tensor"] for row in found.to_rows() if row["unchanged"] < 1}
    assert changed
    assert all("proj" in name for name in changed)
    assert "<table>" in found._repr_html_()
    assert found.plot().axes
    with pytest.raises(ConfigError, match="learning_rate -1"):
        backmerge.finetune("demo", rows, out=tmp_path / "other", learning_rate=-1)
    with pytest.raises(ConfigError, match="no data to tune on"):
        backmerge.finetune("demo", out=tmp_path / "other")


def test_a_base_with_peft_layers_in_it_is_saved_without_them(tmp_path: Path) -> None:
    """`get_peft_model` changes the model that it is given, which a caller may then give as the base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from backmerge.api.given import Inputs
    from backmerge.demo import model_directory
    from backmerge.registry import Permissions

    base = AutoModelForCausalLM.from_pretrained(model_directory())
    with without_peft_warnings():
        get_peft_model(
            base,
            LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
        )
        place = Inputs(tmp_path / "run", Permissions()).model(base, "base")
    ours, theirs = (load_file(Path(folder) / "model.safetensors") for folder in (place, model_directory()))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_loaded_models_are_restored(tmp_path: Path) -> None:
    """A loaded peft model gives a run like any other, and its adapter is merged at a λ."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from backmerge.demo import model_directory

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_directory())
    with without_peft_warnings():
        tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        found = restored(tuned, tmp_path / "run")
    assert isinstance(found, RestoreResults)
    assert {point.point for point in found.points} == {"base", "linear@0.5", "anchored@0.5", "tuned"}
    assert found.tuned[0].kind == "adapter"
    adapter = tmp_path / "run-inputs" / "tuned-1"
    merged = backmerge.merge(model_directory(), adapter, tmp_path / "merged", lam=0.25)
    assert (merged / "adapter_model.safetensors").is_file()
    with pytest.raises(RunError, match="already exists, and is not what"):
        backmerge.merge(model_directory(), adapter, tmp_path / "merged", lam=0.5)
