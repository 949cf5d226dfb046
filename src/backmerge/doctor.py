"""Report what this machine has, and what can therefore run."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

EXTRAS = {"vllm": "vllm", "lm-eval": "lm_eval", "ray": "ray"}


class Finding(NamedTuple):
    """One line of the doctor's report: the subject, its state, and what to do if something is missing."""

    what: str
    state: str
    advice: str = ""


def examine() -> Iterator[Finding]:
    """Examine the machine; runs nothing but a trial of the sandbox."""
    from backmerge import __version__

    yield Finding("backmerge", f"{__version__} on Python {platform.python_version()}, {platform.system()}")
    for package in ("torch", "transformers", "peft"):
        yield Finding(package, _version(package))
    yield _devices()
    memory, free = _memory_bytes(), shutil.disk_usage(Path.cwd()).free
    yield Finding("memory", f"{memory / 1e9:.0f} GB")
    yield Finding("disk", f"{free / 1e9:.0f} GB free in {Path.cwd()}")
    # float32 weights, and half as much again for generation
    yield Finding("largest model", f"about {memory / 6e9:.0f} billion parameters on the CPU in float32, by its memory")
    for extra, module in EXTRAS.items():
        found = importlib.util.find_spec(module) is not None
        yield Finding(extra, "installed" if found else "absent", "" if found else f"pip install 'backmerge[{extra}]'")
    yield sandbox_finding()
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"}
    off = "off (HF_HUB_OFFLINE is set): models from folders only"
    yield Finding("hub", off if offline else "contacted when needed")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _devices() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return Finding("devices", ", ".join(f"{p.name} ({p.total_memory / 1e9:.0f} GB)" for p in names))
    if torch.backends.mps.is_available():
        return Finding("devices", "Apple GPU (mps)")
    return Finding(
        "devices",
        f"CPU, threads: {torch.get_num_threads()}",
        "enough for the demo; models of 1B and more need a GPU",
    )


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def sandbox_finding() -> Finding:
    """Report how model-written code is isolated here, by running a program in the sandbox."""
    from backmerge.sandbox import available_level

    level, about = available_level()
    if level == "bubblewrap":
        return Finding("sandbox", f"bubblewrap {about} works")
    advice = "needed for benchmarks that run model-written code; on Debian: apt-get install bubblewrap"
    return Finding("sandbox", about, advice)
