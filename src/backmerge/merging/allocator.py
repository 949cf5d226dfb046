"""How freed memory is kept, for a process that merges and does little else."""

from __future__ import annotations

import contextlib
import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's names of its settings
KEPT = 64 << 20  # bytes


def keep_freed_memory() -> None:
    """Let glibc keep up to 64 MB that is freed, rather than give it back and fault it in again for every block.

    The temporaries of a block are some megabytes; without this, up to a third of a merge's CPU time goes to clearing
    their pages. It holds for the whole process, and so is for a command to ask for; elsewhere than on glibc it does
    nothing.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(TRIM_THRESHOLD, KEPT)
        libc.mallopt(MMAP_THRESHOLD, KEPT // 2)
