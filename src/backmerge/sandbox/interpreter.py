"""Find the bare interpreter that programs run on: this one, without its environment and its packages."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# hashes of strings are fixed, so that a program that depends on a set's order always does the same
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"}  # noqa: S108
# no user or site packages, nothing from the working folder, no byte code written
OPTIONS = ("-s", "-S", "-P", "-B")

_USR = Path("/usr")
_INSIDE = Path("/python")


class Interpreter(NamedTuple):
    """A Python installation.

    Attributes:
        executable: Its program, with links resolved.
        base: Its folder, which contains the standard library.
        version: Such as `3.11.7`.
    """

    executable: Path
    base: Path
    version: str


@functools.cache
def own_interpreter() -> Interpreter:
    """Return this process's interpreter; in a virtual environment the one it was made from, so without packages."""
    # the attribute is private, but nothing else gives this path; venv itself uses it
    executable = Path(getattr(sys, "_base_executable", "") or sys.executable).resolve()
    return Interpreter(executable, Path(sys.base_prefix).resolve(), platform.python_version())


def bound(interpreter: Interpreter) -> tuple[Path, list[str]]:
    """Return the interpreter's path in a bubblewrap sandbox, and the arguments that put it there.

    An interpreter under /usr is there already. Any other appears as /python, whatever the names and permissions of its
    parent folders: only its program and its library folders, without the packages in them.
    """
    if interpreter.base.is_relative_to(_USR):
        return interpreter.executable, []
    inside = _INSIDE / "bin" / interpreter.executable.name
    arguments = ["--dir", str(_INSIDE), "--dir", str(inside.parent)]
    arguments += ["--ro-bind", str(interpreter.executable), str(inside)]
    for library in ("lib", "lib64"):
        if (interpreter.base / library).is_dir():
            arguments += ["--ro-bind", str(interpreter.base / library), str(_INSIDE / library)]
            for packages in _packages(interpreter.base / library):
                arguments += ["--tmpfs", str(_INSIDE / library / packages)]
    return inside, arguments


def _packages(library: Path) -> Iterator[Path]:
    """Yield the folders of installed packages, relative to their library folder."""
    return (found.relative_to(library) for found in sorted(library.glob("python3*/site-packages")))


def library_path(interpreter: Interpreter, *, is_bound: bool) -> str:
    """Return where the dynamic linker finds libpython, since its cache in /etc is missing."""
    if not is_bound or interpreter.base.is_relative_to(_USR):
        return str(sysconfig.get_config_var("LIBDIR") or interpreter.base / "lib")
    return os.pathsep.join(str(_INSIDE / library) for library in ("lib", "lib64"))


_LINKED_FOLDERS = ("bin", "sbin", "lib", "lib32", "lib64")


def bubblewrap_version() -> str | None:
    """Return the version, such as `0.8.0`; `None` if there is no working bubblewrap."""
    if shutil.which("bwrap") is None:
        return None
    try:
        done = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.removeprefix("bubblewrap").strip()


def bubblewrap_command(interpreter: Interpreter, *, tmp_bytes: int, filter_fd: int) -> list[str]:
    """Return the command up to the interpreter's `-c`.

    For root, no user namespace is used: the program starts as root with two capabilities left, and gives both up itself
    (`inside.drop_user`) once the interpreter, which may be in a place that only root can read, is bound. In a user
    namespace it would still be root for the rest of the machine: the owner of root's files, and exempt from the limit
    on processes. For any other user, bubblewrap needs a user namespace, in which that user has no rights.

    Args:
        interpreter: Runs the program.
        tmp_bytes: Size of /tmp.
        filter_fd: Descriptor of the filter of system calls; negative for none.
    """
    command = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--new-session", "--clearenv"]
    command += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--hostname", "sandbox"]
    command += ["--unshare-cgroup-try"]
    if os.geteuid() == 0:
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
    for name, value in {**ENVIRONMENT, "LD_LIBRARY_PATH": library_path(interpreter, is_bound=True)}.items():
        command += ["--setenv", name, value]
    command += ["--ro-bind", "/usr", "/usr"]
    for folder in (Path("/") / name for name in _LINKED_FOLDERS):
        if folder.is_symlink():
            command += ["--symlink", str(folder.readlink()), str(folder)]
        elif folder.is_dir():  # distributions where it is not part of /usr
            command += ["--ro-bind", str(folder), str(folder)]
    executable, arguments = bound(interpreter)
    command += [*arguments, "--dir", "/dev", "--dev-bind", "/dev/null", "/dev/null"]
    command += ["--perms", "1777", "--size", str(tmp_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"]  # noqa: S108
    # the root is bubblewrap's tmpfs, as large as half of the memory, and writable unless it is remounted
    command += ["--remount-ro", "/"]
    if filter_fd >= 0:
        command += ["--seccomp", str(filter_fd)]
    return [*command, "--", str(executable), *OPTIONS]
