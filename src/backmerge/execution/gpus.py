"""Which GPUs each worker process sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs of this process, as `CUDA_VISIBLE_DEVICES` names them (numbers, or ids of whole or parted GPUs)."""
    listed = environment.get(VARIABLE)
    if listed is not None:
        names = (name.strip() for name in listed.split(","))
        # CUDA itself takes no notice of what stands after an invalid entry
        return tuple(takewhile(lambda name: name not in {"", "-1"}, names))
    import torch

    return tuple(str(number) for number in range(torch.cuda.device_count()))


def workers_for(gpus: Sequence[str], per_worker: float) -> int:
    """How many workers the GPUs suffice for; one where a worker takes none, or more than there are."""
    return max(1, int(len(gpus) / per_worker + 1e-9)) if per_worker > 0 else 1


def gpus_of(worker: int, gpus: Sequence[str], per_worker: float) -> tuple[str, ...]:
    """The GPUs of one worker: neighbours, or one that several share; more workers than suffice go round again.

    Args:
        worker: Counted from 0.
        gpus: All of them.
        per_worker: As many for each; a part of one lets several workers share it.
    """
    if per_worker <= 0 or not gpus:
        return ()
    if per_worker <= 1:
        return (gpus[int(worker * per_worker + 1e-9) % len(gpus)],)
    whole = min(int(per_worker), len(gpus))
    first = worker % (len(gpus) // whole) * whole
    return tuple(gpus[first : first + whole])
