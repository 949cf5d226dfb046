"""How far two checkpoints are apart, in units in the last place of their dtype."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import safe_open

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 1e-4  # below this a difference is not counted in ulps: terms that cancel leave their own rounding
NUM_SAMPLES = 2**22  # elements of a tensor that are looked at


class Distance(NamedTuple):
    """Between two checkpoints.

    Attributes:
        num_tensors: That both have, with one shape and dtype.
        only_ours: Names that the other lacks, or has with another shape or dtype.
        only_theirs: The reverse.
        ulps: The largest difference where |x| > 1e-4.
        where: The tensor that has it.
    """

    num_tensors: int
    only_ours: tuple[str, ...]
    only_theirs: tuple[str, ...]
    ulps: int
    where: str


def ulps_apart(ours: Tensor, theirs: Tensor) -> Tensor:
    """How many values of their dtype lie between two tensors, element by element (the same value: 0, neighbours: 1).

    Args:
        ours: float32, bfloat16 or float16, any shape.
        theirs: Same shape and dtype.
    """
    return (_rank(ours) - _rank(theirs)).abs()


def _rank(tensor: Tensor) -> Tensor:
    """The place of each element among all values of its dtype, 0 for zero."""
    import torch

    bits = tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).long()
    smallest = -(2 ** (8 * tensor.element_size() - 1))  # the bits of −0.0
    return torch.where(bits < 0, smallest - bits, bits)


def distance(ours: Path, theirs: Path) -> Distance:
    """Between two folders; of large tensors a part is looked at."""
    with ExitStack() as stack:
        mine, other = opened(ours, stack), opened(theirs, stack)
        kinds, other_kinds = ({name: _kind(files[name], name) for name in files} for files in (mine, other))
        both = [name for name in mine if kinds[name] == other_kinds.get(name)]
        worst, where = 0, ""
        for name in both:
            x, y = sample(mine[name], name), sample(other[name], name)
            apart = ulps_apart(x, y)[x.float().abs() > SMALL]
            if apart.numel() and int(apart.max()) > worst:
                worst, where = int(apart.max()), name
        only_ours, only_theirs = sorted(set(mine) - set(both)), sorted(set(other) - set(both))
    return Distance(len(both), tuple(only_ours), tuple(only_theirs), worst, where)


def opened(directory: Path, stack: ExitStack) -> Mapping[str, Any]:
    """The open file of each tensor of a folder, closed with the stack."""
    files = [stack.enter_context(safe_open(file, "pt")) for file in sorted(directory.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict


def _kind(file: Any, name: str) -> tuple[list[int], str]:
    piece = file.get_slice(name)
    return piece.get_shape(), piece.get_dtype()


def sample(file: Any, name: str) -> Tensor:
    """The whole tensor, or four bands of rows spread over it, the last rows among them."""
    import torch

    piece = file.get_slice(name)
    return torch.cat([piece[start:stop] for start, stop in _bands(piece.get_shape())])


def _bands(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first row of each band that is looked at, and the one after its last."""
    band = max(1, NUM_SAMPLES // (4 * math.prod(shape[1:])))
    if shape[0] <= 4 * band:
        return [(0, shape[0])]
    starts = [(shape[0] - band) * part // 3 for part in range(4)]
    return [(start, start + band) for start in starts]


def free_unsampled(directory: Path) -> None:
    """Give the disk back what of a folder's tensors nobody looks at, as holes in their files.

    Raises:
        CalledProcessError: the file system has no holes.
    """
    for path in directory.rglob("*.safetensors"):
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for entry in header.values():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            row = (end - begin) // max(1, entry["shape"][0]) if entry["shape"] else 0
            bands = _bands(entry["shape"]) if row else []
            for (_, last), (first, _) in itertools.pairwise(bands):
                if first > last:
                    hole = ["--offset", str(begin + last * row), "--length", str((first - last) * row)]
                    subprocess.run(["fallocate", "--punch-hole", *hole, str(path)], check=True)
