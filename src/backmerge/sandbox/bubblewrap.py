"""The command line that starts a program under bubblewrap."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from backmerge.sandbox.interpreter import ENVIRONMENT, OPTIONS, Interpreter, bound, library_path

_LINKED_FOLDERS = ("bin", "sbin", "lib", "lib32", "lib64")


def bubblewrap_version() -> str | None:
    """As `0.8.0`; `None` where there is no bubblewrap that answers."""
    if shutil.which("bwrap") is None:
        return None
    try:
        done = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.removeprefix("bubblewrap").strip()


def bubblewrap_command(interpreter: Interpreter, *, tmp_bytes: int, filter_fd: int) -> list[str]:
    """Everything up to the interpreter's `-c`.

    As root there is no user namespace: the program starts as root with two capabilities left, to give both up
    itself (`inside.drop_user`) once the interpreter, which may lie where only root can go, is bound. A user namespace
    would leave it root to the rest of the machine: owner of root's files, and exempt from the limit on processes.
    Anyone else needs one for bubblewrap to work at all, and is nobody in it.

    Args:
        interpreter: What runs the program.
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
        elif folder.is_dir():  # distributions that keep it apart from /usr
            command += ["--ro-bind", str(folder), str(folder)]
    executable, arguments = bound(interpreter)
    command += [*arguments, "--dir", "/dev", "--dev-bind", "/dev/null", "/dev/null"]
    command += ["--perms", "1777", "--size", str(tmp_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"]  # noqa: S108
    # the root is a tmpfs of bubblewrap's own, as large as half of the memory, and writable until told otherwise
    command += ["--remount-ro", "/"]
    if filter_fd >= 0:
        command += ["--seccomp", str(filter_fd)]
    return [*command, "--", str(executable), *OPTIONS]
