"""Every attack of the table fails in every place that promises it, and works where nothing holds it back."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from backmerge.sandbox import Limits
from sandbox.attacks import ATTACKS, ESCAPED, FORGERIES, PROCESSES, Attack
from sandbox.world import HAS_FILTER, IS_ROOT, NOBODY, Run, World, marked, place, run_bare, survivors, world_in

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the attacks are written for Linux")

PLACES = ("bubblewrap", "bubblewrap unfiltered", "bubblewrap as a user", "process", "process as a user")
# the wall clock is what ends some attacks; the others end in a twentieth of it
LIMITS = Limits(wall_seconds=10.0, memory_bytes=1 << 28)
SHORT = LIMITS._replace(wall_seconds=0.5)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[World]:
    """A world of its own for each attack; it belongs to whoever runs the sandbox, who could do it all the harm."""
    monkeypatch.setenv("BACKMERGE_SECRET", ESCAPED)
    where = request.node.callspec.params.get("name", "") if hasattr(request.node, "callspec") else ""
    with world_in(tmp_path / "world", NOBODY if IS_ROOT and where.endswith("as a user") else os.geteuid()) as made:
        yield made


@pytest.fixture(scope="module")
def places() -> Iterator[Callable[[str], Run]]:
    """Gives the place to run in, or skips and says why there is none."""
    with ExitStack() as stack:
        made: dict[str, Run | str] = {}

        def find(name: str) -> Run:
            found = made[name] if name in made else made.setdefault(name, place(name, stack))
            if isinstance(found, str):
                pytest.skip(found)
            return found

        yield find


def is_promised(attack: Attack, name: str) -> bool:
    """Whether a place says that it stops an attack."""
    if name == "bubblewrap unfiltered":
        return not attack.needs_filter
    if name.startswith("bubblewrap"):
        return HAS_FILTER or not attack.needs_filter
    if not HAS_FILTER:
        return False
    return attack.by_process == "stopped" or (attack.by_process == "stopped as root" and IS_ROOT and name == "process")


# how success is told is the same in every place, and the clock does not need the filter
ELSEWHERE = {
    "bubblewrap unfiltered": FORGERIES | PROCESSES,
    "bubblewrap as a user": FORGERIES,
    "process as a user": FORGERIES,
}
CASES = [
    pytest.param(attack, name, id=f"{name}: {title}")
    for name in PLACES
    for title, attack in ATTACKS.items()
    if is_promised(attack, name) and title not in ELSEWHERE.get(name, ())
]


@pytest.mark.parametrize(("attack", "name"), CASES)
def test_an_attack_fails(attack: Attack, name: str, world: World, places: Callable[[str], Run]) -> None:
    """It gets nothing, does nothing outside, ends in time, passes for no solution, and leaves nothing running."""
    run = places(name)
    limits = marked(SHORT if attack.ends == "stopped" else LIMITS)
    outcome = run(world.aim(attack.program), limits)
    assert ESCAPED not in outcome.output
    assert world.harm() == []
    deadline = time.monotonic() + 5  # the kernel ends a namespace on a busy machine in its own time
    while survivors(limits) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert survivors(limits) == []
    assert outcome.seconds < limits.wall_seconds + 2.5
    assert len(outcome.output) <= limits.output_bytes
    if attack.ends == "ok":
        assert outcome.status == "ok", outcome
    elif attack.ends == "not ok":
        assert outcome.status in {"failed", "killed"}, outcome
    elif attack.ends == "stopped":
        assert outcome.status in {"timed out", "killed", "failed"}, outcome


@pytest.mark.parametrize(
    "attack",
    [pytest.param(attack, id=title) for title, attack in ATTACKS.items() if attack.works_bare],
)
def test_the_attack_works_where_nothing_holds_it_back(attack: Attack, world: World, tmp_path: Path) -> None:
    """So the test above sees a wall, not a program that is wrong."""
    if attack.is_root_only and not IS_ROOT:
        pytest.skip("works for root only")
    (tmp_path / "bare").mkdir()
    # no one answers over UDP; that it is sent is enough
    program = world.aim(attack.program.replace("if s.recv(1): ", ""))
    assert ESCAPED in run_bare(program, tmp_path / "bare", world)


def test_harm_is_seen(world: World) -> None:
    """What looks at the world from outside sees each kind of harm."""
    assert world.harm() == []
    program = (
        "import os, socket\nopen('@SECRET@', 'w').write('x')\nopen('@OUTSIDE@/new', 'w').close()\n"
        "os.kill(@VICTIM@, 9)\n"
        "socket.create_connection(('127.0.0.1', @TCP@)).close()\n"
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @UDP@))\n"
        "socket.socket(socket.AF_UNIX).connect('\\0backmerge-@VICTIM@')\n"
        "os.chdir('@OUTSIDE@')\nsocket.socket(socket.AF_UNIX).connect('socket')"
    )
    run_bare(world.aim(program), world.folder, world)
    world.victim.wait(5)
    assert len(world.harm()) == 7


def test_the_table_is_long_enough() -> None:
    """At least 25 attacks, as was asked, on each level."""
    assert len(ATTACKS) >= 25
    for name in ("bubblewrap", "process"):
        assert sum(is_promised(attack, name) for attack in ATTACKS.values()) >= 25 or not HAS_FILTER
