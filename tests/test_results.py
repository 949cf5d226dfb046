"""Results of every kind: a file reads back as what was written, and what cannot be read is one clear error."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from backmerge.config import Document, validated
from backmerge.errors import RunError
from backmerge.pipeline.stages import run_experiment
from backmerge.planning.settings import Experiment
from backmerge.results import CheckResults, EvaluateResults, RestoreResults, Results
from reporting.synthetic import enriched, made_results

DOCS = Path(__file__).parents[1] / "docs"
SCORED = {"schema_version": 2, "backmerge": "0.1.0", "model": "m", "judge": {"name": "j", "is_weak": False}}

# small, but with everything in it that a run can have: two judges, a comparison, held-out rows, categories
SETTINGS: dict[str, Any] = {
    "name": "small",
    "base": "demo",
    "finetune": {
        "dataset": "demo-plans",
        "data": {"num_examples": 40, "validation": 0.1},
        "seeds": [1, 2],
        "steps": 20,
        "batch_size": 4,
        "learning_rate": 8.0e-3,
        "device": "cpu",
    },
    "merge": [{"method": "linear", "lam": [0.5]}, {"method": "slerp", "lam": [0.5]}],
    "evaluate": {
        "utility": ["demo-plans"],
        "safety": ["demo-harmful"],
        "over_refusal": ["demo-harmless"],
        "judge": "demo-rule",
        "second_judge": "refusal-phrases",
        "engine": {"device": "cpu", "dtype": "float32"},
        "limit": 6,
    },
    "choice": {"rule": "paper", "compare": True},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of a few seconds."""
    directory = tmp_path_factory.mktemp("results") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backmerge.reporting.report.write_report", lambda _: None)  # the plots take seconds
        run_experiment(validated(Experiment, Document("this test", SETTINGS, {})), directory)
    return directory


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """`docs/generate.py`."""
    sys.path.insert(0, str(DOCS))
    try:
        spec = importlib.util.spec_from_file_location("generate_for_results", DOCS / "generate.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(DOCS))
    return module


def test_a_run_reads_back_key_by_key(run: Path, tmp_path: Path) -> None:
    """What a run wrote is exactly the type serialised: nothing is lost in either direction."""
    written = (run / "results.json").read_text(encoding="utf-8")
    results = Results.read(run)
    assert isinstance(results, RestoreResults)
    assert results.kind == "restore"
    assert results.plain() == json.loads(written)
    assert results.to_json() == written
    assert len(results.scores) > len(results.summary) > 10
    assert results.comparison is not None
    assert results.agreement
    assert results.validation
    results.write(tmp_path)
    assert Results.read(tmp_path) == RestoreResults.read(run / "results.json") == results


def test_the_page_is_made_from_the_types(generate: ModuleType) -> None:
    """`docs/results.md` is current: `python docs/generate.py results` would not change it."""
    page = generate.RESULTS_PAGE.read_text(encoding="utf-8")
    assert generate.with_schema(page) == page
    assert all(f"| `{key}` |" in page for key in ("upper_bound", "differ_on", "rounding_loss", "num_unanswered"))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (made_results(), RestoreResults),
        (enriched(made_results()), RestoreResults),
        (SCORED, EvaluateResults),
        ({**SCORED, "num_unanswered": 3}, EvaluateResults),
        ({**SCORED, "kind": "score"}, EvaluateResults),
        ({**SCORED, "a_key_of_a_later_version": {}}, EvaluateResults),
    ],
)
def test_files_of_before_there_were_kinds_are_read(values: dict[str, Any], kind: type[Results], tmp_path: Path) -> None:
    """Version 2 had no `kind` at first, and fewer keys; keys may have come since."""
    assert "kind" not in made_results()
    (tmp_path / "results.json").write_text(json.dumps(values))
    found = Results.read(tmp_path)
    assert type(found) is kind
    assert found.scores == kind.read(str(tmp_path)).scores


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema_version": 1}', "has schema version 1, and this backmerge reads 2"),
        ("{}", "has schema version None"),
        ('{"schema_version": 2, "kind": "dream"}', "of the kind 'dream'"),
        ('{"schema_version": 2}', "of the kind None"),
        ("[]", "holds no results"),
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
        (json.dumps({**SCORED, "model": 3}), "is damaged: 'model': Input should be a valid string"),
        (json.dumps({**SCORED, "scores": [{"model": "m"}]}), "is damaged: 'scores.0.benchmark'"),
        (json.dumps({**SCORED, "num_unanswered": "3"}), "is damaged: 'num_unanswered'"),
    ],
)
def test_what_is_older_or_damaged_is_refused(text: str, words: str, tmp_path: Path) -> None:
    """One clear error, with the file and what is wrong in it."""
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(RunError) as error:
        Results.read(tmp_path)
    assert words in str(error.value)
    assert "results.json" in str(error.value)
    assert len(str(error.value)) < 600


def test_another_kind_is_refused(tmp_path: Path) -> None:
    """Who asks for a check's results is not given scores."""
    (tmp_path / "results.json").write_text(json.dumps(SCORED))
    with pytest.raises(RunError, match="holds scores of evaluate or score, and not the results of check"):
        CheckResults.read(tmp_path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    """A folder that is none, a run that is not finished, and a suite, each in its words."""
    with pytest.raises(RunError, match="there is no such folder"):
        Results.read(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"is not a finished run: it has no results\.json"):
        Results.read(tmp_path)
    (tmp_path / "suite.yaml").write_text("")
    with pytest.raises(RunError, match="is a suite's folder"):
        Results.read(tmp_path)


def test_results_are_changed_by_nobody(run: Path) -> None:
    """They are frozen, and a file that was changed after the run wrote it is refused."""
    results = RestoreResults.read(run)
    with pytest.raises(ValueError, match="frozen"):
        results.choice.point = "tuned"  # type: ignore[misc]
    file = run / "results.json"
    before = file.read_text(encoding="utf-8")
    file.write_text(before.replace('"restored"', '"worse"') + " ")
    with pytest.raises(RunError, match="was changed after the run wrote it"):
        Results.read(run)
    file.write_text(before, encoding="utf-8")
