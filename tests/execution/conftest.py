"""A local Ray, started once for each file of tests that ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# of the tests' own clusters: without it Ray would make one, and keep it in the user's home
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}


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
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}},
    )
    yield ray
    ray.shutdown()
