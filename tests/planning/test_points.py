"""The points that are measured have names of their own, and none is there twice."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import ValidationError

from backmerge.errors import ConfigError
from backmerge.merging.recipe import Variant
from backmerge.planning.points import points_of
from backmerge.planning.settings import SweepSettings
from backmerge.runs import key_of


def test_what_is_asked_for_twice_is_measured_once() -> None:
    """A λ that two sweeps share is one point: two would pass for models of two seeds that agree."""
    points = points_of([SweepSettings(lam=(0.4, 0.2, 0.4)), SweepSettings(lam=(0.4, 0.6))])
    assert [point.name for point in points] == ["base", "tuned", "linear@0.2", "linear@0.4", "linear@0.6"]


def test_close_lams_have_names_of_their_own() -> None:
    """Two λs that agree in six digits stay two points, so that neither takes the other's figures."""
    points = points_of([SweepSettings(lam=(0.2, 0.20000001))])
    assert [point.name for point in points[2:]] == ["linear@0.2", "linear@0.20000001"]
    assert [point.lam for point in points[2:]] == [0.2, 0.20000001]


def test_a_method_without_lam_is_one_point() -> None:
    """Model Stock has no λ: one point, merged of all tuned models."""
    (point,) = points_of([SweepSettings(method="model_stock")])[2:]
    assert (point.name, point.series, point.lam, point.is_joint) == ("model_stock", "model_stock", None, True)


def test_a_soup_ends_at_its_own_lam_of_one() -> None:
    """All tuned models in one merge: at λ=1 stands their mean, which is none of them."""
    points = points_of([SweepSettings(method="task_arithmetic", tuned="all", lam=(0.5,))])[2:]
    assert [point.name for point in points] == ["task_arithmetic[all]@0.5", "task_arithmetic[all]@1"]
    assert all(point.is_joint for point in points)


def test_lams_by_tensor_are_separate_recipes() -> None:
    """Each schedule is a series by itself: there is no order in which λ would rise."""
    points = points_of([SweepSettings(schedules=([0.2, 0.8], {"attention": 0.3, "rest": 0.6}))])[2:]
    assert [point.setting for point in points] == [[0.2, 0.8], {"attention": 0.3, "rest": 0.6}]
    assert len({point.series for point in points}) == 2
    assert {point.lam for point in points} == {None}


def test_default_lams_are_the_papers() -> None:
    """Nothing asked for is the paper's grid; schedules alone ask for no more."""
    assert [point.lam for point in points_of([SweepSettings()])[2:]] == [0.2, 0.4, 0.6, 0.8]
    assert [point.lam for point in points_of([SweepSettings(lam=(0.5,), schedules=([0, 1],))])[2:]] == [0.5, None]


def test_the_same_method_with_one_model_or_all_has_two_names() -> None:
    """A soup of seeds does not pass for the repetitions of a merge."""
    each, joint = (
        points_of([SweepSettings(method="task_arithmetic", tuned=which, lam=(0.5,))])[2] for which in ("each", "all")
    )
    assert each.name != joint.name


def test_the_order_of_a_tables_rows_is_part_of_the_recipe() -> None:
    """The first pattern that matches decides: the same rows in another order are another model."""
    one = {"*.mlp.*": 0.1, "*layers.0.*": 0.9, "rest": 0.5}
    other = {"*layers.0.*": 0.9, "*.mlp.*": 0.1, "rest": 0.5}
    points = points_of([SweepSettings(schedules=(one, other))])[2:]
    assert len({point.name for point in points}) == 2
    base = cast("Any", SimpleNamespace(fingerprint="base", directory=Path(), companions=Path()))
    keys = {key_of(Variant(base, base, lam=table).identity) for table in (one, other, dict(one))}
    assert len(keys) == 2


def test_two_recipes_of_one_name_are_refused() -> None:
    """Two models whose folders have the same name would pass for one; the same recipe twice is one."""
    first, second = (
        SweepSettings(method="resta", lam=(0.5,), models={"unaligned": f"/{place}/pretrained"}) for place in "ab"
    )
    with pytest.raises(ConfigError, match="same name"):
        points_of([first, second])
    assert len(points_of([first, first])) == 3


def test_label_names_the_series_and_must_be_its_own() -> None:
    """A label replaces the name of the method; two recipes with one label are refused, two λs of one recipe are not."""
    sweeps = [SweepSettings(label="Half", lam=(0.5,)), SweepSettings(label="Half", lam=(0.2,))]
    assert [point.name for point in points_of(sweeps)][2:] == ["Half@0.5", "Half@0.2"]
    with pytest.raises(ConfigError, match="label 'Half'"):
        points_of([sweeps[0], SweepSettings(method="slerp", label="Half", lam=(0.5,))])
    with pytest.raises(ValidationError):
        SweepSettings(label="a@b")
