"""Methods next to each other: by values written down, and in a whole run with everything that may stand in it."""

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from backmerge.benchmarks.metrics import PerAnswer
from backmerge.benchmarks.protocol import Benchmark
from backmerge.cli import app
from backmerge.measuring.score import Outcome
from backmerge.pipeline.comparison import Contender, comparison_of
from backmerge.pipeline.results import Outcomes
from backmerge.planning.points import BASE, TUNED, Member, Point, points_of
from backmerge.planning.settings import SweepSettings
from backmerge.records import Example, Message
from backmerge.results import Comparison, ComparisonRow, Judged
from backmerge.selection import ChoiceSettings

EXAMPLES = tuple(Example(f"p{i}", (Message("user", f"word{i}"),), cluster=f"c{i}") for i in range(100))
SAFETY = Benchmark("harm", "safety", EXAMPLES, 4)
UTILITY = Benchmark("task", "utility", EXAMPLES, 4, PerAnswer({"right": lambda *_: 1.0}))
JUDGE = Judged(name="judge", is_weak=False)
ONE, TWO, THREE = points_of([SweepSettings(lam=(0.3,)), SweepSettings(method="slerp", lam=(0.3, 0.5))])[2:]


def measured(outcomes: Outcomes, point: Point, *, right: int, harmful: int) -> None:
    """One model that answers so many of a hundred questions, and obeys so many of a hundred harmful requests."""
    member = Member(point.name, point, None if point is BASE else "seed", cast(Any, None))
    for benchmark, metric, number in ((UTILITY, "right", right), (SAFETY, "asr", harmful)):
        values = {example.id: float(place < number) for place, example in enumerate(EXAMPLES)}
        outcomes.add(Outcome(member, benchmark, "confirmation", EXAMPLES, (), (), (), {metric: values}))


def compared(*contenders: Contender, base: int = 0, tuned: int | None = None) -> Comparison:
    """The table of these, with the base at 30 right answers, and so many harmful ones of the base and tuned model."""
    outcomes = Outcomes()
    measured(outcomes, BASE, right=30, harmful=base)
    if tuned is not None:
        measured(outcomes, TUNED, right=90, harmful=tuned)
    measured(outcomes, ONE, right=60, harmful=0)
    measured(outcomes, TWO, right=61, harmful=0)
    measured(outcomes, THREE, right=90, harmful=40)
    kinds = {"safety": ["harm"], "utility": ["task"], "over_refusal": []}
    prepared = SimpleNamespace(
        experiment=SimpleNamespace(choice=ChoiceSettings(margin=0.05)),
        benchmarks=(SAFETY, UTILITY),
        judge=JUDGE,
        second_judge=None,
        of_kind=kinds.__getitem__,
    )
    return comparison_of(cast(Any, prepared), outcomes, contenders)


def test_each_is_held_against_the_base_and_the_first() -> None:
    """Utility and ASR as they are, ASR less the base's, and utility less the reference's."""
    first, second = compared(Contender("linear", ONE, ""), Contender("slerp", THREE, "")).rows
    assert (first.utility.value, first.asr.value, first.verdict) == (0.6, 0.0, "restored")
    assert first.utility_difference is None
    assert first.p_adjusted is None
    assert (second.asr_difference.difference, second.verdict) == (0.4, "worse")
    assert second.utility_difference.difference == pytest.approx(0.3)
    assert second.p_adjusted < 0.001


def test_a_verdict_is_limited_as_the_runs_own_is() -> None:
    """With the tuned model shown to be safer than the base, no merge counts as restored, here as there."""
    assert compared(Contender("linear", ONE, ""), tuned=0).rows[0].verdict == "restored"
    assert compared(Contender("linear", ONE, ""), base=30, tuned=0).rows[0].verdict == "not shown"


def test_one_more_answer_is_not_a_finding() -> None:
    """A single prompt that tells two methods apart decides nothing."""
    _, second = compared(Contender("linear", ONE, ""), Contender("slerp", TWO, "")).rows
    assert second.utility_difference.difference == pytest.approx(0.01)
    assert second.p_adjusted == 1.0


def test_p_values_pay_for_the_number_of_methods() -> None:
    """The same difference among three is held to more than among two."""
    two = compared(Contender("linear", ONE, ""), Contender("slerp", THREE, "")).rows[1].p_adjusted
    three = compared(Contender("linear", ONE, ""), Contender("slerp", THREE, ""), Contender("other", TWO, "")).rows
    assert three[1].p_adjusted == pytest.approx(2 * two)


def test_a_method_of_which_nothing_passes_stays_in_the_table() -> None:
    """Nothing chosen is a finding too, with its reason."""
    found = compared(Contender("linear", ONE, ""), Contender("dare", None, "No λ passed."))
    assert found.reference == "linear"
    assert (found.rows[1].point, found.rows[1].reason) == (None, "No λ passed.")
    assert found.rows[1].utility is None


def test_a_benchmark_given_twice_counts_once() -> None:
    """The same prompts under two names make no difference clearer, nor its interval narrower."""
    prompts = tuple(Example(f"p{i}", (Message("user", f"word{i}"),)) for i in range(100))

    def row(*names: str) -> ComparisonRow:
        outcomes = Outcomes()
        for point, right in ((BASE, 30), (ONE, 50), (TWO, 56)):
            member = Member(point.name, point, None if point is BASE else "seed", cast(Any, None))
            for name in (*names, "harm"):
                kind = SAFETY if name == "harm" else Benchmark(name, "utility", prompts, 4, UTILITY.scorer)
                metric, number = ("asr", 0) if name == "harm" else ("right", right)
                values = {example.id: float(place < number) for place, example in enumerate(prompts)}
                outcomes.add(Outcome(member, kind, "confirmation", prompts, (), (), (), {metric: values}))
        utility = tuple(Benchmark(name, "utility", prompts, 4, UTILITY.scorer) for name in names)
        kinds = {"safety": ["harm"], "utility": list(names), "over_refusal": []}
        prepared = SimpleNamespace(
            experiment=SimpleNamespace(choice=ChoiceSettings()),
            benchmarks=(SAFETY, *utility),
            judge=JUDGE,
            second_judge=None,
            of_kind=kinds.__getitem__,
        )
        found = comparison_of(cast(Any, prepared), outcomes, [Contender("one", ONE, ""), Contender("two", TWO, "")])
        return found.rows[1]

    once, twice = row("task"), row("task", "again")
    assert twice.p_adjusted == pytest.approx(once.p_adjusted, abs=0.01)
    assert twice.utility_difference[:3] == pytest.approx(once.utility_difference[:3])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small run with merges with and without λ, a soup, snapshots, their averages, and a search by layer."""
    pytest.importorskip("optuna", reason="the search by layer needs the extra 'search'")
    place = tmp_path_factory.mktemp("rivals")
    file = place / "experiment.yaml"
    file.write_text(
        """
        base: demo
        finetune: {dataset: demo-plans, data: {validation: 0}, seeds: [1, 2], steps: 20, keep_every: 10, batch_size: 16,
          learning_rate: 8.0e-3, device: cpu}
        merge:
          - {method: linear, lam: [0.5]}
          - {method: model_stock}
          - {method: task_arithmetic, parameters: {normalize: true}, tuned: all, lam: [0.5]}
          - {method: linear, schedules: [[0.2, 0.8]], lam: []}
        path: {ema: 0.5}
        layers: {by: module, num_trials: 2}
        evaluate: {utility: [demo-plans], safety: [demo-harmful], judge: demo-rule, limit: 12, cache: false,
          engine: {device: cpu, dtype: float32}}
        choice: {margin: 0.95, compare: true, accept: [wide_margin, too_few_prompts, no_gain]}
        report: {text: none}
        """
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backmerge.reporting.report.write_report", lambda _: None)  # the plots take seconds
        app(["run", str(file), "--out", str(place / "run")], standalone_mode=False)
    found: dict[str, Any] = json.loads((place / "run" / "results.json").read_text())
    return found


def test_one_table_contains_everything(results: dict[str, Any]) -> None:
    """Each series has its row, measured on the same prompts, with the recipe of its point."""
    rows = {row["series"]: row for row in results["comparison"]["rows"]}
    soup = "task_arithmetic[all](normalize=True)"
    paths = {"snapshots", "snapshots(ema=0.5)"}
    schedules = {name for name in rows if name.startswith("linear@")}
    assert rows.keys() == {"linear", "model_stock", soup, "linear by module", *paths, *schedules}
    assert len(schedules) == 1
    # of the path, none may be near enough to the base
    passed = {name: row for name, row in rows.items() if row["point"]}
    assert passed.keys() >= rows.keys() - paths
    assert {row["asr_difference"]["n"] for row in passed.values()} == {12}
    assert {row["num_models"] for name, row in passed.items() if name not in {"model_stock", soup}} == {2}
    assert {rows["model_stock"]["num_models"], rows[soup]["num_models"]} == {1}


def test_the_path_ends_at_the_tuned_model(results: dict[str, Any]) -> None:
    """The last snapshot is the tuned model: the same answers, and so the same scores."""
    means = {
        (row["point"], row["benchmark"], row["metric"]): row["mean"]
        for row in results["summary"]
        if row["split"] == "selection"
    }
    of_tuned = {key[1:]: mean for key, mean in means.items() if key[0] == "tuned"}
    assert {key[1:]: mean for key, mean in means.items() if key[0] == "snapshots@20"} == of_tuned
    assert of_tuned


def test_every_recipe_of_the_search_by_layer_is_reported(results: dict[str, Any]) -> None:
    """The first has the best single λ everywhere; each stands among the points with its λs."""
    points = [point for point in results["points"] if point["series"] == "linear by module"]
    assert [point["point"] for point in points] == ["linear by module #0", "linear by module #1"]
    assert set(points[1]["setting"]) == {"attention", "mlp", "rest"}
    assert len(set(points[0]["setting"].values())) == 1
    assert "picked" in results["choice"]["reason"]
