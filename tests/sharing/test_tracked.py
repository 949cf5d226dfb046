"""What trackers are told of a run: every setting flat, every figure with its interval, curves over λ, and no answer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from backmerge.errors import ConfigError, RunError
from backmerge.registry import Permissions
from backmerge.reporting.report import FinishedRun, read_run, write_report
from backmerge.sharing import trackers
from backmerge.sharing.tracked import Tracked, metric_name, steps_of, tracked, write_files
from reporting.synthetic import enriched, made_results, made_run, made_samples, typed

PROMPT, ANSWER = "a prompt of nobody's business", "an answer of nobody's business"


def written(directory: Path, results: dict[str, Any]) -> Path:
    """A finished run with its report."""
    made_run(directory, results, made_samples(ANSWER, PROMPT))
    write_report(directory)
    return directory


def finished(
    experiment: dict[str, Any] | None = None, results: dict[str, Any] | None = None, **options: Any
) -> FinishedRun:
    """A run as it is read."""
    return FinishedRun(typed(results or made_results(**options)), made_samples(), experiment or {}, "", {})


def test_settings_are_flat() -> None:
    """Nested keys by dots, lists of settings by number, lists of values and what is empty as JSON; nothing is lost."""
    experiment = {
        "name": "x",
        "evaluate": {"utility": [{"name": "task", "data": None}], "limit": 5, "cache": True},
        "merge": [{"lam": [0.2, 0.4], "parameters": {}}],
        "choice": {"margin": 0.03},
    }
    assert tracked(finished(experiment)).settings == {
        "name": "x",
        "evaluate.utility.0.name": "task",
        "evaluate.utility.0.data": "null",
        "evaluate.limit": 5,
        "evaluate.cache": True,
        "merge.0.lam": "[0.2, 0.4]",
        "merge.0.parameters": "{}",
        "choice.margin": 0.03,
    }


def test_figures_are_of_the_three_models_with_intervals() -> None:
    """Base, tuned and merged on the confirmation prompts, and the differences that the verdict rests on."""
    run = finished()
    figures = tracked(run).figures
    rows = [row for row in run.results.summary if row.split == "confirmation"]
    roles = {"base": "base", "tuned": "tuned", "linear@0.5": "merged"}
    assert len(rows) == 9
    for row in rows:
        name = f"confirmation/{row.benchmark}/{row.metric}/{roles[row.point]}"
        assert (figures[name], figures[f"{name}_low"], figures[f"{name}_high"]) == (
            row.mean,
            row.low,
            row.high,
        )
    assert figures["asr_difference"] == 0.005
    assert figures["tuned_asr_difference_low"] == pytest.approx(0.28)
    assert len(figures) == 3 * 9 + 3 + 3 + 1


def test_nothing_chosen_has_no_merged_figures() -> None:
    """Where no λ passed there is nothing of a merge to tell, and the verdict says so."""
    told = tracked(finished(chosen=None, verdict="not shown"))
    assert not any("merged" in name for name in told.figures)
    assert told.findings["verdict"] == "not shown"
    assert told.findings["chosen"] == "None"


def test_curves_run_from_base_to_tuned() -> None:
    """Each series has the base at 0, its own λs, and the tuned model at 1, in order; one without λ has no curve."""
    told = tracked(finished(with_slerp=True, with_stock=True))
    curves = {curve.name: curve.points for curve in told.curves}
    assert [lam for lam, _ in curves["linear/harmful/asr"]] == [0.0, 0.25, 0.5, 1.0]
    assert [lam for lam, _ in curves["slerp/harmful/asr"]] == [0.0, 0.5, 1.0]
    assert not any(name.startswith("model_stock") for name in curves)
    means = [figures["mean"] for _, figures in curves["linear/task/accuracy"]]
    assert means == pytest.approx([0.10, 0.405, 0.825, 0.905])


def test_unscored_answers_are_left_out() -> None:
    """A missing mean is no figure and no point of a curve."""
    results = made_results()
    for row in results["summary"]:
        if row["benchmark"] == "harmful" and row["point"] in ("tuned", "linear@0.25"):
            row["mean"] = None
    told = tracked(finished(results=results))
    assert "confirmation/harmful/asr/tuned" not in told.figures
    (curve,) = [curve for curve in told.curves if curve.name == "linear/harmful/asr"]
    assert [lam for lam, _ in curve.points] == [0.0, 0.5]


def test_steps_rise() -> None:
    """All curves' figures at one λ are told together, in thousandths, from low to high."""
    steps = steps_of(tracked(finished(with_slerp=True)))
    assert list(steps) == [0, 250, 500, 1000]
    assert steps[500]["linear/harmful/asr/mean"] == pytest.approx(0.021)
    assert steps[500]["slerp/harmful/asr/high"] > 0
    assert "slerp/harmful/asr/mean" not in steps[250]


def test_names_are_valid_for_every_tracker() -> None:
    """Signs that a store refuses are replaced, and names that thereby become one stay two."""
    assert metric_name("dare(density=0.5)", "lm-eval:bbh", "acc,none") == "dare_density=0.5_/lm-eval_bbh/acc_none"
    results = made_results(with_slerp=True)
    names = {"linear": "dare(p:1)", "slerp": "dare(p;1)"}
    for row in [*results["points"], *results["summary"]]:
        row["series"] = names.get(row["series"], row["series"])
    curves = [curve.name for curve in tracked(finished(results=results)).curves]
    assert {"dare_p_1_/harmful/asr", "dare_p_1_/harmful/asr-2"} < set(curves)
    assert len(set(curves)) == len(curves)
    assert all(re.fullmatch(r"[\w .@=/-]+", name) for name in curves)


def test_no_answer_goes(tmp_path: Path) -> None:
    """The run's own report shows prompts and answers; of what goes, no file and no figure holds one."""
    run = written(tmp_path / "run", enriched(made_results()))
    assert ANSWER in (run / "report.html").read_text()
    place = tmp_path / "place"
    place.mkdir()
    write_files(read_run(run), run, place)
    files = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    assert {"report.html", "results.json", "summary.csv", "scores.csv", "plots/curves.svg"} <= files
    assert not files & {"samples.json", "log.txt"}
    for path in place.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert ANSWER.encode() not in content
            assert PROMPT.encode() not in content
    told = repr(tracked(read_run(run)))
    assert ANSWER not in told
    assert "Safety restored" in (place / "report.html").read_text()


TOLD: list[tuple[Tracked, set[str]]] = []


def own_tracker(what: Tracked, place: Path) -> str:
    """A user's own."""
    TOLD.append((what, {path.name for path in place.iterdir()}))
    return "a list in this file"


def broken_tracker(what: Tracked, place: Path) -> str:
    """One that cannot be reached."""
    raise ConnectionError("no route to it")


@pytest.fixture
def own() -> str:
    """The name of a tracker of a user's own, which was told nothing yet."""
    TOLD.clear()
    return f"{__name__}:own_tracker"


def test_results_are_reported_to_a_tracker_once(tmp_path: Path, own: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is resumed has one entry; other results have another."""
    run = made_run(tmp_path / "run")
    trackers.report_to([own, own], run, permissions=Permissions(plugins=True))
    assert "Reported to" in capsys.readouterr().err
    trackers.report_to([own], run, permissions=Permissions(plugins=True))
    assert "already has these results" in capsys.readouterr().err
    assert len(TOLD) == 1
    assert "report.html" in TOLD[0][1]
    made_run(run, made_results(chosen="linear@0.25"))
    trackers.report_to([own], run, permissions=Permissions(plugins=True))
    assert [what.findings["chosen"] for what, _ in TOLD] == ["linear@0.5", "linear@0.25"]


def test_a_tracker_that_fails_loses_nothing(tmp_path: Path) -> None:
    """The run stays finished, the message says how to try again, and the report is not marked as sent."""
    run = made_run(tmp_path / "run")
    name = f"{__name__}:broken_tracker"
    with pytest.raises(RunError, match=": no route to it") as error:
        trackers.report_to([name], run, permissions=Permissions(plugins=True))
    assert "same command again" in str(error.value.remedy)
    assert not (run / trackers.REPORTED).exists()
    assert read_run(run).results.name == "synthetic"


def test_own_code_needs_permission(tmp_path: Path, own: str) -> None:
    """A user's tracker is code that is run: it needs --allow-plugins."""
    with pytest.raises(ConfigError, match="your own code"):
        trackers.check_trackers([own])
    assert TOLD == []


def test_an_unknown_tracker_is_named() -> None:
    """With what there is."""
    with pytest.raises(ConfigError, match="no tracker named 'wandbb'; did you mean 'wandb'") as error:
        trackers.check_trackers(["wandbb"])
    assert "mlflow" in str(error.value.remedy)


@pytest.mark.parametrize("name", ["mlflow", "wandb", "trackio"])
def test_missing_library_is_reported_before_the_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, with the command to give."""
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=f"{name} is not installed") as error:
        trackers.check_trackers([name])
    assert error.value.remedy == f"pip install 'backmerge[{name}]'"
