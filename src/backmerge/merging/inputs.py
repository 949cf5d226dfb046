"""The inputs that a model's linear layers get on some prompts: their second moments, and a λ for each direction.

For a layer with d inputs, C is the mean of x·xᵀ over its inputs x, scaled to a mean diagonal of 1. It is stored as its
leading directions; all other directions share the rest of the trace equally (as in probabilistic principal components):

    C = Vᵀ·diag(variances - rest)·V + rest·I        V: (directions, d), with orthonormal rows

So a method's work on a layer costs one product with V, and no d × d matrix is made if there are fewer directions.

    STATS.safetensors
        LAYER.directions    V, float32, (directions, d)
        LAYER.variances     float32, (directions,), largest first
        metadata            which tensors share these inputs, where they come from (`Provenance`), and a digest
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import xxhash
from pydantic import ValidationError

from backmerge.checkpoints.files import SafetensorsFile, TensorInfo, header_bytes
from backmerge.checkpoints.reader import Weights
from backmerge.config import Settings
from backmerge.errors import CheckpointError, MergeError, remedy_for
from backmerge.outputs import BLOCK
from backmerge.runs import write_once, write_whole

if TYPE_CHECKING:
    from torch import Tensor

LEAST_RIDGE = 1e-6  # with it, no matrix that is inverted here has a condition number above 1e6 times its width
ROWS = 1024  # rows of a delta that are widened at once
METADATA = "input_statistics"  # the key in the file's header
DIGEST = "xxh3"  # another one: the XXH3 (128 bit) of the text under METADATA and of the tensors; not in older files

GuardKind = Literal["harmful", "ordinary", "own", "file", "task"]


class Provenance(Settings):
    """Where input statistics come from; texts of prompts are not kept.

    Attributes:
        model: Fingerprint of the weights that were run.
        kind: `harmful` or `ordinary` prompts, `own` ones that the model wrote, those of a `file`, or `task` rows with
            their answers.
        source: The benchmark's or file's name; for `own` the seed.
        num_prompts: Number of conversations.
        num_tokens: Number of inputs of each layer.
        max_new_tokens: Length of the model's own answers; 0 for prompts alone.
        dtype: Dtype of the computation, as torch names it.
        max_directions: Largest number of directions kept for each layer.
        prompts: A digest of each prompt that must not be measured on: of all rows of a task's file.
    """

    model: str
    kind: GuardKind
    source: str
    num_prompts: int
    num_tokens: int
    max_new_tokens: int
    dtype: str
    max_directions: int
    prompts: tuple[str, ...] = ()


class LayerRecord(Settings):
    """One layer's inputs in a file of statistics.

    Attributes:
        tensors: Names on disk of the weights that take these inputs (q, k and v of one layer; gate and up).
        rest: Variance of each direction that is not kept.
        is_transposed: Whether the weights are stored (in, out).
    """

    tensors: tuple[str, ...]
    rest: float
    is_transposed: bool = False


class StatisticsRecord(Settings):
    """The header of a file of statistics.

    Attributes:
        format: Version of the file format.
        provenance: Where the statistics come from.
        layers: The layers, by their names in the file.
    """

    format: Literal[1] = 1
    provenance: Provenance
    layers: Mapping[str, LayerRecord]


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """Second moments C of one layer's inputs, scaled to a mean diagonal of 1.

    Attributes:
        directions: Orthonormal rows, shape (directions, d).
        variances: Variances of these directions, 0 or more, shape (directions,).
        rest: Variance of every other direction.
        is_transposed: Whether the layer's weight is stored (in, out).
    """

    directions: np.ndarray
    variances: np.ndarray
    rest: float = 0.0
    is_transposed: bool = False

    def ridged(self, ridge: float) -> tuple[np.ndarray, float]:
        """Return the variances and the rest of (1 - ridge)·C + ridge·I, in float64."""
        return (1 - ridge) * self.variances.astype(np.float64) + ridge, (1 - ridge) * self.rest + ridge

    def within(self, basis: np.ndarray | None, ridge: float) -> np.ndarray:
        """Return (1 - ridge)·C + ridge·I in an orthonormal basis that spans the directions, shape (basis, basis).

        Args:
            basis: Its vectors as rows, shape (basis, d); `None` for the unit vectors.
            ridge: Share of the identity.
        """
        variances, rest = self.ridged(ridge)
        turned = self.directions.T.astype(np.float64)
        if basis is not None:
            turned = basis @ turned
        within: np.ndarray = (turned * (variances - rest)) @ turned.T + rest * np.eye(len(turned))
        return within


class LamByDirection(NamedTuple):
    """A λ for each direction of a layer's input space: the factor of its delta, from the right.

    Attributes:
        rest: λ of the directions outside the basis.
        basis: Orthonormal rows, float64, shape (basis, d).
        shares: λ within the basis, float64: one for each direction, shape (basis,), or a matrix, shape (basis, basis).
        is_transposed: Whether the layer's weight is stored (in, out).
    """

    rest: float
    basis: np.ndarray
    shares: np.ndarray
    is_transposed: bool

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """Scale rows over the layer's inputs, each direction by its λ; float64, shape (rows, d)."""
        wide = rows.astype(np.float64)
        inside = wide @ self.basis.T
        weighted = inside * self.shares if self.shares.ndim == 1 else inside @ self.shares
        changed: np.ndarray = self.rest * wide + (weighted - self.rest * inside) @ self.basis
        return changed

    def of_delta(self, delta: Tensor) -> Tensor:
        """Scale a layer's delta in the shape of its weight, each direction by its λ; in float64, 1,024 rows at a time.

        Args:
            delta: Shape (out, d), or (d, out) if transposed; on any device.
        """
        import torch

        where = torch.device("cpu") if delta.device.type == "mps" else delta.device  # mps has no float64
        basis, shares = (torch.from_numpy(array).to(where) for array in (self.basis, self.shares))
        changed = []
        turned = (delta.T if self.is_transposed else delta).to(where)
        for start in range(0, len(turned), ROWS):
            wide = turned[start : start + ROWS].double()
            inside = wide @ basis.T
            weighted = inside * shares if shares.ndim == 1 else inside @ shares
            changed.append((self.rest * wide + (weighted - self.rest * inside) @ basis).to(delta.dtype))
        whole = torch.cat(changed).to(delta.device)
        return whole.T if self.is_transposed else whole


def lam_by_direction(
    guard: LayerInputs, task: LayerInputs | None = None, *, lam: float, ridge: float
) -> LamByDirection:
    """Return λ·T·(λ·T + (1 - λ)·G)⁻¹, with the second moments G of guard inputs and T of task inputs (or I).

    Both are taken as (1 - ridge)·C + ridge·I. Without task inputs nothing but numbers is inverted: a direction of
    variance c gets λ / (λ + (1 - λ)·c). With them a system in their common directions is solved, with a condition
    number of at most d / ridge.

    Args:
        guard: Inputs of the layer on guard prompts.
        task: Inputs of the same layer on task rows.
        lam: In (0, 1].
        ridge: Share of the identity in the second moments, in [1e-6, 1].

    Raises:
        MergeError: the ridge is out of its range, or the two do not have the same width.
    """
    if not LEAST_RIDGE <= ridge <= 1:
        raise MergeError(f"ridge is {ridge}, and must be from {LEAST_RIDGE:g} to 1", remedy="for example 0.01.")
    variances, rest = guard.ridged(ridge)
    if task is None:
        basis = guard.directions.astype(np.float64)
        return LamByDirection(_share(lam, 1.0, rest), basis, _share(lam, 1.0, variances), guard.is_transposed)
    if guard.directions.shape[1] != task.directions.shape[1]:
        raise MergeError(
            f"the guard's inputs have {guard.directions.shape[1]} elements, and the task's {task.directions.shape[1]}",
            remedy="collect both from models of the same shape.",
        )
    kept = _KEPT.get(guard)
    if kept is None or kept[0] is not task or kept[1:3] != (lam, ridge):
        _, task_rest = task.ridged(ridge)
        common = _common_basis(guard, task)
        wanted = lam * task.within(common, ridge)
        # wanted · (wanted + kept)⁻¹ for symmetric matrices
        shares = np.ascontiguousarray(np.linalg.solve(wanted + (1 - lam) * guard.within(common, ridge), wanted).T)
        basis = np.eye(len(shares)) if common is None else common
        found = LamByDirection(_share(lam, task_rest, rest), basis, shares, guard.is_transposed)
        kept = _KEPT[guard] = (task, lam, ridge, found)
    return kept[3]


# the last result of layers that are still in use: several weights take the same inputs, such as q, k and v
_KEPT: WeakKeyDictionary[LayerInputs, tuple[LayerInputs, float, float, LamByDirection]] = WeakKeyDictionary()


def _common_basis(guard: LayerInputs, task: LayerInputs) -> np.ndarray | None:
    """Return orthonormal rows that span the directions of both; `None` for the unit vectors, if these are no more."""
    both = np.concatenate([guard.directions, task.directions]).astype(np.float64)
    return None if len(both) >= both.shape[1] else np.ascontiguousarray(np.linalg.qr(both.T)[0].T)


def _share(lam: float, task: float, guard: Any) -> Any:
    """Return λ of a direction with these variances, for one or many."""
    return lam * task / (lam * task + (1 - lam) * guard)


class InputStatistics:
    """A file of input statistics, read layer by layer.

    Args:
        path: The file, as `backmerge inputs` writes it; it is read once to check its digest.

    Attributes:
        provenance: Where the statistics come from.
        fingerprint: A hash of the file's bytes.

    Raises:
        CheckpointError: it is damaged, or is not such a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = SafetensorsFile(path)
        self._record = self._read_header()
        self.fingerprint = self._checked()
        self.provenance = self._record.provenance
        self._layer_of = {name: layer for layer, one in self._record.layers.items() for name in one.tensors}
        # checkpoints list k, o, q and v in this order: the inputs of k are wanted again after those of o
        self._read = functools.lru_cache(maxsize=2)(self._read_layer)

    def _read_header(self) -> StatisticsRecord:
        text = self._file.metadata.get(METADATA)
        if text is None:
            raise CheckpointError(
                f"{self.path} contains no input statistics",
                remedy="make it: backmerge inputs MODEL --guard NAME --out FILE.",
            )
        try:
            record = StatisticsRecord.model_validate_json(text)
        except ValidationError as error:
            raise CheckpointError(
                f"the header of {self.path} cannot be read: {error.errors()[0]['msg']}",
                remedy="it is damaged or of another version of backmerge: make it again with `backmerge inputs`.",
            ) from error
        wanted = {f"{layer}.{part}" for layer in record.layers for part in ("directions", "variances")}
        if wanted != self._file.infos.keys():
            raise CheckpointError(
                f"{self.path} does not contain the layers that its header names",
                remedy="it is damaged: make it again with `backmerge inputs`.",
            )
        return record

    def _checked(self) -> str:
        """Return a hash of the file's bytes, after comparing its content with the digest in its header."""
        whole, content = xxhash.xxh3_128(), xxhash.xxh3_128(self._file.metadata[METADATA].encode())
        end = self.path.stat().st_size
        start = min((info.offset for info in self._file.infos.values()), default=end)
        buffer = memoryview(bytearray(min(BLOCK, end)))
        for offset in range(0, end, BLOCK):
            block = buffer[: min(BLOCK, end - offset)]
            self._file.read_into(block, offset)
            whole.update(block)
            content.update(block[max(0, start - offset) :])
        if self._file.metadata.get(DIGEST) not in (None, content.hexdigest()):
            raise CheckpointError(
                f"{self.path} was changed after it was written: its content does not match its digest",
                remedy="it is damaged: make it again with `backmerge inputs`.",
            )
        return whole.hexdigest()

    @property
    def names(self) -> frozenset[str]:
        """Return the names on disk of the tensors with known inputs."""
        return frozenset(self._layer_of)

    def of(self, name: str) -> LayerInputs | None:
        """Return the inputs of a weight by its name on disk; `None` if they are unknown."""
        layer = self._layer_of.get(name)
        return None if layer is None else self._read(layer)

    def _read_layer(self, layer: str) -> LayerInputs:
        record = self._record.layers[layer]
        directions, variances = (self._array(f"{layer}.{part}") for part in ("directions", "variances"))
        return LayerInputs(directions, variances, record.rest, record.is_transposed)

    def _array(self, name: str) -> np.ndarray:
        info = self._file.infos[name]
        return self._file.float32_block(name, 0, info.num_elements).reshape(info.shape)

    def check_fits(self, base: Weights) -> None:
        """Refuse statistics of a model with another shape.

        Raises:
            CheckpointError: names the first tensor that does not fit.
        """
        for layer, record in self._record.layers.items():
            width = self._file.infos[f"{layer}.directions"].shape[1]
            for name in record.tensors:
                info = base.infos.get(name)
                if info is None or info.shape[0 if record.is_transposed else 1 :][:1] != (width,):
                    raise CheckpointError(
                        f"{self.path} has {width} inputs of '{name}', but {base.directory} "
                        f"{'has no such tensor' if info is None else f'has the shape {info.shape} there'}",
                        remedy="give statistics of this base: backmerge inputs BASE --guard NAME --out FILE.",
                    )


class GatheredLayer(NamedTuple):
    """The part of a file for one layer: its inputs, and the tensors that take them."""

    tensors: tuple[str, ...]
    inputs: LayerInputs


def write_statistics(
    path: Path, provenance: Provenance, layers: Mapping[str, GatheredLayer], *, replace: bool = True
) -> None:
    """Write a file of input statistics, whole or not at all; `layers` has their names in the file as keys.

    Raises:
        CheckpointError: it cannot be written, or another process made it meanwhile and it must not be replaced.
    """
    records = {
        name: LayerRecord(tensors=t, rest=i.rest, is_transposed=i.is_transposed) for name, (t, i) in layers.items()
    }
    record = StatisticsRecord(provenance=provenance, layers=records)
    arrays = {
        f"{name}.{part}": np.ascontiguousarray(values, dtype="<f4")
        for name, (_, inputs) in layers.items()
        for part, values in (("directions", inputs.directions), ("variances", inputs.variances))
    }
    infos = {name: TensorInfo(array.shape, "F32", path) for name, array in arrays.items()}
    text = record.model_dump_json()
    tensors = [array.reshape(-1).view(np.uint8).data for array in arrays.values()]
    digest = xxhash.xxh3_128(text.encode())
    for tensor in tensors:
        digest.update(tensor)
    header, _, _ = header_bytes(list(arrays), infos, {METADATA: text, DIGEST: digest.hexdigest()})
    content: list[bytes | memoryview] = [header, *tensors]
    try:
        if replace:
            write_whole(path, *content)
        elif not write_once(path, *content):
            raise CheckpointError(
                f"{path} was written by another command while this one was running, and is kept",
                remedy="give another --out.",
            )
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error}", remedy=remedy_for(error) or "give another --out."
        ) from error
