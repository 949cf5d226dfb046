"""Merge each block of a tensor by a recipe: read it, merge it in float32, round it once, and check it."""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.compare import check_same_shape
from backmerge.checkpoints.files import FLOATS, ITEM_BYTES, TORCH_NAMES, TensorDigests, TensorInfo, torch_dtype
from backmerge.checkpoints.reader import Checkpoint
from backmerge.errors import MergeError
from backmerge.merging.method import Method, call, check_inputs
from backmerge.merging.randomness import TensorRandom
from backmerge.merging.recipe import Variant
from backmerge.merging.reductions import BLOCK, PART
from backmerge.merging.rounding import SAMPLED, RoundingLoss, stochastic
from backmerge.merging.schedule import Settings


class Piece(NamedTuple):
    """A part of a tensor that is merged in one step: the flat elements from `start` to `stop`."""

    name: str
    start: int
    stop: int


class Merge:
    """One pass over the tensors of variants that differ in λ alone: each input is read once for all of them.

    Args:
        variants: At least one.
        is_resident: Whether all inputs are `Resident`: in a device's memory, and checked when they were put there. Then
            nothing waits for the device block by block: `check_results` checks all results at once.

    Attributes:
        infos: Shape and dtype of every merged tensor, in the base's order.
        losses: The rounding loss of each variant.

    Raises:
        MergeError: the models do not fit each other, or the method does not take them or its parameters.
    """

    def __init__(self, variants: Sequence[Variant], *, is_resident: bool = False) -> None:
        self.is_resident = is_resident
        self._sums: list[tuple[str, Tensor]] = []
        self.variants = tuple(variants)
        self.recipe = variants[0]
        assert all(variant.at(None) == self.recipe.at(None) for variant in variants), "variants differ in λ alone"
        self.base, self.tuned = self.recipe.base, self.recipe.tuned_models
        self.infos = {name: self._output_info(info) for name, info in self.base.infos.items()}
        self.losses = [RoundingLoss() for _ in variants]
        self._buffers = threading.local()
        read = {id(w): w for w in (self.base, *self.tuned, *self.recipe.extra.values()) if isinstance(w, Checkpoint)}
        self._digests = {key: TensorDigests(weights.infos) for key, weights in read.items()}
        self._read = read
        self.method: Method | None = None
        self._settings: Settings | None = None
        if self.tuned:
            self._prepare()

    def _output_info(self, info: TensorInfo) -> TensorInfo:
        return info._replace(dtype=self.recipe.dtype) if self.recipe.dtype and info.dtype in FLOATS else info

    def _prepare(self) -> None:
        recipe = self.recipe
        for weights in self.tuned:
            check_same_shape(self.base, weights, is_cast=recipe.dtype is not None)
        for name, weights in recipe.extra.items():
            check_same_shape(self.base, weights, is_cast=True, called=f"the model '{name}'")
        self.method = method = recipe.method
        self._settings = settings = Settings(self.variants)
        check_inputs(method, recipe.inputs)
        for statistics in recipe.inputs.values():
            statistics.check_fits(self.base)
        if method.survey is not None and method.survey.is_needed(recipe.parameters):
            measured = {name: self._measured(method, name) for name in self.infos if self._is_floating(name)}
            settings.given = method.survey.settle(measured, recipe.parameters)

    def _is_floating(self, name: str) -> bool:
        return self.base.infos[name].dtype in FLOATS

    def _measured(self, method: Method, name: str) -> float:
        assert method.survey is not None
        assert self._settings is not None
        piece = Piece(name, 0, self.base.infos[name].num_elements)
        given = self._shaped(self._data(method, piece, self._blocks_of(piece)), "tensor", name)
        given = _each(given, lambda block: block.float())
        return float(call(method.survey.measure, given, self._settings.at(name)))

    def pieces(self, name: str) -> list[Piece]:
        """Cut a tensor into pieces: always in the same way, so that nothing depends on which thread merges them."""
        total, shape = self.base.infos[name].num_elements, self.base.infos[name].shape
        cut = self._cut(name)
        step = BLOCK
        if cut == "tensor":
            step = max(total, 1)
        elif cut == "rows" and shape:
            columns = max(shape[-1], 1)
            step = max(1, BLOCK // columns) * columns
        return [Piece(name, start, min(start + step, total)) for start in range(0, max(total, 1), step)]

    def _cut(self, name: str) -> str:
        """Return how a tensor may be cut: one without the statistics that its method asks for is merged elementwise."""
        if self.method is None:
            return "elements"
        known = any(name in statistics.names for statistics in self.recipe.inputs.values())
        return "elements" if self.method.inputs and not known else self.method.cut

    def statistics_of(self, piece: Piece, earlier: Sequence[np.ndarray]) -> np.ndarray:
        """Return one block's contribution to the sum of the next reduction.

        Args:
            piece: A block of at most 2^20 elements.
            earlier: Results of the earlier reductions over the whole tensor.
        """
        assert self.method is not None
        assert self._settings is not None
        reduction = self.method.reductions[len(earlier)]
        given = self._data(self.method, piece, self._blocks_of(piece)) | {"statistics": earlier}
        return np.asarray(call(reduction, given, self._settings.at(piece.name)))

    def merged(self, piece: Piece, statistics: Sequence[np.ndarray]) -> Iterator[tuple[int, Tensor]]:
        """Yield the merged elements for each variant, with its number; each is valid until the next one is requested.

        Raises:
            MergeError: an input or the result is not finite, or integer tensors differ.
            CheckpointError: a file was damaged since it was opened.
        """
        name = piece.name
        dtype = torch_dtype(self.infos[name].dtype) if self.infos[name].dtype in TORCH_NAMES else None
        blocks = self._blocks_of(piece)
        for weights, block in blocks.items():
            if weights in self._digests and (self.method is None or self.method.cut != "rows"):
                self._digests[weights].add(name, piece.start, block)
        base = blocks[id(self.base)]
        if not self.is_resident:
            self._check_finite(name, blocks)
        if self.method is None or not self.tuned or self._is_settled(name, blocks):
            result = base if dtype is None else self._rounded(base, dtype, piece)
            if result.dtype != base.dtype and not is_finite(result):  # cast to a dtype of a smaller range
                raise self._not_finite(name)
            for number in range(len(self.variants)):
                yield number, result
            return
        assert dtype is not None
        assert self._settings is not None
        given = self._data(self.method, piece, blocks) | {"statistics": statistics}
        given = self._shaped(given, self._cut(name), name)
        kinds = {block.dtype for block in blocks.values()}
        is_native = self.method.is_native and kinds == {dtype} and self.recipe.rounding == "nearest"
        # float64 on any side keeps its precision: in float32 the endpoints would not be exact
        precision = None if is_native else functools.reduce(torch.promote_types, kinds, torch.float32)
        for number, variant in enumerate(self.variants):
            parameters = self._settings.at(name, variant)
            result, exact = self._computed(piece, given, parameters, dtype, precision)
            self._look_at(number, name, base, result, exact)
            yield number, result

    def _computed(
        self,
        piece: Piece,
        given: Mapping[str, Any],
        parameters: Mapping[str, Any],
        dtype: torch.dtype,
        precision: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the merged elements of a piece, rounded, and the first few before rounding; flat.

        If the method allows it and its inputs must be widened, the work is done in parts that fit a core's cache, which
        is faster and needs little memory.
        """
        assert self.method is not None
        total = piece.stop - piece.start
        num_sampled = total // SAMPLED
        is_parted = precision is not None and self._cut(piece.name) == "elements" and "rng" not in self.method.data
        if not is_parted:
            merged = self._function(
                piece.name, _each(given, lambda block: block.to(precision or block.dtype)), parameters
            )
            exact = merged[:num_sampled]
            if precision is None and merged.dtype == dtype:  # rounded by the kernel: once more, in float32
                short = _each(given, lambda block: block[:num_sampled].float())
                exact = self._function(piece.name, short, parameters)
            return self._rounded(merged, dtype, piece), exact
        result = self._buffer("result", total, given["base"].device)[: total * dtype.itemsize].view(dtype)
        exact = result[:0]
        for start in range(0, max(total, 1), PART):
            part = slice(start, min(start + PART, total))
            taken = _each(given, operator.itemgetter(part))
            if not (self.method.widens and precision == torch.float32):
                taken = _each(taken, lambda block: block.to(precision))
            merged = self._function(piece.name, taken, parameters)
            if start == 0:
                exact = merged[:num_sampled]
            result[part] = self._rounded(merged, dtype, Piece(piece.name, piece.start + start, piece.stop))
        return result, exact

    def _function(self, name: str, given: Mapping[str, Any], parameters: Mapping[str, Any]) -> Tensor:
        """Return the method's own result, flat."""
        assert self.method is not None
        merged = self.method.function(*(given.get(key) for key in self.method.data), **parameters)
        if merged.shape != given["base"].shape:
            raise MergeError(
                f"the merge method gave tensor '{name}' the shape {tuple(merged.shape)} instead of "
                f"{tuple(given['base'].shape)}",
                remedy="a method's result has the shape of its base.",
            )
        return merged.reshape(-1)

    def _look_at(self, number: int, name: str, base: Tensor, result: Tensor, exact: Tensor) -> None:
        """Check that a result is finite, and measure what its rounding cost."""
        if self.is_resident:
            self._sums.append((name, result.sum(dtype=torch.float32)))
            return
        if not is_finite(result):
            raise self._not_finite(name)
        if len(exact):
            self.losses[number].add(base[: len(exact)], exact, result[: len(exact)])

    def check_results(self) -> None:
        """Check the merges of resident inputs, which are computed without waiting for each block.

        Raises:
            MergeError: a result is not finite.
        """
        for name, total in self._sums:
            if not bool(total.isfinite()):
                raise self._not_finite(name)
        self._sums.clear()

    def _not_finite(self, name: str) -> MergeError:
        return MergeError(
            f"the merge of tensor '{name}' holds NaN or values beyond the range of {self.infos[name].dtype}",
            remedy="the two models are too far apart for this dtype: give --dtype float32 or bfloat16.",
        )

    def _rounded(self, values: Tensor, dtype: torch.dtype, piece: Piece) -> Tensor:
        if self.recipe.rounding == "stochastic":
            return stochastic(values, dtype, TensorRandom(self.recipe.seed, piece.name, piece.start))
        return values.to(dtype)

    def _blocks_of(self, piece: Piece) -> dict[int, Tensor]:
        """Return the elements of each model, by the model's id; the base's if an adapter leaves the tensor alone."""
        name, start, stop = piece
        blocks: dict[int, Tensor] = {}
        for weights in (self.base, *self.tuned, *self.recipe.extra.values()):
            if id(weights) in blocks:
                continue
            if isinstance(weights, AdapterOnBase) and weights.base is self.base and weights.is_base(name):
                blocks[id(weights)] = blocks[id(self.base)]
            else:
                blocks[id(weights)] = weights.block(name, start, stop, self._buffer(len(blocks), stop - start))
        return blocks

    def _buffer(self, slot: str | int, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Return a buffer of `count` elements that this thread reuses; a new one for more than a block."""
        kept: dict[str | int, Tensor] = self._buffers.__dict__.setdefault("kept", {})
        if count > BLOCK or slot not in kept:
            fresh = torch.empty(max(count, BLOCK) * max(ITEM_BYTES.values()), dtype=torch.uint8, device=device)
            if count > BLOCK:
                return fresh
            kept[slot] = fresh
        return kept[slot]

    def _data(self, method: Method, piece: Piece, blocks: Mapping[int, Tensor]) -> dict[str, Any]:
        """Return the data that the method's functions may request by name."""
        tuned = [blocks[id(weights)] for weights in self.tuned]
        return {
            "base": blocks[id(self.base)],
            "tuned": tuned if method.takes_several else tuned[0],
            "rng": TensorRandom(self.recipe.seed, piece.name, piece.start),
            **{name: statistics.of(piece.name) for name, statistics in self.recipe.inputs.items()},
            **{name: blocks[id(weights)] for name, weights in self.recipe.extra.items()},
        }

    def _shaped(self, given: dict[str, Any], cut: str, name: str) -> dict[str, Any]:
        if cut == "elements":
            return given
        shape = self.base.infos[name].shape
        wanted = shape if cut == "tensor" else (-1, shape[-1] if shape else 1)
        return _each(given, lambda block: block.reshape(wanted))

    def _is_settled(self, name: str, blocks: Mapping[int, Tensor]) -> bool:
        """Return whether the result is the base's elements without arithmetic: integers, and unchanged elements."""
        base = blocks[id(self.base)]
        others = {id(weights): weights for weights in self.tuned}
        if self._is_floating(name):
            assert self.method is not None
            return self.method.is_idempotent and all(
                block is base or (not self.is_resident and is_same(base, block))
                for block in (blocks[key] for key in others)
            )
        for key, weights in others.items():
            if blocks[key] is not base and not is_same(base, blocks[key]):
                raise MergeError(
                    f"tensor '{name}' has dtype {self.base.infos[name].dtype}, and differs between "
                    f"{self.base.directory} and {weights.directory}: integer tensors cannot be averaged",
                    remedy="give unquantised checkpoints.",
                )
        return True

    def _check_finite(self, name: str, blocks: Mapping[int, Tensor]) -> None:
        if not self._is_floating(name):
            return
        for weights in (self.base, *self.tuned, *self.recipe.extra.values()):
            if not is_finite(blocks[id(weights)]):
                side = "base" if weights is self.base else "tuned model" if weights in self.tuned else "extra model"
                raise MergeError(
                    f"tensor '{name}' of the {side} {weights.directory} holds NaN or infinity",
                    remedy="the training diverged or the file is damaged; this model cannot be used.",
                )

    def share_digests(self) -> None:
        """Pass the fingerprints of checkpoints that were read whole to them, so that they need not be read again."""
        for key, digests in self._digests.items():
            self._read[key].adopt(digests)


def is_finite(block: Tensor) -> bool:
    """Return whether no element is NaN or infinite.

    A sum shows both in a fiftieth of the time that a check of each element takes; if finite numbers overflow in the
    sum, each element is checked.
    """
    if not block.is_floating_point() or bool(block.sum().isfinite()):
        return True
    return bool(block.isfinite().all())


def is_same(first: Tensor, second: Tensor) -> bool:
    """Return whether two blocks have the same bits; most blocks that differ do so in the first bytes."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    a, b = (side.view(-1).view(whole).cpu().numpy() for side in (first, second))
    return np.array_equal(a[:64], b[:64]) and np.array_equal(a, b)


def _each(given: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Apply `change` to each tensor, alone or in a list; leave everything else as it is."""
    return {key: _changed(value, change) for key, value in given.items()}


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    is_list = isinstance(value, list) and value and isinstance(value[0], Tensor)
    return [change(tensor) for tensor in value] if is_list else value
