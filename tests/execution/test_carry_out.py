"""What holds for every executor: the same results, errors and steps."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge.errors import BackmergeError, GenerationError
from backmerge.execution import ExecutionSettings, Work, executor_of
from backmerge.execution.work import ProgressAggregator, WorkerError, as_plain, from_plain
from execution import units

KINDS = sorted([BackmergeError, *BackmergeError.__subclasses__()], key=lambda kind: kind.__name__)
RAY = pytest.param("ray", marks=pytest.mark.ray)
EXECUTORS = ["in-process", "pool", RAY]
Carry = Callable[..., list[Any]]


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> str:
    """Each executor."""
    if request.param == "ray":
        request.getfixturevalue("local_ray")
    return str(request.param)


@pytest.fixture
def carry(executor: str, tmp_path: Path) -> Carry:
    """`carry(function, works, ...)` with the executor in turn, on two workers."""
    settings = ExecutionSettings(executor=executor, num_workers=2, num_gpus=0)

    def run(function: Any, works: list[Work], **keywords: Any) -> list[Any]:
        given: dict[str, Any] = {"advance": lambda *_: None, "on_done": lambda *_: None}
        with executor_of(function, settings, shared=tmp_path) as opened:
            return opened.carry_out(works, **(given | keywords))

    return run


def squares(directory: Path, number: int = 5) -> list[Work]:
    """Units whose keys are not in their order."""
    return [Work(f"key-{9 - x}", {"x": x, "directory": str(directory), "pair": (1, 2.5)}) for x in range(number)]


def test_results_steps_and_files_are_the_same(carry: Carry, tmp_path: Path) -> None:
    """Every executor gives the results in order, tells all steps once, and leaves the same files."""
    told: list[int] = []
    done: dict[str, Any] = {}
    works = squares(tmp_path)
    results = carry(
        units.square,
        works,
        advance=lambda steps, *_: told.append(steps),
        on_done=lambda work, result: done.__setitem__(work.key, result),
    )
    specs = [{"x": x, "directory": str(tmp_path), "pair": [1, 2.5]} for x in range(5)]
    assert results == [{"square": x * x, "spec": specs[x]} for x in range(5)]
    assert done == {work.key: result for work, result in zip(works, results, strict=True)}
    assert sum(told) == 15
    assert {file.name: file.read_text() for file in tmp_path.glob("*.txt")} == {
        f"{x}.txt": f"{x * x}\n" for x in range(5)
    }


def test_the_same_unit_twice_at_once_does_no_harm(carry: Carry, tmp_path: Path) -> None:
    """Two workers that do one unit leave one whole file."""
    spec = {"x": 3, "directory": str(tmp_path)}
    first, second = carry(units.square, [Work("a", spec), Work("b", spec)])
    assert first == second
    assert [file.name for file in tmp_path.glob("3.txt*")] == ["3.txt"]


def test_no_units_give_no_results(carry: Carry) -> None:
    """Nothing is started for nothing."""
    assert carry("execution.nowhere:missing", []) == []


def test_an_error_of_ours_comes_back_as_it_was(carry: Carry, executor: str) -> None:
    """Kind, message, remedy and what else it holds; a unit next to it, which takes a minute, is stopped."""
    beside = [] if executor == "in-process" else [Work("b", {})]
    with pytest.raises(GenerationError) as caught:
        carry(units.fail, [Work("a", {"how": "ours"}), *beside])
    assert type(caught.value) is GenerationError
    assert (caught.value.message, caught.value.remedy, caught.value.example) == ("no answer", "ask again", "17")
    assert caught.value.exit_code == 2


def test_a_full_disk_keeps_its_number(carry: Carry) -> None:
    """The command line knows by it what to say."""
    with pytest.raises(OSError, match=r"units/x\.jsonl") as caught:
        carry(units.fail, [Work("a", {"how": "disk"})])
    assert caught.value.errno == 28


def test_a_fault_is_an_error_with_its_traceback(carry: Carry, executor: str) -> None:
    """What is not an error of ours is not dressed up as one, and the line that failed is shown."""
    kind = ZeroDivisionError if executor == "in-process" else WorkerError
    with pytest.raises(kind, match="λ by nothing") as caught:
        carry(units.fail, [Work("unit-7", {"how": "fault"})])
    assert not isinstance(caught.value, BackmergeError)
    if executor != "in-process":
        assert "unit-7" in str(caught.value)
        assert "units.py" in str(caught.value)


def test_a_result_must_be_plain(carry: Carry, executor: str) -> None:
    """What one executor could not bring back, none takes."""
    with pytest.raises(TypeError if executor == "in-process" else WorkerError, match="not JSON serializable"):
        carry(units.no_plain_data, [Work("a", {})])


def test_a_spec_must_be_plain(carry: Carry) -> None:
    """What one executor could not send, none takes."""
    with pytest.raises(TypeError, match="not JSON serializable"):
        carry(units.square, [Work("a", {"x": object()})])


@pytest.mark.parametrize(
    "function",
    [lambda *_: None, "__main__:square", ProgressAggregator.reached, "execution.units"],
    ids=["lambda", "main", "method", "module"],
)
def test_a_function_that_no_other_process_finds_is_refused(carry: Carry, function: Any) -> None:
    """Lambdas, methods and what stands in the main program."""
    with pytest.raises(ValueError, match="no other process can find it"):
        carry(function, [Work("a", {})])


def test_two_units_of_one_key_are_refused(carry: Carry) -> None:
    """A message that names one must mean one."""
    with pytest.raises(ValueError, match="two units have the key a"):
        carry(units.square, [Work("a", {}), Work("b", {}), Work("a", {})])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_error_survives_both_ways(kind: type[BackmergeError]) -> None:
    """As plain data, and pickled, as other libraries send them."""
    for error in (kind("kite"), kind("kite", remedy="tape")):
        for back in (from_plain(as_plain(error), "a"), pickle.loads(pickle.dumps(error))):  # noqa: S301  # our own
            assert type(back) is kind
            assert vars(back) == vars(error)
            assert str(back) == str(error)
            assert back.exit_code == error.exit_code


def test_a_users_own_error_comes_back_as_the_nearest_of_ours() -> None:
    """Its arguments are unknown to us; what it says is kept."""
    back = from_plain(as_plain(units.OwnError(3)), "a")
    assert type(back) is GenerationError
    assert (back.message, back.remedy, back.example) == ("kite 3", "tape", "7")


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9)), max_size=30))
def test_steps_are_reported_once_however_often_a_unit_starts(reached: list[tuple[str, int]]) -> None:
    """The bar stands at the sum of the furthest steps, and never goes back."""
    told: list[int] = []
    counting = ProgressAggregator(lambda steps, *_: told.append(steps))
    for key, steps in reached:
        counting.reached(key, steps)
    assert all(steps > 0 for steps in told)
    assert sum(told) == sum(max((s for k, s in reached if k == key), default=0) for key in "ab")


@pytest.mark.parametrize("num_gpus", [1.5, 2.25])
def test_a_unit_takes_a_part_of_one_gpu_or_whole_ones(num_gpus: float) -> None:
    """One and a half cannot be had."""
    with pytest.raises(ValueError, match="a whole number"):
        ExecutionSettings(num_gpus=num_gpus)
