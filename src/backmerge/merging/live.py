"""Overwrite the weights of a model in memory with a merge, so that a sweep over λ never touches the disk."""

from __future__ import annotations

import torch
from torch import nn

from backmerge.checkpoints.reader import Checkpoint
from backmerge.merging.engine import merged_tensors
from backmerge.merging.recipe import Variant


class LiveMerge:
    """Sets a model in memory to any variant of its base.

    Each `set` starts from the base's files, so that a thousand switches do not drift.

    Args:
        model: Loaded from `base`, on any device, in any floating dtype.
        base: The base's weights.
    """

    def __init__(self, model: nn.Module, base: Checkpoint) -> None:
        self.base = base
        # tied parameters appear under each of their names and share storage: setting one sets all
        self._parameters = dict(model.state_dict(keep_vars=True))

    def is_possible(self) -> bool:
        """Whether the model's tensors are those on disk: same names and shapes, none left over but tied ones.

        Some architectures rename or fuse tensors as they load; those are realised as a checkpoint instead. So are
        models that tie what the disk holds twice: once merged, the two may differ, and would no longer be tied.
        """
        on_disk = self.base.infos
        fits = all(
            name in self._parameters and tuple(self._parameters[name].shape) == info.shape
            for name, info in on_disk.items()
        )
        places = [self._parameters[name].data_ptr() for name in on_disk if name in self._parameters]
        covered = set(places)
        is_one_to_one = len(covered) == len(places)
        return fits and is_one_to_one and all(tensor.data_ptr() in covered for tensor in self._parameters.values())

    @torch.no_grad()
    def set(self, variant: Variant, *, allow_plugins: bool = False) -> None:
        """Overwrite the weights in place: the very tensors that the checkpoint would hold.

        Raises:
            MergeError: see `merged_tensors`.
        """
        for name, tensor in merged_tensors(variant, allow_plugins=allow_plugins):
            self._parameters[name].copy_(tensor)
