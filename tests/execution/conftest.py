"""A local Ray, started once for each file of tests that ask for it; what tests start with Ray ends with them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import backmerge

# of the tests' own clusters: without it Ray would make one, and keep it in the user's home
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}
# Ray's workers get this instead of our own PYTHONPATH: backmerge need not be installed next to Ray
WORKER_PATH = os.pathsep.join(map(str, (Path(__file__).parents[1], Path(backmerge.__file__).parents[1])))
ENDS_WITHIN = 10  # seconds


@contextlib.contextmanager
def ended(root: psutil.Process) -> Iterator[None]:
    """Kill what `root` has started and the clean-up within leaves, also if that fails or takes too long."""
    started = root.children(recursive=True)
    try:
        yield
    finally:
        _, left = psutil.wait_procs(started, timeout=ENDS_WITHIN)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture(scope="session")
def ray_environment() -> Iterator[None]:
    """The tests' token, and nothing reported to others."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def local_ray(ray_environment: None) -> Iterator[Any]:
    """Two cores in a cluster of this process' own; workers find the tests' modules."""
    ray = pytest.importorskip("ray")
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"env_vars": {"PYTHONPATH": WORKER_PATH}},
    )
    yield ray
    with ended(psutil.Process()):
        ray.shutdown()
