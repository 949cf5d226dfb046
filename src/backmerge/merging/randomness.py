"""Random numbers of a merge: a function of seed, tensor and position, independent of the order of the work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xxhash

from backmerge.merging.reductions import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = -1  # the stream that stochastic rounding draws from; methods use 0 and more


class TensorRandom:
    """Uniform draws for the elements of one tensor.

    The draw of an element depends on (seed, tensor name, stream, position) alone, so that chunk size, threads and shard
    order do not change a mask. Elements of a block of 2^20 share a generator (SFC64), keyed by a hash.

    Args:
        seed: The recipe's seed.
        name: The tensor's name.
        offset: Position of the first requested element.
    """

    def __init__(self, seed: int, name: str, offset: int = 0) -> None:
        self._key = f"{seed}\0{name}"
        self._offset = offset

    def uniform(self, like: Tensor, *, stream: int = 0) -> Tensor:
        """Return float64 numbers in [0, 1), 32 bits each, in the shape and on the device of `like`.

        Args:
            like: Gives shape and device.
            stream: Another stream gives independent numbers, such as one for each tuned model.
        """
        import torch

        numbers = self._raw(like.numel(), stream).astype(np.float64)
        numbers /= 2.0**32
        return torch.from_numpy(numbers).reshape(like.shape).to(like.device)

    def keeps(self, like: Tensor, probability: float, *, stream: int = 0) -> Tensor:
        """Return a mask that is true with that probability, independently, in the shape and on the device of `like`.

        Args:
            like: Gives shape and device.
            probability: In [0, 1], used to 32 bits.
            stream: Another stream gives independent masks.
        """
        import torch

        threshold = round(probability * 2**32)
        if threshold >= 2**32:
            return torch.ones(like.shape, dtype=torch.bool, device=like.device)
        raw = self._raw(like.numel(), stream)
        return torch.from_numpy(raw < np.uint32(threshold)).reshape(like.shape).to(like.device)

    def _raw(self, count: int, stream: int) -> np.ndarray:
        """Return 32 random bits for each element."""
        first, end = self._offset // BLOCK, self._offset + count
        blocks = [
            self._block(block, stream, min(end - block * BLOCK, BLOCK)) for block in range(first, -(-end // BLOCK))
        ]
        if not blocks:
            return np.empty(0, dtype=np.uint32)
        joined = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        skipped = self._offset - first * BLOCK
        return joined[skipped : skipped + count]

    def _block(self, block: int, stream: int, count: int) -> np.ndarray:
        text = f"{self._key}\0{stream}\0{block}".encode()
        raw = np.random.SFC64(xxhash.xxh3_128_intdigest(text)).random_raw(-(-count // 2))
        return np.asarray(raw).view(np.uint32)[:count]
