"""Measure what tuning did to each tensor, in one pass: how far it moved, in how many directions, what a merge keeps.

With `sample` only a share of the elements is read, so that a merge can check before it starts whether the tuned model
is a child of its base.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.files import FLOATS, ITEM_BYTES, torch_dtype
from backmerge.checkpoints.lora import Factors
from backmerge.checkpoints.reader import Weights
from backmerge.errors import MergeError
from backmerge.merging.changes import Change
from backmerge.merging.methods.linear import linear
from backmerge.merging.methods.slerp import PARALLEL
from backmerge.merging.reductions import BLOCK, PART, inner

LAMS = (0.2, 0.4, 0.6, 0.8)
LEAST = 4096  # elements that a sample reads of a block: fewer save no time, and small tensors are read whole
MAX_WORKERS = 8

# the effective rank
NUM_PROBES = 64
SMALL_SIDE = 512  # largest side of a Gram matrix that is computed whole
WHOLE = 1 << 22  # elements up to which a matrix with few rows is read at once: its Gram matrix needs whole columns


def survey(
    base: Weights,
    tuned: Weights,
    *,
    lams: Sequence[float] = LAMS,
    dtype: str | None = None,
    sample: float = 1.0,
    workers: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> dict[str, Change]:
    """Measure every tensor that both models have in one shape, by name and in the base's order.

    One pass in blocks of 2^20 elements (whole rows of a matrix), in float64 sums with a fixed order.

    The effective rank (Σσ²)² / Σσ⁴ = ‖Δ‖⁴ / ‖ΔᵀΔ‖² (Frobenius norms) is exact for LoRA and if the smaller side is at
    most 512 (and the matrix narrow, or of at most 2^22 elements). Elsewhere ‖ΔᵀΔ‖² is the mean of ‖ΔᵀΔg‖² over 64
    Gaussian probes g, the same each time; its relative standard error is sqrt(2·Σσ⁸ / 64) / Σσ⁴: 18 % at rank 1, 6 % at
    eight equal singular values, 1 % at 256. `rank_error` is estimated from the probes themselves.

    Args:
        base: The base's weights.
        tuned: The tuned model's weights; tensors that an adapter does not touch are not read.
        lams: The values of λ at which Linear's rounding is measured, each in [0, 1].
        dtype: The dtype of that rounding, as safetensors names it ("BF16"); by default the base's own.
        sample: Share of elements looked at, in (0, 1]: the first of every block, at least 4096 of it. Below an
            eighth the blocks are longer: 2^17 elements of each are looked at. Below 1 there is no effective rank.
        workers: Number of threads; by default the machine's cores, at most 8.
        advance: Progress callback; gets the number of finished elements.

    Raises:
        MergeError: `sample` is not a share, or there is no rounding to `dtype`.
        CheckpointError: a file was damaged since it was opened.

    Source: participation ratio as in Gao et al. (bioRxiv 214262); probes: Hutchinson (1990), Girard (1989).
    """
    if not 0 < sample <= 1:
        raise MergeError(
            f"the sample is {sample}, and must be in (0, 1]: it is a share of the elements",
            remedy="for example 0.01, or 1 for all.",
        )
    if dtype is not None and dtype not in FLOATS:
        raise MergeError(f"tensors cannot be rounded to {dtype}", remedy=f"give one of: {', '.join(FLOATS)}.")
    look = _Look(base, tuned, tuple(dict.fromkeys(lams)), dtype, sample)
    names = measurable(base, tuned)
    changes = {name: Change(base.infos[name].num_elements) for name in names}
    read = [name for name in names if changes[name].elements and not _is_untouched(base, tuned, name)]
    if advance is not None:
        advance(sum(change.elements for change in changes.values()) - sum(changes[name].elements for name in read))
    pieces = (piece for name in read for piece in look.pieces(name))
    parts = _in_order(look.part, pieces, workers)
    for name, found in itertools.groupby(parts, key=lambda part: part.name):
        whole = functools.reduce(_Part.plus, _told(found, advance))
        changes[name] = look.change(name, whole)
    return changes


def measurable(base: Weights, tuned: Weights) -> list[str]:
    """Return the tensors that both have in one shape and in dtypes that can be compared, in the base's order."""
    return [
        name
        for name, info in base.infos.items()
        if name in tuned.infos
        and info.shape == tuned.infos[name].shape
        and (
            {info.dtype, tuned.infos[name].dtype} <= set(FLOATS)
            or info.dtype == tuned.infos[name].dtype in ITEM_BYTES.keys() - set(FLOATS)
        )
    ]


def _is_untouched(base: Weights, tuned: Weights, name: str) -> bool:
    return isinstance(tuned, AdapterOnBase) and tuned.base is base and tuned.is_base(name)


def _told(parts: Iterable[_Part], advance: Callable[[int], None] | None) -> Iterator[_Part]:
    for part in parts:
        if advance is not None:
            advance(part.span)
        yield part


class _Piece(NamedTuple):
    """Elements `start` to `stop` of a tensor; those before `seen` are measured."""

    name: str
    start: int
    stop: int
    seen: int


class _Part(NamedTuple):
    """One piece's contribution to a tensor's sums.

    Attributes:
        name: The tensor's name.
        span: Number of elements of the piece.
        seen: Number of those that were measured.
        sums: Base², tuned², delta², product, unchanged elements, and lost squares by λ; float64.
        spectrum: Data for the effective rank: a part of a Gram matrix of the delta, or of its product with the probes.
    """

    name: str
    span: int
    seen: int
    sums: np.ndarray
    spectrum: np.ndarray | None

    def plus(self, other: _Part) -> _Part:
        """Return both pieces as one."""
        spectrum = None
        if self.spectrum is not None and other.spectrum is not None:
            spectrum = np.add(self.spectrum, other.spectrum, dtype=np.float64)
        return _Part(self.name, self.span + other.span, self.seen + other.seen, self.sums + other.sums, spectrum)


class _Look:
    """One survey: what is read, and what is measured."""

    def __init__(
        self, base: Weights, tuned: Weights, lams: tuple[float, ...], dtype: str | None, sample: float
    ) -> None:
        self._base, self._tuned = base, tuned
        self._lams, self._dtype, self._sample = lams, dtype, sample
        self._buffers = threading.local()

    def pieces(self, name: str) -> Iterator[_Piece]:
        """Cut a tensor: into whole rows if the effective rank is wanted."""
        total, shape = self._base.infos[name].num_elements, self._base.infos[name].shape
        # of a sample, as much at once as is computed at once: each piece costs the same few calls, however short it is
        step = BLOCK if self._sample == 1 else max(BLOCK, math.ceil(PART / self._sample))
        kind = self._spectrum_kind(name)
        if kind == "rows":
            step = total
        elif kind is not None:
            step = max(1, BLOCK // shape[1]) * shape[1]
        for start in range(0, total, step):
            stop = min(start + step, total)
            count = stop - start
            seen = min(count, max(LEAST, math.ceil(count * self._sample)))
            yield _Piece(name, start, stop, start + seen)

    def part(self, piece: _Piece) -> _Part:
        """Read and measure one piece."""
        base = self._read(self._base, piece, 0)
        tuned = self._read(self._tuned, piece, 1)
        sums = np.zeros(5 + len(self._lams))
        for start in range(0, len(base), PART):
            sums += self._sums(piece.name, base[start : start + PART], tuned[start : start + PART])
        return _Part(piece.name, piece.stop - piece.start, len(base), sums, self._spectrum(piece.name, base, tuned))

    def change(self, name: str, whole: _Part) -> Change:
        """Return a tensor's sums as a `Change`."""
        # scaled from a sample to the whole, so that tensors of any size can be combined
        base, tuned, delta, product, _, *lost = (whole.sums * (whole.span / whole.seen)).tolist()
        change = Change(
            elements=whole.span,
            unchanged=float(whole.sums[4]) / whole.seen,
            base_square=base,
            tuned_square=tuned,
            delta_square=delta,
            product=product,
            slerp_square=slerp_gap_square(base, tuned, product),
            lost_squares=dict(zip(self._lams, lost, strict=True)),
        )
        rank, error = self._effective_rank(name, delta, whole.spectrum)
        return replace(change, effective_rank=rank, rank_error=error)

    def _read(self, weights: Weights, piece: _Piece, slot: int) -> Tensor:
        kept: dict[int, Tensor] = self._buffers.__dict__.setdefault("kept", {})
        if slot not in kept:
            kept[slot] = torch.empty(BLOCK * max(ITEM_BYTES.values()), dtype=torch.uint8)
        return weights.block(piece.name, piece.start, piece.seen, kept[slot])

    def _sums(self, name: str, base: Tensor, tuned: Tensor) -> np.ndarray:
        if not base.is_floating_point():
            return np.array([0.0, 0.0, 0.0, 0.0, _num_same(base, tuned), *(0.0 for _ in self._lams)])
        # as the engine does: float32, and float64 if a side has it
        precision = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
        ours, theirs = base.to(precision), tuned.to(precision)
        same = _num_same(base, tuned) if base.dtype == tuned.dtype else _num_same(ours, theirs)
        lost = []
        rounded_to = torch_dtype(self._dtype or self._base.infos[name].dtype)
        for lam in self._lams:
            merged = linear.function(ours, theirs, lam=lam)
            error = merged.to(rounded_to) - merged
            lost.append(inner(error, error))
        is_short = base.element_size() == tuned.element_size() == 2  # float32 holds their products exactly
        a, b = (ours, theirs) if is_short else (ours.double(), theirs.double())
        delta = b - a
        return np.array([inner(a, a), inner(b, b), inner(delta, delta), inner(a, b), same, *lost])

    def _spectrum_kind(self, name: str) -> Literal["columns", "rows", "probes"] | None:
        """Return which Gram matrix of the delta is computed whole, if any; None if the effective rank is not wanted."""
        info = self._base.infos[name]
        if self._sample < 1 or not _is_matrix(info.shape) or info.dtype not in FLOATS or self._factors(name):
            return None
        if info.shape[1] <= SMALL_SIDE:
            return "columns"
        return "rows" if info.shape[0] <= SMALL_SIDE and info.num_elements <= WHOLE else "probes"

    def _spectrum(self, name: str, base: Tensor, tuned: Tensor) -> np.ndarray | None:
        kind = self._spectrum_kind(name)
        if kind is None:
            return None
        columns = self._base.infos[name].shape[1]
        delta = (tuned.float() - base.float()).view(-1, columns)
        if kind == "columns":
            return (delta.T @ delta).numpy()
        if kind == "rows":
            return (delta @ delta.T).numpy()
        return (delta.T @ (delta @ _probes(columns))).numpy()

    def _effective_rank(
        self, name: str, delta_square: float, spectrum: np.ndarray | None
    ) -> tuple[float | None, float | None]:
        factors, kind = self._factors(name), self._spectrum_kind(name)
        if factors is not None and self._sample == 1:
            assert isinstance(self._tuned, AdapterOnBase)
            sides = (self._tuned.file.float32_array(factors.a), self._tuned.file.float32_array(factors.b))
            return rank_of_product(*sides), 0.0
        if kind is None or spectrum is None or not 0 < delta_square < math.inf:
            return None, None
        # the squares of ‖ΔᵀΔg‖ column by column, or all that add up to ‖ΔᵀΔ‖²
        squares = np.square(spectrum, dtype=np.float64).sum(axis=0)
        quartic = float(squares.mean() if kind == "probes" else squares.sum())
        if not 0 < quartic < math.inf:
            return None, None
        rank = min(max(delta_square * delta_square / quartic, 1.0), float(min(self._base.infos[name].shape)))
        error = float(squares.std(ddof=1)) / math.sqrt(len(squares)) / quartic if kind == "probes" else 0.0
        return rank, rank * error

    def _factors(self, name: str) -> Factors | None:
        """Return the factors whose product is the whole delta, for LoRA on a plain matrix."""
        if not isinstance(self._tuned, AdapterOnBase) or name not in self._tuned.factors:
            return None
        factors = self._tuned.factors[name]
        return factors if factors.magnitude is None and factors.region is None else None


def slerp_gap_square(base_square: float, tuned_square: float, product: float) -> float:
    """Return ‖SLERP - Linear‖² at λ = 0.5, from the inner products of two vectors at an angle θ.

    Both of SLERP's weights are sin(θ/2) / sin θ = 1 / (2·cos(θ/2)), Linear's are 1/2, so that the gap is (1 /
    (2·cos(θ/2)) - 1/2)·(base + tuned). As in `slerp`, the gap is zero if |cos θ| > 0.9995 or a vector is zero.
    """
    lengths = math.sqrt(base_square) * math.sqrt(tuned_square)
    cosine = product / lengths if lengths > 0 else 1.0
    if not abs(cosine) <= PARALLEL:  # also true for NaN
        return 0.0
    excess = 1 / (2 * math.sqrt((1 + cosine) / 2)) - 0.5
    return excess * excess * (base_square + tuned_square + 2 * product)


def rank_of_product(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return the effective rank (Σσ²)² / Σσ⁴ of B·A from its factors: tr(M)² / tr(M²), M = (BᵀB)(AAᵀ).

    Args:
        a: Shape (r, in).
        b: Shape (out, r).

    Returns:
        A number in [1, r]; None if the product is zero.
    """
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    product = (wide_b.T @ wide_b) @ (wide_a @ wide_a.T)
    quartic = float((product * product.T).sum())
    return float(np.trace(product)) ** 2 / quartic if 0 < quartic < math.inf else None


@functools.lru_cache(maxsize=4)  # a model has few widths
def _probes(columns: int) -> Tensor:
    """Return Gaussian probes, shape (columns, 64), always the same."""
    return torch.randn(columns, NUM_PROBES, generator=torch.Generator().manual_seed(0))


def _is_matrix(shape: Sequence[int]) -> bool:
    return len(shape) == 2 and min(shape) > 1


def _num_same(first: Tensor, second: Tensor) -> int:
    """Count the elements with the same bits."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    return int(np.count_nonzero(first.view(whole).numpy() == second.view(whole).numpy()))


def _in_order(function: Callable[[_Piece], _Part], pieces: Iterable[_Piece], workers: int | None) -> Iterator[_Part]:
    """Yield the parts in the order of the pieces, from threads that each compute alone, two under way per thread."""
    count = workers or max(1, min(MAX_WORKERS, os.cpu_count() or 1))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(count, thread_name_prefix="survey", initializer=torch.set_num_threads, initargs=(1,))
    under_way: deque[Future[_Part]] = deque()
    try:
        for piece in pieces:
            under_way.append(pool.submit(function, piece))
            if len(under_way) >= 2 * count:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)
