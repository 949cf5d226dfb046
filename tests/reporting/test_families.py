"""Runs that differ only in seeds, taken together."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge.records import Estimate
from backmerge.reporting.families import (
    Family,
    at,
    cell_at,
    chosen,
    families_of,
    gap_to_base,
    lams_of,
    remarks,
    score_at,
    verdict_of,
)
from backmerge.reporting.finished_runs import Run, run_of
from backmerge.statistics import t_interval

from .several import HALF, VALUES, experiment_of, of_models, results_of
from .synthetic import typed

SHARE = st.floats(0.1, 0.9)


def run_with(name: str, *, seed: int = 1, settings: dict[str, Any] | None = None, **results: Any) -> Run:
    """A run of one tuned model with one seed."""
    values = results.pop("values", of_models(VALUES, 0))
    made = results_of(values, **{"tuned": (f"seed-{seed}",), **results})
    return run_of(name, typed(made), experiment_of((seed,), **(settings or {})))


@given(st.lists(SHARE, min_size=2, max_size=4))
def test_runs_of_one_seed_are_as_a_run_of_several(shares: list[float]) -> None:
    """Mean and standard deviation of k runs with a seed each are those of one run with k seeds."""
    values = {**VALUES, "tuned": {"task": shares, "advbench": shares, "hexphi": shares}}
    values = {
        point: {n: own if point in ("base", "tuned") else own[:1] * len(shares) for n, own in of.items()}
        for point, of in values.items()
    }
    names = [f"seed-{index}" for index in range(len(shares))]
    together = Family((run_of("all", typed(results_of(values, tuned=names)), experiment_of()),))
    apart = Family(tuple(run_with(name, seed=i, values=of_models(values, i)) for i, name in enumerate(names)))
    one, several = (cell_at(family, at("tuned"), "task", "accuracy") for family in (together, apart))
    assert one is not None
    assert several is not None
    assert several.value == pytest.approx(one.value)
    assert several.spread == pytest.approx(one.spread)
    assert several.num_models == one.num_models == len(shares)


def test_the_interval_covers_other_seeds_and_other_prompts() -> None:
    """It is the hull of Student's over models and of the runs' own ends, averaged."""
    far = Family((run_with("a", seed=1), run_with("b", seed=2, values=of_models(VALUES, 1))))
    cell = cell_at(far, at("tuned"), "task", "accuracy")
    assert cell is not None
    assert (cell.value, cell.low, cell.high) == (pytest.approx(0.85), *t_interval([0.8, 0.9]))
    same = Family((run_with("a", seed=1), run_with("b", seed=2)))
    cell = cell_at(same, at("tuned"), "task", "accuracy")
    # seeds that agree have no spread, and prompts still do
    assert cell is not None
    assert (cell.value, cell.low, cell.high) == (
        pytest.approx(0.8),
        pytest.approx(0.8 - HALF),
        pytest.approx(0.8 + HALF),
    )
    assert cell.spread == 0


def test_the_base_is_one_model_however_often_it_is_measured() -> None:
    """The same figure in every run is not a repetition."""
    family = Family((run_with("a", seed=1), run_with("b", seed=2)))
    cell = cell_at(family, at("base"), "task", "accuracy")
    assert cell == Estimate(0.2, 0.2 - HALF, 0.2 + HALF, 100)


def test_runs_weigh_by_their_models() -> None:
    """A run of two seeds counts twice as much as one of one."""
    two = run_of("two", typed(results_of()), experiment_of((1, 2)))
    one = run_with("one", seed=3, values=of_models(VALUES, 0), title="other")
    cell = cell_at(Family((two, one)), at("tuned"), "task", "accuracy")
    assert cell is not None
    assert cell.value == pytest.approx(fmean([0.8, 0.9, 0.8]))
    assert cell.spread == pytest.approx(stdev([0.8, 0.9, 0.8]))
    assert cell.num_models == 3


def test_what_one_run_lacks_is_not_averaged_over_the_others() -> None:
    """A mean of those that passed would be of the best."""
    family = Family((run_with("a", seed=1), run_with("b", seed=2, chosen=None)))
    assert cell_at(family, chosen, "task", "accuracy") is None
    assert score_at(family, chosen) is None
    assert gap_to_base(family) is None
    assert cell_at(family, at("tuned"), "task", "no such metric") is None


def test_several_utility_benchmarks_are_one_score() -> None:
    """Their mean, with the interval that their own intervals give it."""
    values = {
        point: {"task": [0.2], "other-task": [0.6], "advbench": [0.1]} for point in ("base", "linear@0.4", "tuned")
    }
    run = run_of("a", typed(results_of(values, tuned=("seed-1",))), experiment_of())
    score = score_at(Family((run,)), at("base"))
    assert score is not None
    assert (score.value, score.low, score.high, score.n) == (
        pytest.approx(0.4),
        pytest.approx(0.4 - HALF / 2**0.5),
        pytest.approx(0.4 + HALF / 2**0.5),
        0,
    )


def test_the_difference_to_the_base_is_over_models() -> None:
    """Of several runs the mean over their models' differences, wide enough for other seeds."""
    runs = run_with("a", seed=1), run_with("b", seed=2, values=of_models(VALUES, 1))
    gap = gap_to_base(Family(runs))
    assert gap is not None
    assert gap.value == pytest.approx(0.02)
    assert gap.spread == pytest.approx(stdev([0.01, 0.03]))
    assert (gap.low, gap.high) == pytest.approx(t_interval([0.01, 0.03], limits=(-1.0, 1.0)))
    alone = gap_to_base(Family(runs[:1]))
    assert alone is not None
    assert (alone.value, alone.low, alone.high, alone.n) == (
        pytest.approx(0.01),
        pytest.approx(0.0),
        pytest.approx(0.02),
        200,
    )


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        (run_with("b", seed=2, title="t"), True),
        (run_with("b", seed=2, title="t", settings={"report": {"text": "full"}, "name": "other"}), True),
        (run_with("b", seed=2, title="t", settings={"evaluate": {"limit": 5}}), False),
        (run_with("b", seed=2, title="t", settings={"dataset": "medical"}), False),
        (run_with("b", seed=2, title="t", base="someone/other"), False),
        # the same tuned model again is not a repetition
        (run_with("b", seed=1, title="t"), False),
    ],
    ids=["seed", "title and report", "settings", "data", "base", "same model"],
)
def test_only_seeds_may_differ(other: Run, is_same: bool) -> None:
    """Runs are taken together where settings, base and prompts are the same, and models are not."""
    families = families_of([run_with("a", seed=1, title="t"), other])
    assert [len(family.runs) for family in families] == ([2] if is_same else [1, 1])


def test_other_prompts_are_another_experiment() -> None:
    """The same benchmark's name over other prompts does not count as the same."""
    other = run_with("b", seed=2, title="t")
    changed = other.results.model_copy(update={"inputs": {"benchmarks": {"task": "others"}}})
    assert len(families_of([run_with("a", title="t"), run_of("b", changed, other.experiment)])) == 2


def test_models_from_elsewhere_are_repetitions_under_one_title() -> None:
    """Their tasks are not known: another title is another task."""
    elsewhere = {"dataset": None}
    runs = [run_with("a", seed=1, title="t", settings=elsewhere), run_with("b", seed=2, title="t", settings=elsewhere)]
    assert [len(family.runs) for family in families_of(runs)] == [2]
    runs[1] = run_with("b", seed=2, title="u", settings=elsewhere)
    assert [len(family.runs) for family in families_of(runs)] == [1, 1]


def test_order_is_that_of_the_runs() -> None:
    """Families stand where their first run stood."""
    runs = [
        run_with("a", seed=1, title="t"),
        run_with("b", seed=1, title="u", settings={"dataset": "medical"}),
        run_with("c", seed=2, title="v"),
    ]
    assert [family.name for family in families_of(runs)] == ["a, c", "b"]


def test_lams_and_verdicts_of_several() -> None:
    """One where all agree, all of them where they don't."""
    runs = run_with("a", seed=1), run_with("b", seed=2), run_with("c", seed=3, chosen="linear@0.6", verdict="worse")
    assert lams_of(Family(runs[:2]), chosen) == 0.4
    assert lams_of(Family(runs), chosen) == "0.4, 0.6"
    assert lams_of(Family((run_with("d", chosen="model_stock"),)), chosen) is None
    assert verdict_of(Family(runs[:2])) == "restored"
    assert verdict_of(Family(runs)) == "restored 2, worse 1"


def test_a_remark_of_all_runs_names_none() -> None:
    """Sentences are reported once, with their runs unless they are of all."""
    runs = [run_with("a"), run_with("b")]
    assert remarks(runs, lambda run: iter(["All.", *(["One."] if run.name == "b" else [])])) == ["All.", "b: One."]
