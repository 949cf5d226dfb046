"""Another judge over the answers of a finished run: a new verdict, and nothing generated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest

from backmerge.cli import app
from backmerge.errors import RunError
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.judging.protocol import JudgeSettings
from backmerge.pipeline.rescoring import judge_again
from backmerge.pipeline.stages import run_experiment
from backmerge.planning.settings import Experiment
from backmerge.records import Completion, Example, Verdict
from backmerge.registry import JUDGES, NOTHING_ALLOWED, Permissions
from backmerge.results import EvaluateResults, RestoreResults

from .test_earlier_results import HarmlessJudge, experiment
from .test_situations import GOOD, restored

__all__ = ["experiment", "restored"]  # fixtures


class SomeHarmful(HarmlessJudge):
    """Calls some texts harmful."""

    name = identity = "some-harmful"
    harmful: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per completion."""
        assert len(examples) == len(completions)
        return [
            Verdict(c.example, harmful=c.text in self.harmful, refusal=c.text not in self.harmful, sample=c.sample)
            for c in completions
        ]


@pytest.fixture
def other_judge(monkeypatch: pytest.MonkeyPatch) -> JudgeSettings:
    """A judge to whom nothing is harmful, until a test says what is."""
    monkeypatch.setitem(cast("dict[str, str]", JUDGES.entries), "some-harmful", f"{__name__}:SomeHarmful")
    monkeypatch.setattr(SomeHarmful, "harmful", frozenset())
    return JudgeSettings(name="some-harmful")


def records(run: Path, view: str) -> list[dict[str, Any]]:
    """The lines of a view of a run's records."""
    return [json.loads(line) for line in (run / "records" / f"{view}.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("without_report")
def test_another_judge_gives_another_verdict_without_generating(
    experiment: Experiment, other_judge: JudgeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The difference on the merge that was confirmed is the one that this judge sees; κ is over all models together."""
    finished = run_experiment(experiment, tmp_path / "run")
    chosen = finished.results.choice.point
    answers = [row for row in records(tmp_path / "run", "completions") if row["kind"] == "safety"]
    of_merge = [row for row in answers if row["model"].startswith(f"{chosen}/")]
    harmful = {row["text"] for row in of_merge} - {row["text"] for row in answers if row["model"] == "base"}
    monkeypatch.setattr(SomeHarmful, "harmful", frozenset(harmful))
    confirmed = [row["text"] in harmful for row in of_merge if row["split"] == "confirmation"]
    monkeypatch.setattr(TransformersEngine, "generate", None)
    results = judge_again(
        tmp_path / "run", other_judge, tmp_path / "again", max_unscored=0.02, permissions=NOTHING_ALLOWED
    ).plain()
    decision = results["decision"]
    assert (decision["point"], decision["earlier_verdict"]) == (chosen, "restored")
    assert any(confirmed)
    assert decision["asr_difference"]["difference"] == pytest.approx(sum(confirmed) / len(confirmed))
    assert {row["point"] for row in decision["candidates"]} == {"tuned", "linear@0.5"}
    assert [(row["benchmark"], row["split"]) for row in results["agreement"]] == [
        ("safety", "selection"),
        ("safety", "confirmation"),
    ]
    assert sum(row["n"] for row in results["agreement"]) == len(answers)


@pytest.mark.usefixtures("without_report")
def test_another_judge_in_the_same_directory_generates_nothing(
    experiment: Experiment, other_judge: JudgeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run again with another judge takes its answers, and keeps the first verdict in `earlier/1`."""
    run_experiment(experiment, tmp_path / "run")
    monkeypatch.setattr(TransformersEngine, "generate", None)
    evaluate = experiment.evaluate.model_copy(update={"judge": other_judge})
    again = run_experiment(experiment.model_copy(update={"evaluate": evaluate}), tmp_path / "run")
    assert again.verdict == "restored"
    kept = json.loads((tmp_path / "run" / "earlier" / "1" / "results.json").read_text())
    judges = [[row["judge"] for row in results["benchmarks"]] for results in (kept, again.results.plain())]
    assert judges == [[None, "harmless"], [None, "some-harmful"]]


@pytest.mark.usefixtures("without_report")
def test_utility_scores_of_each_answer_are_in_the_records(experiment: Experiment, tmp_path: Path) -> None:
    """Each model's mean over `records/values.jsonl` is its score in the results."""
    results = run_experiment(experiment, tmp_path / "run").results.plain()
    rows = records(tmp_path / "run", "values")
    scores = [score for score in results["scores"] if score["benchmark"] == "utility"]
    assert scores
    for score in scores:
        place = (score["model"], score["split"])
        found = [row["values"][score["metric"]] for row in rows if (row["model"], row["split"]) == place]
        assert len(found) == score["n"]
        assert sum(found) / len(found) == pytest.approx(score["value"])


def finished(arguments: Sequence[str], place: Path) -> RestoreResults:
    """The results of a command, without its report, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backmerge.reporting.report.write_report", lambda _: None)
        patch.setattr("backmerge.reporting.run_tables.write_tables", lambda _: None)
        app([*(one for one in arguments if one != "--strict"), "--out", str(place)], standalone_mode=False)
    return RestoreResults.read(place)


def again(earlier: Path, place: Path) -> EvaluateResults:
    """The same judge over a finished run's answers."""
    judge = JudgeSettings(name="refusal-phrases")
    return judge_again(earlier, judge, place, max_unscored=0.02, permissions=Permissions(plugins=True))


@pytest.fixture(scope="module")
def raced(restored: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished race over two series, whose λ=1 is one and the same model; λ=0.5 is dropped as harmful."""
    place = tmp_path_factory.mktemp("raced") / "run"
    finished(restored({**GOOD, "far": (40, 80)}, "--method", "linear,slerp", "--lam", "0.25,0.5"), place)
    return place


def test_a_race_of_two_series_keeps_base_and_tuned_model(raced: Path) -> None:
    """λ=1 is measured in every series, and is complete in the results once."""
    results = RestoreResults.read(raced)
    assert {"base", "tuned"} <= {row.point for row in results.points}
    sizes = {row.name: row.sizes.selection for row in results.benchmarks}
    for point in ("base", "tuned"):
        found = {r.benchmark: r.n for r in results.summary if (r.point, r.split) == (point, "selection")}
        assert found == sizes


def test_model_without_a_point_is_not_counted_as_a_base(raced: Path, tmp_path: Path) -> None:
    """Results that lack a point, as earlier versions wrote them, are refused: its answers are not the base's."""
    earlier = tmp_path / "earlier"
    shutil.copytree(raced, earlier)
    (earlier / "digests.json").unlink()  # they would find the change
    results = json.loads((earlier / "results.json").read_text())
    results["points"] = [row for row in results["points"] if row["point"] != "tuned"]
    (earlier / "results.json").write_text(json.dumps(results))
    with pytest.raises(RunError, match="which is not among the points"):
        again(earlier, tmp_path / "again")
    assert not (tmp_path / "again").exists()


KEEP = ("--keep", "{keep}", "--keep-margin")
RUNS: dict[str, tuple[dict[str, tuple[int, ...]], tuple[str, ...], str, set[str]]] = {
    "restored": (GOOD, (*KEEP, "0.1"), "restored", set()),
    "too few prompts": (GOOD, ("--limit", "29", "--margin", "0.29"), "not shown", {"too_few_prompts"}),
    "forgotten": ({**GOOD, "merged": (1, 80, 0, 60)}, (*KEEP, "0.1"), "not shown", {"not_kept"}),
    "gain lost": ({**GOOD, "merged": (1, 2)}, (), "not shown", {"gain_lost"}),
    "fails": ({**GOOD, "merged": (40, 80)}, (), "worse", set()),
    "two judges": (
        {**GOOD, "merged": (40, 80)},
        ("--set", "evaluate.second_judge=pipeline.test_earlier_results:HarmlessJudge"),
        "not shown",
        {"judges_disagree"},
    ),
    "target missed": (
        {**GOOD, "base": (10, 20), "merged": (10, 80)},
        ("--rule", "target", "--set", "choice.target=0.02", "--set", "choice.margin=0.1"),
        "not shown",
        set(),
    ),
}


def check_same(run: Path, place: Path) -> RestoreResults:
    """Check that the same judge comes to the run's own verdict, findings and choice; return the run's results."""
    results, decision = RestoreResults.read(run), again(run, place).decision
    assert decision is not None
    assert decision.verdict == decision.earlier_verdict == results.confirmation.verdict
    assert decision.findings == results.findings
    assert (decision.chosen_by_this_judge, decision.point) == (results.choice.point, results.choice.point)
    assert decision.asr_difference == results.confirmation.asr_difference
    return results


@pytest.mark.parametrize("name", RUNS)
def test_the_same_judge_comes_to_the_same_decision(
    name: str, restored: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Whatever limits the run's verdict and choice limits those of the judge, though only some of it needs a judge."""
    scripts, more, verdict, limits = RUNS[name]
    finished(restored(scripts, *more), tmp_path / "run")
    results = check_same(tmp_path / "run", tmp_path / "again")
    assert results.confirmation.verdict == verdict
    assert limits <= {finding.name for finding in results.findings}


def test_the_same_judge_comes_to_the_same_decision_over_a_race(raced: Path, tmp_path: Path) -> None:
    """λs that the race dropped have no complete answers: the choice is the run's, since no finding differs."""
    results = check_same(raced, tmp_path / "again")
    assert results.comparison is not None
    (row,) = (row for row in results.comparison.rows if row.point == results.choice.point)
    assert row.verdict == results.confirmation.verdict == "restored"
    assert results.confirmation.looks == len(results.comparison.rows) == 2


def test_another_judge_cannot_choose_among_what_a_race_dropped(
    raced: Path, other_judge: JudgeSettings, tmp_path: Path
) -> None:
    """The λs that the earlier judge found harmful were not fully measured; that is said, and no λ is named."""
    decision = judge_again(
        raced, other_judge, tmp_path / "again", max_unscored=0.02, permissions=Permissions(plugins=True)
    ).decision
    assert decision is not None
    assert decision.chosen_by_this_judge is None
    assert "cannot be said" in decision.reason
