"""Processes that start with the libraries loaded: forks of one server, which imports them once for all tests.

A new interpreter takes seconds to import torch, transformers and peft. Tests of what a kill, a signal or a second
process does need a process, not these seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "matplotlib.pyplot",
        "hypothesis",
        "peft",
        "pytest",
        "backmerge.cli",
        "backmerge.finetuning.trainer",
        "backmerge.generation.transformers_engine",
        "backmerge.pipeline.stages",
        "backmerge.reporting.report",
    ]
)


def started(
    function: Callable[..., object], *arguments: Any, log: Path, environment: dict[str, str] | None = None
) -> ForkServerProcess:
    """Start a process that calls a function of a module.

    Args:
        function: What it calls.
        arguments: Of the function; they are pickled.
        log: A file for what the process prints.
        environment: Variables in addition to those of this process.
    """
    variables = {**os.environ, **(environment or {})}
    process = _SERVER.Process(target=_call, args=(function, arguments, log, variables))
    process.start()
    return process


def _call(function: Callable[..., object], arguments: tuple[Any, ...], log: Path, variables: dict[str, str]) -> None:
    # the server has the environment and the output of the test that started it
    os.environ.clear()
    os.environ.update(variables)
    with log.open("w") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    function(*arguments)


def command(*words: str) -> None:
    """Run `backmerge ...` as the installed command does."""
    from backmerge.cli import main

    sys.argv = ["backmerge", *words]
    main()
