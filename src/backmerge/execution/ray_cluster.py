"""Run units as tasks of a Ray cluster; the only file that imports ray.

Ray places each unit where GPUs and cores are free. If a worker or node dies, we send its unit again, instead of Ray
with its `max_retries`: so messages name the unit, and a unit that runs out of memory is not repeated for ever.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import socket
import time
from collections import Counter as Deaths
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from backmerge import __version__
from backmerge.errors import RunError
from backmerge.execution.dispatch import ExecutionSettings, Executor
from backmerge.execution.work import (
    Counter,
    OnDone,
    ProgressAggregator,
    Work,
    as_plain,
    from_plain,
    function_of,
    plain_copy,
)

POLL = 0.5  # seconds between two updates of the progress
TELL_EVERY = 1.0  # seconds
CONNECTED_WITHIN = 10.0  # seconds
VISIBLE_WITHIN = 10.0  # seconds within which another machine must see a new file; NFS caches listings for a while


class RayCluster(Executor):
    """Does units as tasks of a cluster; the connection, and a local Ray that it started, are kept between calls.

    If the program has called `ray.init` already, that connection is used, and its code is not shipped.

    Args:
        function: See `Executor`.
        settings: The cluster, and the resources per unit.
        shared: A directory that all nodes see.
        plugins: The user's own code, as `module:function`.
    """

    def __init__(self, function: str, settings: ExecutionSettings, shared: Path, plugins: Sequence[str]) -> None:
        super().__init__(function, settings, shared)
        self._plugins = plugins
        self._held = contextlib.ExitStack()
        self._ray: Any = None

    def _carry_out(self, works: Sequence[Work], told: ProgressAggregator, on_done: OnDone) -> list[Any]:
        """Do the units.

        Raises:
            BackmergeError: Ray is missing or cannot be reached, a node doesn't see `shared` or has another backmerge, a
                unit failed, or the workers of a unit died more than `retries` times.
        """
        if self._ray is None:
            self._ray = self._held.enter_context(_connected(self.settings, self._plugins))
        ray = self._ray
        with _marker(self.shared) as marker:
            resources = {
                "num_gpus": _gpus_per_unit(ray, self.settings, told),
                "num_cpus": self.settings.num_cpus,
            }
            task = ray.remote(max_retries=0, retry_exceptions=False, **resources)(_do)
            progress = _Progress(ray, told)
            died: Deaths[int] = Deaths()
            results: dict[int, Any] = {}
            running: dict[Any, int] = {}

            def begin(unit: int) -> None:
                work = works[unit]
                attempt = task.options(name=f"backmerge {work.key}")
                running[attempt.remote(self.function, work.key, work.spec, marker, progress.actor)] = unit

            try:
                for unit in range(len(works)):
                    begin(unit)
                while running:
                    ready, _ = ray.wait(list(running), timeout=POLL)
                    progress.look()
                    for reference in ready:
                        unit = running.pop(reference)
                        message = _message_of(ray, reference, works[unit].key)
                        if message is None:
                            _note_death(works[unit].key, unit, died, self.settings.retries)
                            told.note("a worker or its node died; its unit is run again")
                            begin(unit)
                            continue
                        if "failed" in message:
                            raise from_plain(message["failed"], works[unit].key)
                        told.reached(works[unit].key, message["steps"])
                        results[unit] = message["done"]
                        on_done(works[unit], message["done"])
            finally:
                for reference in running:
                    ray.cancel(reference, force=True, recursive=True)
                progress.stop()
        return [results[unit] for unit in range(len(works))]

    def release(self) -> None:
        """Disconnect, which ends this program's workers, and end a local Ray that was started here."""
        self._ray = None
        self._held.close()


def _do(function: str, key: str, spec: Mapping[str, Any], marker: Mapping[str, str], actor: Any) -> dict[str, Any]:
    """Do one unit, in a worker of the cluster."""
    counter = Counter(lambda steps, note: actor.tell.remote(key, steps, note), TELL_EVERY)
    try:
        _check_node(marker)
        result = plain_copy(function_of(function)(spec, counter))
    except Exception as error:  # noqa: BLE001  # boundary: the driver raises it again
        return {"failed": as_plain(error)}
    return {"done": result, "steps": counter.steps}


def _check_node(marker: Mapping[str, str]) -> None:
    host = os.uname().nodename
    if marker["version"] != __version__:
        raise RunError(
            f"the node {host} has backmerge {__version__}, but this machine has {marker['version']}",
            remedy="install the same version on all nodes.",
        )
    file = Path(marker["path"])
    deadline = time.monotonic() + VISIBLE_WITHIN
    while not file.exists():
        if time.monotonic() > deadline:
            raise RunError(
                f"the node {host} does not see the run directory {file.parent}: a file made there just now is missing",
                remedy="put the run on storage that all nodes mount at the same path (NFS, Lustre, ...), with --out.",
            )
        time.sleep(0.2)


@contextlib.contextmanager
def _marker(shared: Path) -> Iterator[dict[str, str]]:
    """Write a new file by which each node shows that it sees the driver's directory."""
    shared.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = shared.resolve() / f".seen-by-all-{secrets.token_hex(8)}.partial"
    path.touch()
    try:
        yield {"path": str(path), "version": __version__}
    finally:
        path.unlink(missing_ok=True)


def _message_of(ray: Any, reference: Any, key: str) -> dict[str, Any] | None:
    """Return the message that a unit left; `None` if its worker or node died.

    Raises:
        RunError: the unit could not be started.
    """
    exceptions = ray.exceptions
    try:
        message: dict[str, Any] = ray.get(reference)
    except (exceptions.RayTaskError, exceptions.RuntimeEnvSetupError, exceptions.TaskUnschedulableError) as error:
        # errors of the unit itself arrive as messages, so this one arose before or around it
        raise RunError(
            f"Ray could not start the unit '{key}': {error}",
            remedy="install the same backmerge and Python on all nodes, and check execution.ray_runtime_env.",
        ) from error
    except exceptions.RayError:
        return None
    return message


def _note_death(key: str, unit: int, died: Deaths[int], retries: int) -> None:
    died[unit] += 1
    if died[unit] > retries:
        raise RunError(
            f"the unit '{key}' lost its worker or its node {died[unit]} times",
            remedy="read `ray list tasks` and the logs of that node; if memory ran out, request more of "
            "execution.num_cpus, so that fewer units share a node, or use a smaller batch. Finished work is kept.",
        )


class _Progress:
    """Pass steps from the units to the driver's progress bar: an actor collects them, without blocking any unit."""

    def __init__(self, ray: Any, told: ProgressAggregator) -> None:
        self._ray = ray
        self._told = told
        self.actor = ray.remote(num_cpus=0, max_restarts=-1)(_Gathered).remote()
        self._asked = self.actor.take.remote()

    def look(self) -> None:
        ready, _ = self._ray.wait([self._asked], timeout=0)
        if not ready:
            return
        # if the actor's node died, it starts empty elsewhere, and units report all their steps at their end
        with contextlib.suppress(self._ray.exceptions.RayError):
            for key, (steps, note) in self._ray.get(self._asked).items():
                self._told.reached(key, steps, note)
        self._asked = self.actor.take.remote()

    def stop(self) -> None:
        self._ray.kill(self.actor)


class _Gathered:
    """The furthest step of each unit since the last request."""

    def __init__(self) -> None:
        self._steps: dict[str, tuple[int, str]] = {}

    def tell(self, key: str, steps: int, note: str) -> None:
        """Record how far a unit is."""
        self._steps[key] = (steps, note)

    def take(self) -> dict[str, tuple[int, str]]:
        """Return what is new."""
        new, self._steps = self._steps, {}
        return new


@contextlib.contextmanager
def _connected(settings: ExecutionSettings, plugins: Sequence[str]) -> Iterator[Any]:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise RunError("Ray is not installed", remedy="pip install 'backmerge[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    _check_reachable(settings.ray_address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no statistics are sent unless the user enables them
    try:
        ray.init(
            address=settings.ray_address,
            runtime_env=_runtime_env(settings, plugins),
            log_to_driver=False,  # the workers' output would break the progress bar; Ray keeps it in its logs
            configure_logging=False,
        )
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise RunError(
            f"Ray cannot be used at {settings.ray_address or 'its default address'}: {error}",
            remedy="check that the cluster runs (`ray status`), that Ray's version is the same there, and that this "
            "machine has its token (RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token).",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Check that something listens at the address: Ray waits long, and then ends this process without an error.

    Raises:
        RunError: nothing listens there.
    """
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return  # "local", "auto", or one of Ray's own schemes
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECTED_WITHIN).close()
    except OSError as error:
        raise RunError(
            f"no Ray cluster answers at {address}: {error}",
            remedy="use the address that `ray start --head` prints, and check that this machine can reach its port.",
        ) from error


def _runtime_env(settings: ExecutionSettings, plugins: Sequence[str]) -> dict[str, Any]:
    """Return what is shipped to the workers: the user's settings, and the packages of the user's own functions."""
    asked = dict(settings.ray_runtime_env)
    modules = sorted({name.partition(":")[0].partition(".")[0] for name in plugins})
    if not modules:
        return asked
    shipped = list(asked.get("py_modules", []))
    for name in modules:
        module = importlib.import_module(name)
        package = next(iter(getattr(module, "__path__", ())), None)
        shipped.append(str(package or module.__file__))
    return {**asked, "py_modules": shipped}


def _gpus_per_unit(ray: Any, settings: ExecutionSettings, told: ProgressAggregator) -> float:
    """Return the GPUs per unit: as set, otherwise one if the cluster has any."""
    most = max((node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    if settings.num_gpus is None:
        return 1.0 if most > 0 else 0.0
    if settings.num_gpus > most:
        # an autoscaling cluster may get such a node; any other never will
        told.note(
            f"A unit needs {settings.num_gpus:g} GPUs, but no node of the Ray cluster has more than {most:g}: waiting."
        )
    return settings.num_gpus
