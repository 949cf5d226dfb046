"""Which level of isolation this machine allows, found out by running a program in it."""

from __future__ import annotations

import functools
import sys

from backmerge.errors import RunError
from backmerge.sandbox.bubblewrap import bubblewrap_version
from backmerge.sandbox.calls import call_filter
from backmerge.sandbox.interpreter import own_interpreter
from backmerge.sandbox.program import Level, Sandbox

INSTALL = "install bubblewrap (on Debian and Ubuntu: apt-get install bubblewrap)"

# what solutions import, and what a library that cannot be loaded or a user id that cannot be dropped would break
_TRIAL = "import collections, decimal, hashlib, json, math, os, random\nassert os.geteuid() != 0"


@functools.cache
def available_level() -> tuple[Level, str]:
    """The level that this machine allows, and either bubblewrap's version or why it does not work, in words."""
    if not sys.platform.startswith("linux"):
        return "process", "bubblewrap is for Linux only"
    version = bubblewrap_version()
    if version is None:
        return "process", "bubblewrap is absent"
    reason = _why_not(_sandbox("bubblewrap", version))
    return ("bubblewrap", version) if reason is None else ("process", f"bubblewrap {version} fails here: {reason}")


def make_sandbox(*, allow_code_execution: bool = False) -> Sandbox:
    """The best sandbox that this machine allows.

    Args:
        allow_code_execution: Whether the user allows the weaker level; needed only if bubblewrap does not work.

    Raises:
        RunError: bubblewrap does not work and the weaker level is not allowed, or does not work either.
    """
    level, about = available_level()
    sandbox = _sandbox(level, about)
    if level == "bubblewrap":
        return sandbox
    if not allow_code_execution:
        raise RunError(
            f"this would run code that a model wrote, and {about}, so that it could read and change your files",
            remedy=f"{INSTALL}, or pass --allow-code-execution to run it in a process with limits only.",
        )
    reason = _why_not(sandbox)
    if reason is not None:
        raise RunError(
            f"code that a model wrote cannot be run here: {about}, and a process with limits does not work: {reason}",
            remedy=f"{INSTALL}, or run as a user that is not root, with a Python that this user can read.",
        )
    return sandbox


def _sandbox(level: Level, about: str) -> Sandbox:
    interpreter = own_interpreter()
    is_filtered = call_filter(others_in_reach=level == "process") is not None
    filtered = "system calls filtered" if is_filtered else "system calls not filtered"
    python = f"Python {interpreter.version}"
    if level == "bubblewrap":
        return Sandbox(level, f"bubblewrap {about}, {filtered}, {python}", interpreter)
    return Sandbox(level, f"process with limits ({about}), {filtered}, {python}", interpreter)


def _why_not(sandbox: Sandbox) -> str | None:
    """What a trial shows to be wrong; `None` if nothing is."""
    try:
        outcome = sandbox.run(_TRIAL)
    except RunError as error:
        return error.message
    return None if outcome.status == "ok" else f"a trial {outcome.status}: {outcome.output.strip()[-300:]}"
