"""The algebra of low-rank sums on their factors alone: inner products, concatenation, a lower rank; in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.lora import Factors


class Recompression(NamedTuple):
    """The loss by recompression to a lower rank: ‖lost‖ / ‖change‖, Frobenius norms, in [0, 1].

    Attributes:
        share: Loss over all modules.
        worst_share: Loss in the module where it is largest.
        worst_module: Name of that module.
    """

    share: float
    worst_share: float
    worst_module: str


class Part(NamedTuple):
    """One tuned model's share in a module: its number among the models, the model, its factors' names and scale."""

    number: int
    adapter: AdapterOnBase
    factors: Factors


def scaled(b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Multiply columns in float64 and round once: a scale that is no power of two costs half a step of float32."""
    with np.errstate(over="ignore"):  # values that are not finite are refused when they are encoded
        result: np.ndarray = np.multiply(b, weight, out=np.empty_like(b), dtype=np.float64, casting="same_kind")
    return result


class Stack(NamedTuple):
    """All factors of a module, side by side, as they were trained.

    Attributes:
        a: Shape (ranks, in).
        b: Shape (out, ranks).
        scales: The scale of each rank.
        numbers: The tuned model of each rank.
        products: Inner products of the ranks' deltas sᵢ·bᵢ·aᵢ, before scaling by coefficients; float64, (ranks, ranks).
    """

    a: np.ndarray
    b: np.ndarray
    scales: np.ndarray
    numbers: np.ndarray
    products: np.ndarray

    @classmethod
    def read(cls, parts: Sequence[Part]) -> Stack:
        """Read the factors of the parts, in their order."""
        pairs = [(_factor(part, part.factors.a), _factor(part, part.factors.b)) for part in parts]
        ranks = [len(a) for a, _ in pairs]
        a = pairs[0][0] if len(pairs) == 1 else np.concatenate([a for a, _ in pairs])
        b = pairs[0][1] if len(pairs) == 1 else np.concatenate([b for _, b in pairs], axis=1)
        scales = np.repeat([part.factors.scale for part in parts], ranks)
        return cls(a, b, scales, np.repeat([part.number for part in parts], ranks), _products(a, b))

    def with_a(self, a: np.ndarray) -> Stack:
        """Return the same stack with other A factors of the same shape."""
        return self._replace(a=a, products=_products(a, self.b))

    def gram(self, num_tuned: int) -> np.ndarray:
        """Return the inner products of the tuned models' deltas; zero if a model does not change the module."""
        gram = np.zeros((num_tuned, num_tuned))
        places = (self.numbers[:, None], self.numbers[None, :])
        with np.errstate(invalid="ignore"):
            np.add.at(gram, places, self.products * np.outer(self.scales, self.scales))
        return gram

    def spread(self, shares: np.ndarray) -> np.ndarray:
        """Return the factor of each rank's b·a, from the tuned models' shares."""
        weight: np.ndarray = self.scales * shares[self.numbers]
        return weight


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):  # NaN is reported by the tensor's name
        products: np.ndarray = (wide_b.T @ wide_b) * (wide_a @ wide_a.T)
    return products


def _factor(part: Part, name: str) -> np.ndarray:
    info = part.adapter.file.infos[name]
    return part.adapter.file.float32_block(name, 0, info.num_elements).reshape(info.shape)


class Core:
    """The factors of a module without their orthonormal bases: a small core with the singular values of B·A.

    Args:
        stack: The factors.
    """

    def __init__(self, stack: Stack) -> None:
        self._base_b, self._rest_b = np.linalg.qr(stack.b.astype(np.float64))
        self._base_a, self._rest_a = np.linalg.qr(stack.a.T.astype(np.float64))

    def cut(self, weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the nearest factors of a lower rank.

        Args:
            weight: Factor of each rank's b·a.
            rank: The rank to keep.

        Returns:
            A (rank, in) and B (out, rank), with fewer ranks if the module has no more; and the squares of all singular
            values.

        Source: Eckart and Young (1936); the core as in the second half of any randomised SVD.
        """
        left, values, right = np.linalg.svd((self._rest_b * weight) @ self._rest_a.T)
        low_a = right[:rank] @ self._base_a.T
        low_b = self._base_b @ (left[:, : len(low_a)] * values[:rank])
        return low_a, low_b, values**2


class Losses:
    """The loss by recompression of one variant, gathered by module."""

    def __init__(self) -> None:
        self._lost = self._whole = 0.0
        self._worst = (0.0, "")

    def add(self, module: str, whole: float, lost: float) -> None:
        """Add a module's squared Frobenius norms: of the change, and of the part of it that was lost."""
        self._whole += whole
        self._lost += lost
        self._worst = max(self._worst, (math.sqrt(lost / whole) if lost else 0.0, module))

    @property
    def summary(self) -> Recompression:
        """Return the shares that were lost."""
        return Recompression(math.sqrt(self._lost / self._whole) if self._lost else 0.0, *self._worst)
