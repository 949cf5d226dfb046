"""Overwrite the weights of a model in memory with a merge, so that a sweep over λ never touches the disk."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.layout import STACKED, layout_of
from backmerge.checkpoints.reader import Weights
from backmerge.errors import MergeError
from backmerge.merging.blocks import Merge, is_finite
from backmerge.merging.engine import carry_out, whole_statistics
from backmerge.merging.recipe import Variant


class LiveMerge:
    """Set a model in memory to any variant of its base.

    Each `set` starts from the unchanged base (its files, or a copy), so that errors do not add up over a thousand
    switches. It works block by block and makes no copy of the model's size.

    Args:
        model: Loaded from `base`, on any device, in any floating dtype.
        base: The base's weights.
        resident: Keep base and tuned models in the memory of the model's device, rather than read them from their files
            each time: faster, but it needs that memory. Adapters take the size of their factors only.
    """

    def __init__(self, model: nn.Module, base: Weights, *, resident: bool = False) -> None:
        self.base = base
        # tied parameters appear under each of their names and share storage: setting one sets all
        self._in_memory: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        self._parameters, self._ignored = _by_names_on_disk(self._in_memory, base)
        self._resident: dict[str, Weights] | None = {} if resident else None

    def is_possible(self) -> bool:
        """Return whether the tensors on disk fill each of the model's tensors, with none left but tied ones.

        Some architectures fuse tensors in other ways when they are loaded; these are realised as a checkpoint instead.
        So are models that tie tensors which the disk has twice: after a merge the two may differ, and would no longer
        be tied.
        """
        on_disk = {name: info for name, info in self.base.infos.items() if name not in self._ignored}
        if any(
            name not in self._parameters or tuple(self._parameters[name].shape) != info.shape
            for name, info in on_disk.items()
        ):
            return False
        places = {self._parameters[name].data_ptr() for name in on_disk}
        in_memory = {tensor.data_ptr(): tensor.numel() for tensor in self._in_memory.values()}
        filled = sum(info.num_elements for info in on_disk.values())
        return len(places) == len(on_disk) and in_memory.keys() <= places and filled == sum(in_memory.values())

    @torch.no_grad()
    def set(self, variant: Variant) -> None:
        """Overwrite the weights in place with the tensors that the checkpoint would have.

        Raises:
            MergeError: see `Merge` and `Merge.merged`.
        """
        is_resident = self._resident is not None
        merge = Merge([self._on_device(variant)], is_resident=is_resident)

        def overwrite(_: int, name: str, start: int, block: Tensor) -> None:
            if name in self._ignored:
                return
            place = self._parameters[name].detach()
            if place.is_contiguous():
                place.view(-1)[start : start + block.numel()].copy_(block)
            else:
                assert block.numel() == place.numel(), "a tensor that is not contiguous is set whole"
                place.copy_(block.view(place.shape))

        if not is_resident:
            carry_out(merge, overwrite)
            return
        for name in merge.infos:  # one kernel uses the device better than threads could
            statistics = whole_statistics(merge, name)
            for piece in merge.pieces(name):
                for number, block in merge.merged(piece, statistics):
                    overwrite(number, name, piece.start, block)
        merge.check_results()

    def _on_device(self, variant: Variant) -> Variant:
        if self._resident is None:
            return variant
        base = self._kept(variant.base)
        return replace(
            variant,
            base=base,
            tuned=tuple(self._kept(weights) for weights in variant.tuned_models) or None,
            extra={name: self._kept(weights) for name, weights in variant.extra.items()},
        )

    def _kept(self, weights: Weights) -> Weights:
        assert self._resident is not None
        key = weights.fingerprint
        if key not in self._resident:
            device = next(iter(self._in_memory.values())).device
            if isinstance(weights, AdapterOnBase):
                on_device = copy.copy(weights)
                on_device.base = self._kept(weights.base)
                self._resident[key] = on_device
            else:
                self._resident[key] = Resident(weights, device)
        return self._resident[key]


def _by_names_on_disk(in_memory: Mapping[str, Tensor], base: Weights) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Return a model's tensors by their names on disk, and the names on disk that it does not load, such as buffers.

    A tensor that is stacked or fused in memory is given as its parts, which are views.
    """
    if all(name in in_memory for name in base.infos):
        return dict(in_memory), frozenset()
    found: dict[str, Tensor] = {}
    layout = layout_of(base)
    for name, (parameter, region) in layout.places.items():
        if parameter not in in_memory:
            continue  # it is another model; `is_possible` reports that
        tensor = in_memory[parameter].detach()
        if region is not None:
            expert = tensor[region.first] if tensor.ndim == STACKED else tensor
            tensor = expert[region.start : region.start + region.rows]
        found[name] = tensor
    return found, layout.ignored


class Resident:
    """Weights in the memory of a device.

    Args:
        weights: The weights; read whole, once.
        device: The device to put them on.

    Raises:
        MergeError: a tensor holds NaN or infinity.
    """

    def __init__(self, weights: Weights, device: torch.device) -> None:
        self.directory, self.companions = weights.directory, weights.companions
        self.infos, self.metadata, self.fingerprint = weights.infos, weights.metadata, weights.fingerprint
        self._tensors: dict[str, Tensor] = {}
        for name in weights.infos:
            tensor = weights.tensor(name).reshape(-1)
            if not is_finite(tensor):
                raise MergeError(
                    f"tensor '{name}' of {self.directory} holds NaN or infinity",
                    remedy="the training diverged or the file is damaged; this model cannot be used.",
                )
            self._tensors[name] = tensor.to(device)

    def block(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Return elements of a tensor, flat: a view, which must not be changed."""
        return self._tensors[name][start:stop]

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor: a view, which must not be changed."""
        return self._tensors[name].view(self.infos[name].shape)

    def is_base(self, name: str) -> bool:  # noqa: ARG002 - an adapter's question
        """Return False: this is not an adapter."""
        return False
