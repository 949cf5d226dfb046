"""Random numbers of a merge: a function of seed, tensor and position, whatever the order of the work."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import xxhash
from torch import Tensor

BLOCK = 1 << 20  # elements that share a generator; work may be cut at multiples of it


class TensorRandom:
    """Uniform draws for the elements of one tensor.

    The draw of an element depends on (seed, tensor name, stream, position) alone, so that neither chunk size, nor
    threads, nor shard order change a mask.

    Args:
        seed: Of the recipe.
        name: Of the tensor.
        offset: Position of the first element that is asked for; a multiple of `BLOCK`.
    """

    def __init__(self, seed: int, name: str, offset: int = 0) -> None:
        if offset % BLOCK:
            raise ValueError(f"offset {offset} is not a multiple of {BLOCK}")
        self._key = f"{seed}\0{name}"
        self._first_block = offset // BLOCK

    def uniform(self, like: Tensor, *, stream: int = 0) -> Tensor:
        """Float64 numbers in [0, 1), 32 bits each, in the shape of `like`.

        Args:
            like: Gives shape and device.
            stream: Another stream gives independent numbers, such as one for each tuned model.
        """
        count = like.numel()
        raw = np.empty(-(-count // BLOCK) * BLOCK, dtype=np.uint32)
        for index, generator in enumerate(self._generators(-(-count // BLOCK), stream)):
            raw[index * BLOCK : (index + 1) * BLOCK] = generator.random_raw(BLOCK // 2).view(np.uint32)
        numbers = torch.from_numpy(raw[:count].astype(np.float64)) / 2.0**32
        return numbers.reshape(like.shape).to(like.device)

    def _generators(self, num_blocks: int, stream: int) -> Iterator[np.random.SFC64]:
        for block in range(self._first_block, self._first_block + num_blocks):
            text = f"{self._key}\0{stream}\0{block}".encode()
            yield np.random.SFC64(xxhash.xxh3_128_intdigest(text))
