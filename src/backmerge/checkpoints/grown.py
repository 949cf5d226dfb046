"""A base whose vocabulary is smaller than its tuned model's: seen with the tuned model's new rows at its end."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from backmerge.checkpoints.compare import is_grown
from backmerge.checkpoints.files import TensorInfo
from backmerge.checkpoints.reader import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor


class GrownBase:
    """The base with the rows that its tuned model added to embeddings, so that both have one shape.

    There the two agree, so that a merge keeps the added rows as the tuned model has them, for every method that is
    idempotent by element. Statistics of whole tensors (SLERP's angle, TIES' thresholds) see these rows, too. Config
    and tokenizer are the tuned model's, since they know the added tokens.

    Args:
        base: The smaller one.
        tuned: The larger one; tensors may differ in nothing but more rows.
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
        """The base's, in the tuned model's shapes where rows were added."""
        return {
            name: info._replace(shape=self._tuned.infos[name].shape) if name in self.grown else info
            for name, info in self._base.infos.items()
        }

    @property
    def fingerprint(self) -> str:
        """Of both, since both have a part in it."""
        return f"{self._base.fingerprint}+rows of {self._tuned.fingerprint}" if self.grown else self._base.fingerprint

    def block(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Elements of a tensor, flat: the base's, and after them the tuned model's."""
        if name not in self.grown or stop <= self.grown[name]:
            return self._base.block(name, start, stop, buffer)
        import torch

        border = max(start, self.grown[name])
        added = self._tuned.block(name, border, stop).to(self._base.block(name, 0, 0).dtype)
        return torch.cat([self._base.block(name, start, border), added]) if start < border else added

    def tensor(self, name: str) -> Tensor:
        """One whole tensor."""
        info = self.infos[name]
        return self.block(name, 0, info.num_elements).reshape(info.shape)

    def is_base(self, name: str) -> bool:  # noqa: ARG002 - an adapter's question
        """Never: this is no adapter."""
        return False
