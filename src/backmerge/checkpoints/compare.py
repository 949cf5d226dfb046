"""Check whether two models can be merged: does the tuned model have the base's tensors and shapes?"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.files import FLOATS, TensorInfo
from backmerge.checkpoints.model_config import check_unquantised, read_config
from backmerge.checkpoints.reader import Checkpoint, Weights
from backmerge.errors import MergeError

if TYPE_CHECKING:
    from torch import Tensor


SHOWN = 5  # differences listed in a message; the rest are counted


def check_same_shape(base: Weights, tuned: Weights, *, is_cast: bool = False, called: str = "the tuned model") -> None:
    """Refuse two models that differ in architecture, tensor names, shapes or dtypes.

    Args:
        base: One model.
        tuned: The other.
        is_cast: Whether the inputs' dtypes may differ: the output's dtype is given, or this model does not decide it.
        called: Name of the other model in messages.

    Raises:
        MergeError: names both folders, the first tensors that differ with both sides, and the remedy.
    """
    if isinstance(tuned, AdapterOnBase):
        return  # it was checked against its base when it was opened
    configs = [read_config(weights.companions) for weights in (base, tuned)]
    for weights, config in zip((base, tuned), configs, strict=True):
        check_unquantised(weights.directory, config, "merged")
    kinds = [config.model_type for config in configs]
    if kinds[0] != kinds[1]:
        raise MergeError(
            f"{called} {tuned.directory} is a {kinds[1]}, the base {base.directory} a {kinds[0]}",
            remedy="give the base that the tuned model was made from.",
        )
    differences = list(_differences(base, tuned, is_cast=is_cast, called=called))
    if differences:
        shown = "\n".join(f"  {line}" for line in islice(differences, SHOWN))
        more = f"\n  and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise MergeError(
            f"{called} {tuned.directory} does not fit the base {base.directory}:\n{shown}{more}",
            remedy=_remedy(base, tuned),
        )


def _remedy(base: Weights, tuned: Weights) -> str:
    common = [(base.infos[name], tuned.infos[name]) for name in base.infos.keys() & tuned.infos.keys()]
    if base.infos.keys() == tuned.infos.keys() and all(ours.shape == theirs.shape for ours, theirs in common):
        return (
            "choose the merged model's dtype: --dtype bfloat16 for merge, --dtype-out bfloat16 for restore and run "
            "(merged_dtype in an experiment file)."
        )
    if any(is_grown(ours.shape, theirs.shape) for ours, theirs in common):
        return (
            "if tokens were added or rows padded in tuning, --extra-rows tuned takes these rows from the tuned model."
        )
    if any(is_grown(theirs.shape, ours.shape) for ours, theirs in common):
        return (
            "the tuned model's vocabulary has fewer rows, as if the base's was padded: load the tuned model, call "
            "resize_token_embeddings with the base's number of rows, save it, and give that as TUNED."
        )
    return "give the base that the tuned model was made from; tensors are never cropped or skipped."


def is_grown(ours: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    """Return whether a tuned tensor is the base's with more rows, as an embedding after tokens were added."""
    return len(ours) == len(theirs) > 0 and theirs[0] > ours[0] and theirs[1:] == ours[1:]


def _differences(base: Weights, tuned: Weights, *, is_cast: bool, called: str) -> Iterator[str]:
    for name in sorted(base.infos.keys() | tuned.infos.keys()):
        ours, theirs = base.infos.get(name), tuned.infos.get(name)
        if theirs is None:
            yield f"'{name}' is only in the base"
        elif ours is None:
            yield f"'{name}' is only in {called}"
        elif ours.shape != theirs.shape:
            yield f"'{name}' is {ours.shape} in the base and {theirs.shape} in {called}"
        elif ours.dtype != theirs.dtype and not (is_cast and {ours.dtype, theirs.dtype} <= set(FLOATS)):
            yield f"'{name}' is {ours.dtype} in the base and {theirs.dtype} in {called}"


class GrownBase:
    """The base with the rows that its tuned model added to embeddings, so that both have the same shapes.

    The two agree in these rows, so that a merge keeps them as in the tuned model, for every method that is idempotent
    by element. Statistics of whole tensors (SLERP's angle, TIES' thresholds) include these rows. Config and tokenizer
    are the tuned model's, since they have the added tokens.

    Args:
        base: The smaller one.
        tuned: The larger one; its tensors may differ only in having more rows.
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint) -> None:
        self.directory, self.companions, self.metadata = base.directory, tuned.directory, base.metadata
        self._base, self._tuned = base, tuned
        self.grown = {
            name: info.num_elements
            for name, info in base.infos.items()
            if name in tuned.infos and is_grown(info.shape, tuned.infos[name].shape)
        }

    @functools.cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """The base's, with the tuned model's shapes if rows were added."""
        return {
            name: info._replace(shape=self._tuned.infos[name].shape) if name in self.grown else info
            for name, info in self._base.infos.items()
        }

    @property
    def fingerprint(self) -> str:
        """A hash of both, since both contribute."""
        return f"{self._base.fingerprint}+rows of {self._tuned.fingerprint}" if self.grown else self._base.fingerprint

    def block(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Return elements of a tensor, flat: the base's, then the tuned model's."""
        if name not in self.grown or stop <= self.grown[name]:
            return self._base.block(name, start, stop, buffer)
        import torch

        border = max(start, self.grown[name])
        added = self._tuned.block(name, border, stop).to(self._base.block(name, 0, 0).dtype)
        return torch.cat([self._base.block(name, start, border), added]) if start < border else added

    def tensor(self, name: str) -> Tensor:
        """Return one whole tensor."""
        info = self.infos[name]
        return self.block(name, 0, info.num_elements).reshape(info.shape)

    def is_base(self, name: str) -> bool:  # noqa: ARG002 - an adapter's question
        """Return False: this is not an adapter."""
        return False
