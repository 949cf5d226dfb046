"""The points that are measured have names of their own, and none is there twice."""

from backmerge.pipeline.experiment import SweepSettings
from backmerge.pipeline.points import points_of


def test_what_is_asked_for_twice_is_measured_once() -> None:
    """A λ that two sweeps share is one point: two would pass for models of two seeds that agree."""
    points = points_of([SweepSettings(lam=(0.4, 0.2, 0.4)), SweepSettings(lam=(0.4, 0.6))])
    assert [point.name for point in points] == ["base", "tuned", "linear@0.2", "linear@0.4", "linear@0.6"]


def test_close_lams_have_names_of_their_own() -> None:
    """Two λs that agree in six digits stay two points, so that neither takes the other's figures."""
    points = points_of([SweepSettings(lam=(0.2, 0.20000001))])
    assert [point.name for point in points[2:]] == ["linear@0.2", "linear@0.20000001"]
    assert [point.lam for point in points[2:]] == [0.2, 0.20000001]
