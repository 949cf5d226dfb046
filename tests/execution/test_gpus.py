"""Which GPUs each worker sees."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge.execution.pool import gpus_of, visible_gpus, workers_for


@pytest.mark.parametrize(
    ("listed", "gpus"),
    [
        ("0,1", ("0", "1")),
        ("3", ("3",)),
        (" 2 , GPU-1a2b ", ("2", "GPU-1a2b")),
        ("", ()),
        ("-1", ()),
        ("1,-1,2", ("1",)),
    ],
)
def test_gpus_are_named_as_cuda_names_them(listed: str, gpus: tuple[str, ...]) -> None:
    """Numbers and ids, up to the first that is invalid."""
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": listed}) == gpus


@pytest.mark.parametrize(
    ("num_gpus", "per_worker", "workers"),
    [(0, 1, 1), (1, 1, 1), (8, 1, 8), (8, 2, 4), (8, 3, 2), (2, 0.5, 4), (3, 1 / 3, 9), (4, 0, 1), (1, 2, 1)],
)
def test_as_many_workers_as_the_gpus_suffice_for(num_gpus: int, per_worker: float, workers: int) -> None:
    """One at least."""
    assert workers_for([str(n) for n in range(num_gpus)], per_worker) == workers


@pytest.mark.parametrize(
    ("per_worker", "expected"),
    [
        (1, ["0", "1", "2", "3", "0"]),
        (2, ["0,1", "2,3", "0,1", "2,3", "0,1"]),
        (3, ["0,1,2", "0,1,2", "0,1,2", "0,1,2", "0,1,2"]),
        (0.5, ["0", "0", "1", "1", "2"]),
        (0, ["", "", "", "", ""]),
        (8, ["0,1,2,3"] * 5),
    ],
)
def test_each_worker_has_its_own(per_worker: float, expected: list[str]) -> None:
    """Of four GPUs, for five workers."""
    gpus = ("0", "1", "2", "3")
    assert [",".join(gpus_of(worker, gpus, per_worker)) for worker in range(5)] == expected


@given(st.integers(1, 16), st.sampled_from([0.25, 0.5, 1, 2, 3, 4]))
def test_no_gpu_is_overbooked(num_gpus: int, per_worker: float) -> None:
    """The workers that the GPUs suffice for never ask more of one GPU than it has."""
    gpus = [str(n) for n in range(num_gpus)]
    load = dict.fromkeys(gpus, 0.0)
    if per_worker > num_gpus:
        return
    for worker in range(workers_for(gpus, per_worker)):
        for gpu in gpus_of(worker, gpus, per_worker):
            load[gpu] += min(per_worker, 1)
    assert max(load.values()) <= 1 + 1e-6
