"""Carry out a recipe: one pass over the tensors, in several threads, into a directory or a model in memory."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backmerge.checkpoints.files import FLOATS, torch_dtype
from backmerge.merging.blocks import Merge, Piece
from backmerge.merging.recipe import Variant
from backmerge.merging.reductions import BLOCK

GROUP_BYTES = 1 << 30  # base tensors per group: statistics first, then the merge, so that the second reading is cached
MAX_WORKERS = 8

Sink = Callable[[int, str, int, Tensor], None]  # number of the variant, tensor, first element, elements


def carry_out(
    merge: Merge, sink: Sink, *, workers: int | None = None, advance: Callable[[int], None] | None = None
) -> None:
    """Merge every tensor and pass its blocks to the sink, from several threads and in any order.

    Args:
        merge: The merge to carry out.
        sink: Takes a block of a variant; may be called by several threads at once, never twice for the same elements.
        workers: Number of threads; by default the machine's cores, at most 8.
        advance: Progress callback; gets the number of finished elements.
    """
    with _pool(workers) as pool:
        for names in _groups(merge):
            statistics = _statistics(merge, names, pool)

            def finish(piece: Piece, found: Mapping[str, Sequence[np.ndarray]] = statistics) -> int:
                for number, block in merge.merged(piece, found[piece.name]):
                    sink(number, piece.name, piece.start, block)
                return piece.stop - piece.start

            for elements in _in_order(pool, finish, (piece for name in names for piece in merge.pieces(name))):
                if advance is not None:
                    advance(elements)
    merge.share_digests()


def merged_tensors(variant: Variant) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the merged model, whole, with the base's names and in its order.

    Arithmetic is in float32 and is rounded once. Random numbers are a function of the recipe's seed, the tensor's
    name and the position in it, so that neither shard order nor threads change the result.

    Raises:
        MergeError: the models do not fit, a parameter is wrong, or a tensor is not finite or of a dtype without a mean.
    """
    merge = Merge([variant])
    for name, info in merge.infos.items():
        whole = torch.empty(info.num_elements, dtype=torch_dtype(info.dtype))
        statistics = whole_statistics(merge, name)
        for piece in merge.pieces(name):
            for _, block in merge.merged(piece, statistics):
                whole[piece.start : piece.stop] = block
        yield name, whole.reshape(info.shape)


def whole_statistics(merge: Merge, name: str) -> list[np.ndarray]:
    """Return the results of the method's reductions over one tensor, in this thread."""
    found: list[np.ndarray] = []
    for _ in merge.method.reductions if merge.method is not None and _has_statistics(merge, name) else ():
        found.append(functools.reduce(np.add, [merge.statistics_of(piece, found) for piece in _blocks(merge, name)]))
    return found


def _statistics(merge: Merge, names: Sequence[str], pool: ThreadPoolExecutor) -> dict[str, list[np.ndarray]]:
    """Return the same for several tensors, in several threads; sums are taken in the order of the blocks."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    if merge.method is None:
        return found
    wanted = [name for name in names if _has_statistics(merge, name)]
    for _ in merge.method.reductions:
        sums: dict[str, np.ndarray] = {}
        pieces = [piece for name in wanted for piece in _blocks(merge, name)]
        parts = _in_order(pool, lambda piece: merge.statistics_of(piece, found[piece.name]), pieces)
        for piece, part in zip(pieces, parts, strict=True):
            sums[piece.name] = part if piece.name not in sums else sums[piece.name] + part
        for name in wanted:
            found[name].append(sums[name])
    return found


def _has_statistics(merge: Merge, name: str) -> bool:
    assert merge.method is not None
    is_untouched = merge.method.is_idempotent and all(weights.is_base(name) for weights in merge.tuned)
    return merge.base.infos[name].dtype in FLOATS and not is_untouched


def _blocks(merge: Merge, name: str) -> list[Piece]:
    total = merge.base.infos[name].num_elements
    return [Piece(name, start, min(start + BLOCK, total)) for start in range(0, max(total, 1), BLOCK)]


def _groups(merge: Merge) -> Iterator[list[str]]:
    """Yield the tensors in their order, in groups."""
    group: list[str] = []
    size = 0
    for name, info in merge.base.infos.items():
        group.append(name)
        size += info.length
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


@contextmanager
def _pool(workers: int | None) -> Iterator[ThreadPoolExecutor]:
    """Start threads that each compute alone: torch's own threads would compete with them."""
    count = workers or max(1, min(MAX_WORKERS, os.cpu_count() or 1))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(count, thread_name_prefix="merge", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def _in_order(pool: ThreadPoolExecutor, function: Callable[[Piece], Any], pieces: Iterable[Piece]) -> Iterator[Any]:
    """Yield the results in the order of the pieces, with a few pieces being computed at a time."""
    under_way: deque[Future[Any]] = deque()
    for piece in pieces:
        under_way.append(pool.submit(function, piece))
        if len(under_way) >= 4 * MAX_WORKERS:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()
