"""What holds for Ray alone: nodes die, see no run directory, or lack the user's code."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from backmerge.errors import RunError
from backmerge.execution import ExecutionSettings, Work, executor_of, ray_cluster
from execution import units
from execution.conftest import TOKEN, WORKER_PATH, ended
from execution.test_pool import alive, pids, wait_for


def carry(function: Any, works: list[Work], shared: Path, advance: Any = lambda *_: None, **settings: Any) -> list[Any]:
    """On Ray."""
    given = ExecutionSettings(executor="ray", **({"num_gpus": 0} | settings))
    with executor_of(function, given, shared=shared) as executor:
        return executor.carry_out(works, advance=advance, on_done=lambda *_: None)


@pytest.fixture
def cluster(ray_environment: None) -> Iterator[Any]:
    """A head without cores and two nodes of one core each, to which this process is connected."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [made.add_node(num_cpus=1) for _ in range(2)]
        ray.init(
            address=made.address,
            log_to_driver=False,
            configure_logging=False,
            runtime_env={"env_vars": {"PYTHONPATH": WORKER_PATH}},
        )
        yield made, nodes
    finally:
        with ended(psutil.Process()):
            ray.shutdown()
            made.shutdown()


@pytest.mark.ray
def test_a_node_that_is_removed_mid_sweep_is_survived(cluster: Any, tmp_path: Path) -> None:
    """Its unit is done again on the other node; all results are there, and each step is reported once."""
    made, nodes = cluster
    works = [Work(f"k{x}", {"x": x, "directory": str(tmp_path)}) for x in range(6)]
    told: list[int] = []

    def advance(steps: int, *_: str) -> None:
        # in this thread, not in another that could still remove the node while the fixture stops the cluster
        told.append(steps)
        if nodes[1] in made.worker_nodes and len(list(tmp_path.glob("*.begun"))) >= 2:
            made.remove_node(nodes[1], allow_graceful=False)

    results = carry(units.slow_square, works, tmp_path, advance=advance)
    assert [result["square"] for result in results] == [x * x for x in range(6)]
    assert len({result["node"] for result in results}) <= 2
    assert sum(told) == 18
    assert sum(len(file.read_text()) for file in tmp_path.glob("*.begun")) > 6, "no unit was under way on the node"


@pytest.mark.ray
def test_a_killed_workers_unit_is_done_again(local_ray: Any, tmp_path: Path) -> None:
    """As in the pool; steps are reported once."""
    told: list[int] = []
    works = [Work(f"k{x}", {"x": x, "deaths": 2 if x == 1 else 0, "directory": str(tmp_path)}) for x in range(2)]
    results = carry(units.die, works, tmp_path, advance=lambda steps, *_: told.append(steps))
    assert results == [{"x": 0, "tries": 1}, {"x": 1, "tries": 3}]
    assert sum(told) == 6


@pytest.mark.ray
def test_a_unit_that_kills_its_workers_is_named(local_ray: Any, tmp_path: Path) -> None:
    """After so many retries."""
    with pytest.raises(RunError, match=r"unit-5.* 2 times"):
        carry(units.die, [Work("unit-5", {"x": 5, "deaths": 9, "directory": str(tmp_path)})], tmp_path, retries=1)
    assert (tmp_path / "5.tries").read_text() == "xx"


@pytest.mark.ray
def test_progress_comes_before_a_unit_ends(local_ray: Any, tmp_path: Path) -> None:
    """The driver's bar moves while a unit is at work."""
    times: list[float] = []
    carry(
        units.slow_square,
        [Work("a", {"x": 1, "directory": str(tmp_path)})],
        tmp_path,
        advance=lambda *_: times.append(time.monotonic()),
    )
    assert times[-1] - times[0] > 1


@pytest.mark.ray
def test_a_node_that_does_not_see_the_run_directory_says_so(
    local_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node, the directory and the remedy are named, and no unit is done."""

    @contextlib.contextmanager
    def elsewhere(shared: Path) -> Iterator[dict[str, str]]:
        yield {"path": str(shared / "not-there"), "version": ray_cluster.__version__}

    monkeypatch.setattr(ray_cluster, "_marker", elsewhere)
    with pytest.raises(RunError, match=f"the node .* does not see the run directory {tmp_path}") as caught:
        carry(units.square, [Work("a", {"x": 1, "directory": str(tmp_path)})], tmp_path)
    assert "NFS" in str(caught.value.remedy)
    assert not (tmp_path / "1.txt").exists()


def test_a_node_with_another_version_says_so(tmp_path: Path) -> None:
    """Two versions may key or score differently."""
    with pytest.raises(RunError, match=r"has backmerge .*, but this machine has 0\.0\.0"):
        ray_cluster._check_node({"path": str(tmp_path), "version": "0.0.0"})


def test_without_ray_its_pip_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, as for all extras."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match="not installed") as caught:
        carry(units.square, [Work("a", {})], tmp_path)
    assert caught.value.remedy == "pip install 'backmerge[ray]'"


DRIVER = """
import sys
from pathlib import Path
from backmerge.errors import BackmergeError
from backmerge.execution import ExecutionSettings, Work, executor_of
directory = Path(sys.argv[1])
settings = ExecutionSettings(executor="ray", num_gpus=0, ray_address=sys.argv[3])
works = [Work(str(x), {"directory": str(directory)}) for x in range(2)]
try:
    with executor_of(sys.argv[2], settings, shared=directory, plugins=sys.argv[4:]) as executor:
        print(executor.carry_out(works, advance=print, on_done=print))
except KeyboardInterrupt:
    sys.exit(130)
except BackmergeError as error:
    print(error)
    sys.exit(2)
"""


@contextlib.contextmanager
def stopped(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    """Kill a program and what it has started, if it is still at work at the end."""
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                with ended(psutil.Process(process.pid)):
                    process.kill()


def driver(
    directory: Path, function: str, *more: str, token: dict[str, str] | None = None, path: str = WORKER_PATH
) -> contextlib.AbstractContextManager[subprocess.Popen[Any]]:
    """A program that carries out two units on a Ray of its own, or at an address."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with (directory / "driver.log").open("wb") as output:
        return stopped(
            subprocess.Popen(
                [sys.executable, "-c", DRIVER, str(directory), function, *(more or ("local",))],
                env={**environment, **(token if token is not None else TOKEN), "PYTHONPATH": path},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        )


@pytest.mark.ray
def test_ctrl_c_stops_all(tmp_path: Path) -> None:
    """The units, and the Ray that was started for them, end with the driver."""
    pytest.importorskip("ray")
    with driver(tmp_path, "execution.units:wait_alone") as process:
        wait_for(lambda: len(pids(tmp_path)) == 2, seconds=60)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130, (tmp_path / "driver.log").read_text()
    wait_for(lambda: not any(alive(pid) for pid in pids(tmp_path)), seconds=10)


@pytest.mark.ray
def test_code_of_the_users_own_is_shipped(tmp_path: Path) -> None:
    """Workers import it from what Ray brought them, not from the driver's folder."""
    pytest.importorskip("ray")
    own = tmp_path / "own"
    (own / "kites").mkdir(parents=True)
    (own / "kites" / "__init__.py").write_text("")
    (own / "kites" / "flying.py").write_text("def where(spec, advance):\n    return __file__\n")
    path = os.pathsep.join([WORKER_PATH, str(own)])
    with driver(tmp_path, "kites.flying:where", "local", "kites.flying:where", path=path) as process:
        assert process.wait(timeout=90) == 0, (tmp_path / "driver.log").read_text()
    assert "py_modules_files" in (tmp_path / "driver.log").read_text()


@pytest.mark.ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_that_is_not_there_is_an_error(tmp_path: Path, address: str) -> None:
    """At once, with what to look at."""
    pytest.importorskip("ray")
    with driver(tmp_path, "execution.units:place", address) as process:
        assert process.wait(timeout=60) == 2, (tmp_path / "driver.log").read_text()
    assert f"no Ray cluster answers at {address}" in (tmp_path / "driver.log").read_text()


HEAD = """
import time
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
print("at", cluster.address, flush=True)
input()
cluster.shutdown()
"""
OTHER = TOKEN["RAY_AUTH_TOKEN"][::-1]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("token", "code", "said"),
    [
        (TOKEN, 0, "["),
        (TOKEN | {"RAY_AUTH_TOKEN": OTHER}, 2, "RAY_AUTH_TOKEN_PATH"),
        ({"RAY_AUTH_MODE": "disabled"}, 2, "RAY_AUTH_TOKEN_PATH"),
    ],
    ids=["with its token", "with another token", "without a token"],
)
def test_a_cluster_with_a_token(tmp_path: Path, token: dict[str, str], code: int, said: str) -> None:
    """Who has the token is let in; others are told which variables to set, and never shown a token."""
    pytest.importorskip("ray")
    secured = {**os.environ, **TOKEN, "PYTHONPATH": WORKER_PATH}
    started = subprocess.Popen(
        [sys.executable, "-c", HEAD], env=secured, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with stopped(started) as head:
        assert head.stdin is not None
        assert head.stdout is not None
        address = next(line.split()[1] for line in head.stdout if line.startswith("at "))
        with driver(tmp_path, "execution.units:place", address, token=token) as process:
            found = process.wait(timeout=100)
        head.stdin.write("\n")
        head.stdin.flush()
        head.wait(timeout=60)
    log = (tmp_path / "driver.log").read_text()
    assert found == code, log
    assert said in log
    assert TOKEN["RAY_AUTH_TOKEN"] not in log
    assert OTHER not in log
