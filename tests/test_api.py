"""The Python interface: rows, functions and loaded models do what files, names and folders do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import backmerge
from backmerge.errors import ConfigError
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
        "backmerge.restore, backmerge.merge, backmerge.load_results, backmerge.Results, backmerge.Estimate\n"
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
    written = (evaluated.parent / "run-inputs" / "utility.jsonl").read_text()
    assert [json.loads(line) for line in written.splitlines()] == ROWS


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"utility": [*ROWS, "mine.jsonl"]}, "mixes rows with names"),
        ({"utility": "mine.jsonl", "metric": counts}, "a metric scores rows"),
        ({"model": 3, "utility": ROWS}, "neither a folder's name nor a loaded model, but a int"),
        ({"utility": ROWS, "judge": max}, "the source of"),
        ({"utility": ROWS, "settings": {"evaluate.limt": 3}}, "limt"),
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
    from backmerge.api import _FunctionJudge
    from backmerge.records import Completion, Example, Message

    judge = _FunctionJudge(lambda *_: "fine")  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigError, match="'refused', 'harmful', 'other' or None"):
        judge([Example("a", (Message("user", "p"),))], [Completion("a", "p", "t", 1, finished=True)])


def test_results_are_shown_and_taken_apart() -> None:
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
    """It is no dependency."""
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
    assert {point.point for point in found.points} == {"base", "linear@0.5", "tuned"}
    assert found.tuned[0].kind == "adapter"
    adapter = tmp_path / "run-inputs" / "tuned-1"
    merged = backmerge.merge(model_directory(), adapter, tmp_path / "merged", lam=0.25)
    assert (merged / "adapter_model.safetensors").is_file()
    with pytest.raises(ConfigError, match="is there already"):
        backmerge.merge(model_directory(), adapter, tmp_path / "merged")
