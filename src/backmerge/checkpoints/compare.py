"""Can these two be merged: is the tuned model of the same shape as the base?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.reader import Weights, read_json
from backmerge.errors import MergeError

SHOWN = 5  # differences named in a message; the rest are counted


def check_same_shape(base: Weights, tuned: Weights) -> None:
    """Refuse two models that differ in architecture, tensor names, shapes or dtypes.

    Raises:
        MergeError: names both folders, the first differing tensors with both sides, and the remedy.
    """
    if isinstance(tuned, AdapterOnBase):
        return  # checked against its base when it was opened
    kinds = [read_json(weights.directory / "config.json").get("model_type") for weights in (base, tuned)]
    if kinds[0] != kinds[1]:
        raise MergeError(
            f"the tuned model {tuned.directory} is a {kinds[1]}, the base {base.directory} a {kinds[0]}",
            remedy="merging needs a model and its own fine-tuned version: give the base that it was tuned from.",
        )
    differences = list(_differences(base, tuned))
    if differences:
        shown = "\n".join(f"  {line}" for line in islice(differences, SHOWN))
        more = f"\n  and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise MergeError(
            f"the tuned model {tuned.directory} does not fit the base {base.directory}:\n{shown}{more}",
            remedy="give the base that it was tuned from; nothing is cropped or skipped.",
        )


def _differences(base: Weights, tuned: Weights) -> Iterator[str]:
    for name in sorted(base.infos.keys() | tuned.infos.keys()):
        ours, theirs = base.infos.get(name), tuned.infos.get(name)
        if theirs is None:
            yield f"'{name}' is in the base only"
        elif ours is None:
            yield f"'{name}' is in the tuned model only"
        elif ours.shape != theirs.shape:
            yield f"'{name}' is {ours.shape} in the base and {theirs.shape} in the tuned model"
        elif _is_float(ours.dtype) != _is_float(theirs.dtype):
            yield f"'{name}' is {ours.dtype} in the base and {theirs.dtype} in the tuned model"


def _is_float(dtype: str) -> bool:
    return dtype in {"F64", "F32", "F16", "BF16"}
