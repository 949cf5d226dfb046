"""A recipe: which models are merged, how, and at which λ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from backmerge.checkpoints.reader import Checkpoint, Weights


@dataclass(frozen=True)
class Variant:
    """A point in weight space: the base itself, or the base and a tuned model merged.

    Attributes:
        base: The base's weights.
        tuned: The tuned model's weights, a checkpoint or an adapter on the base; `None` for the base itself.
        method: A name from the table of methods.
        lam: λ, the share of the tuned side.
        parameters: The method's other parameters.
        seed: For methods that draw random numbers.
    """

    base: Checkpoint
    tuned: Weights | None = None
    method: str = "linear"
    lam: float = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the weights, as plain data: equal identities are equal models."""
        if self.tuned is None:
            return {"base": self.base.fingerprint}
        return {
            "base": self.base.fingerprint,
            "tuned": self.tuned.fingerprint,
            "method": self.method,
            "lam": self.lam,
            "parameters": dict(self.parameters),
            "seed": self.seed,
        }
