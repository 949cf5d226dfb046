"""What the attacks are after: a secret, a folder, listeners, a process, an environment; and where they are run."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

import backmerge.sandbox
from backmerge.sandbox import Limits, Outcome, Sandbox, available_level
from backmerge.sandbox.calls import call_filter
from backmerge.sandbox.interpreter import Interpreter, own_interpreter
from sandbox.attacks import ESCAPED

IS_ROOT = os.geteuid() == 0
NOBODY = 61000  # below the ids that sandboxes take
HAS_FILTER = call_filter(others_in_reach=True) is not None
_SOURCES = Path(backmerge.sandbox.__file__).parents[2]
_METADATA = Path(str(distribution("backmerge").locate_file("")))
Run = Callable[[str, Limits], Outcome]


class World(NamedTuple):
    """What is outside.

    Attributes:
        folder: Holds `secret`, `module.py` and `socket`; another user cannot enter it.
        victim: A process that sleeps in that folder.
        tcp, udp, abstract, local: Listeners.
        inherited: A descriptor of the secret that child processes inherit unless told otherwise.
    """

    folder: Path
    victim: subprocess.Popen[bytes]
    tcp: socket.socket
    udp: socket.socket
    abstract: socket.socket
    local: socket.socket
    inherited: int

    def aim(self, program: str) -> str:
        """Put this world's names into an attack."""
        for name, value in {
            "SECRET": self.folder / "secret",
            "OUTSIDE": self.folder,
            "HOME": Path.home(),
            "VICTIM": self.victim.pid,
            "PARENT": os.getpid(),
            "TCP": self.tcp.getsockname()[1],
            "UDP": self.udp.getsockname()[1],
            "FD": self.inherited,
        }.items():
            program = program.replace(f"@{name}@", str(value))
        return program

    def harm(self) -> list[str]:
        """What has been done to this world."""
        found = []
        secret = self.folder / "secret"
        if not secret.exists() or secret.read_text() != ESCAPED:
            found.append("the secret is changed")
        if sorted(os.listdir(self.folder)) != ["module.py", "secret", "socket"]:  # noqa: PTH208  # names
            found.append("the folder is changed")
        if self.victim.poll() is not None:
            found.append("the other process is dead")
        for name in ("tcp", "abstract", "local"):
            try:
                getattr(self, name).accept()[0].close()
            except BlockingIOError:
                continue
            found.append(f"{name} had a visitor")
        try:
            self.udp.recv(9)
            found.append("udp had a visitor")
        except BlockingIOError:
            pass
        return found


@contextmanager
def world_in(folder: Path, owner: int) -> Iterator[World]:
    """Make a world that belongs to a user, and take it down."""
    folder.mkdir(mode=0o700)
    (folder / "secret").write_text(ESCAPED)
    (folder / "module.py").write_text(f"secret = '{ESCAPED}'\n")
    with ExitStack() as stack:
        identity = {"user": owner, "group": owner, "extra_groups": []} if owner != os.geteuid() else {}
        victim = subprocess.Popen(["sleep", "600"], cwd=folder, **identity)
        stack.callback(victim.wait)
        stack.callback(victim.kill)
        tcp, udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        abstract, local = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        for one in (tcp, udp, abstract, local):
            stack.enter_context(one)
        tcp.bind(("127.0.0.1", 0))
        udp.bind(("127.0.0.1", 0))
        abstract.bind(f"\0backmerge-{victim.pid}")
        before = Path.cwd()
        os.chdir(folder)  # a socket's path may be 107 bytes long
        local.bind("socket")
        os.chdir(before)
        for one in (tcp, abstract, local):
            one.listen()
        for one in (tcp, udp, abstract, local):
            one.setblocking(False)
        if identity:
            for path in (folder, *folder.iterdir()):
                os.chown(path, owner, owner)
        inherited = os.open(folder / "secret", os.O_RDONLY)
        stack.callback(os.close, inherited)
        os.set_inheritable(inherited, True)
        yield World(folder, victim, tcp, udp, abstract, local, inherited)


def marked(limits: Limits) -> Limits:
    """The same limits with an odd number among them, by which the processes that they are set for can be found."""
    return limits._replace(memory_bytes=limits.memory_bytes + secrets.randbelow(1 << 24))


def survivors(limits: Limits) -> list[int]:
    """The processes that were started with these marked limits and run on."""
    mark = f"memory_bytes={limits.memory_bytes}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
            state = (entry.parent / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if mark in words and state not in {"Z", "X"}:
            found.append(int(entry.parent.name))
    return found


def is_open(path: Path) -> bool:
    """Whether every user can reach a file or folder."""
    return all(part.stat().st_mode & 0o001 for part in (path, *path.parents))


def readable_interpreter() -> Interpreter | None:
    """This interpreter, or the system's where another user cannot read this one; `None` where there is none."""
    own = own_interpreter()
    if not IS_ROOT or is_open(own.executable):
        return own
    system = Path("/usr/bin/python3").resolve()
    if not system.exists():
        return None
    asked = [
        str(system),
        "-S",
        "-c",
        "import platform, sys; print(sys.version_info >= (3, 11), platform.python_version())",
    ]
    is_new, version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    return Interpreter(system, Path("/usr"), version) if is_new == "True" else None


_SERVED = """
import json, sys
from pathlib import Path
from backmerge.sandbox import Limits, Sandbox
from backmerge.sandbox.interpreter import Interpreter
level, executable, base, version = sys.argv[1:]
sandbox = Sandbox(level, "", Interpreter(Path(executable), Path(base), version))
for line in sys.stdin:
    program, limits = json.loads(line)
    print(json.dumps(sandbox.run(program, Limits(*limits))), flush=True)
"""


def as_user(level: str, interpreter: Interpreter, stack: ExitStack) -> Run:
    """A sandbox that is made and run by a user who is not root, for tests that are run by root."""
    server = subprocess.Popen(
        [str(interpreter.executable), "-c", _SERVED, level, *map(str, interpreter)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
        env={
            "PYTHONPATH": os.pathsep.join(map(str, (_SOURCES, _METADATA))),
            "PATH": os.environ["PATH"],
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
    )
    stack.enter_context(server)  # closes its input, at whose end it ends

    def run(program: str, limits: Limits) -> Outcome:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps([program, limits]) + "\n")
        server.stdin.flush()
        return Outcome(*json.loads(server.stdout.readline()))

    return run


def place(name: str, stack: ExitStack) -> Run | str:
    """The named place to run attacks in, or why there is none."""
    if name.startswith("bubblewrap") and available_level()[0] != "bubblewrap":
        return available_level()[1]
    if name in {"bubblewrap", "bubblewrap unfiltered"}:
        return Sandbox("bubblewrap", "", own_interpreter(), has_filter=name == "bubblewrap").run
    interpreter = readable_interpreter()
    if interpreter is None:
        return "no Python that another user can read"
    if name == "process":
        return Sandbox("process", "", interpreter).run
    if not (IS_ROOT and is_open(_SOURCES) and is_open(_METADATA)):
        return "wants tests run by root, and the package where another user can read it"
    return as_user(name.split(maxsplit=1)[0], interpreter, stack)


def run_bare(program: str, folder: Path, world: World) -> str:
    """What an attack prints when nothing holds it back."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=folder,
        env={**os.environ, "BACKMERGE_SECRET": ESCAPED},
        close_fds=False,
    )
    world.victim.poll()
    return done.stdout
