"""What is compared with mergekit: one row for each method that both have, and the reason where the two differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = (0.7, 0.5, 0.3)  # of the tuned models, where each has one; their sum is not 1
DENSITY = 0.4
GAMMA = 0.05
LAM = 0.6
# float32 results differ by the order of the operations: a rounding each, of values as large as the operands
PLAIN = 4
# what is divided or multiplied by sums over whole tensors has their rounding too: mergekit sums in float32
SUMMED = 32
FUSION_DIGITS = 1e-3


@dataclass(frozen=True)
class Row:
    """One method with one setting, as both tools take it.

    Attributes:
        method: The name, the same in both.
        num_tuned: How many tuned models.
        lam: Ours.
        ours: Our other parameters.
        theirs: mergekit's parameters of the whole merge.
        theirs_each: mergekit's parameters of each tuned model.
        theirs_base: mergekit's parameters of the base as one of the models; `None` where it is not among them.
        relation: Whether the two are to be the same.
        reason: Why not, or what makes the settings equal.
        undecided: Given base and tuned tensor, the elements that rounding or the order of equals decides, such as those
            whose place in an order is shared with others across an edge of what is kept. They are counted apart.
        float32_ulps: How far float32 results may be apart, in ulps of the largest operand.
    """

    method: str
    num_tuned: int = 1
    lam: float = LAM
    ours: Mapping[str, Any] = field(default_factory=dict)
    theirs: Mapping[str, Any] = field(default_factory=dict)
    theirs_each: Sequence[Mapping[str, Any]] = ()
    theirs_base: Mapping[str, Any] | None = None
    relation: Literal["same", "differs"] = "same"
    reason: str = ""
    undecided: Callable[[Tensor, Tensor], Tensor] | None = None
    float32_ulps: int = PLAIN

    def configuration(self, base: str, tuned: Sequence[str], dtype: str) -> dict[str, Any]:
        """mergekit's, for these folders; float32 inside, as ours."""
        each = self.theirs_each or [{}] * len(tuned)
        models = [{"model": m, "parameters": dict(p)} for m, p in zip(tuned, each, strict=True)]
        if self.theirs_base is not None:
            models.insert(0, {"model": base, "parameters": dict(self.theirs_base)})
        return {
            "merge_method": self.method,
            "base_model": base,
            "models": models,
            "parameters": dict(self.theirs),
            "dtype": "float32",
            "out_dtype": dtype,
        }


def _shares(edges: Callable[[int], Sequence[int]]) -> Callable[[Tensor, Tensor], Tensor]:
    """Marks the magnitudes of a delta on both sides of an edge in ascending order: mergekit's unstable sort keeps some.

    Args:
        edges: From the number of elements to the places at which what is kept begins or ends.
    """

    def undecided(base: Tensor, tuned: Tensor) -> Tensor:
        import torch

        magnitudes = (tuned - base).abs()
        ordered = magnitudes.flatten().sort().values
        marked = torch.zeros_like(magnitudes, dtype=torch.bool)
        for edge in edges(magnitudes.numel()):
            if 0 < edge < magnitudes.numel() and ordered[edge - 1] == ordered[edge]:
                marked |= magnitudes == ordered[edge]
        return marked

    return undecided


def _near_the_threshold(base: Tensor, tuned: Tensor) -> Tensor:
    """Marks what float32 may take for important or not: mergekit's divergence has about three digits here."""
    from backmerge.merging.methods.arcee_fusion import importance, threshold

    columns = base.shape[-1]
    important = importance(base.reshape(-1, columns), tuned.reshape(-1, columns)).reshape(base.shape)
    edge = threshold(important)
    return (important - edge).abs() <= FUSION_DIGITS * edge


def _ties_edges(count: int) -> Sequence[int]:
    return [count - max(1, int(DENSITY * count))]


def _breadcrumbs_edges(count: int) -> Sequence[int]:
    kept = int(DENSITY * count)
    least = max(0, count - kept - int(GAMMA * count))
    return [least, least + kept]


def _each(**parameters: float) -> list[dict[str, float]]:
    return [{"weight": weight, **parameters} for weight in WEIGHTS]


PAIR = [{"weight": weight} for weight in WEIGHTS[:2]]
DARE = (
    "mergekit rescales what it keeps to the L1 norm of the delta, ours by 1/(1 - drop) as the paper does; and its "
    "masks depend on the order of execution"
)
DELLA = (
    "mergekit rescales what it keeps to the L1 norm of the delta, ours by 1/probability as the paper does; masks differ"
)

ROWS = (
    Row("linear", theirs_each=[{"weight": LAM}], theirs_base={"weight": 1 - LAM}),
    Row("slerp", theirs={"t": LAM}, theirs_base={}, float32_ulps=SUMMED),
    Row("nearswap", lam=1.0, ours={"t": 0.02}, theirs={"t": 0.02}, reason="no λ"),
    Row("arcee_fusion", lam=1.0, undecided=_near_the_threshold, reason="no λ; ours is decided in float64"),
    Row("model_stock", num_tuned=3, lam=1.0, float32_ulps=SUMMED, reason="no λ"),
    Row(
        "task_arithmetic",
        num_tuned=3,
        ours={"weight": list(WEIGHTS)},
        theirs={"lambda": LAM, "normalize": False},
        theirs_each=_each(),
        reason="λ is mergekit's lambda",
    ),
    Row(
        "ties",
        num_tuned=3,
        ours={"weight": list(WEIGHTS), "density": DENSITY},
        theirs={"lambda": LAM, "normalize": True},
        theirs_each=_each(density=DENSITY),
        undecided=_shares(_ties_edges),
    ),
    Row(
        "breadcrumbs",
        num_tuned=3,
        ours={"weight": list(WEIGHTS), "density": DENSITY, "gamma": GAMMA},
        theirs={"lambda": LAM, "normalize": False},
        theirs_each=_each(density=DENSITY, gamma=GAMMA),
        undecided=_shares(_breadcrumbs_edges),
    ),
    Row(
        "breadcrumbs_ties",
        num_tuned=3,
        ours={"weight": list(WEIGHTS), "density": DENSITY, "gamma": GAMMA},
        theirs={"lambda": LAM, "normalize": False},
        theirs_each=_each(density=DENSITY, gamma=GAMMA),
        undecided=_shares(_breadcrumbs_edges),
    ),
    Row(
        "nuslerp",
        num_tuned=2,
        lam=1.0,
        ours={"weight": list(WEIGHTS[:2])},
        theirs_each=PAIR,
        float32_ulps=SUMMED,
        reason="mergekit has no λ: the whole of the delta",
    ),
    Row(
        "multislerp",
        num_tuned=3,
        lam=1.0,
        ours={"weight": list(WEIGHTS)},
        theirs_each=_each(),
        float32_ulps=SUMMED,
        reason="mergekit has no λ: the whole of the delta",
    ),
    Row(
        "karcher",
        num_tuned=3,
        lam=0.75,
        theirs={"max_iter": 10, "tol": 1e-5},
        theirs_base={},
        float32_ulps=SUMMED,
        reason="λ = N/(N + 1) is mergekit's uniform mean with the base as one of the models",
    ),
    Row(
        "dare_linear",
        ours={"drop": 0.0},
        theirs_each=[{"weight": LAM, "density": 1.0}],
        reason="nothing dropped: Linear",
    ),
    Row(
        "dare_linear",
        ours={"drop": 0.5},
        theirs_each=[{"weight": LAM, "density": 0.5}],
        relation="differs",
        reason=DARE,
    ),
    Row(
        "dare_ties",
        num_tuned=3,
        ours={"weight": list(WEIGHTS), "drop": 0.0},
        theirs={"lambda": LAM, "normalize": False},
        theirs_each=_each(density=1.0),
        reason="nothing dropped: the election of signs alone",
    ),
    Row(
        "dare_ties",
        num_tuned=3,
        ours={"weight": list(WEIGHTS), "drop": 0.5},
        theirs={"lambda": LAM, "normalize": False},
        theirs_each=_each(density=0.5),
        relation="differs",
        reason=DARE,
    ),
    Row(
        "della",
        num_tuned=3,
        ours={"weight": list(WEIGHTS), "density": DENSITY, "epsilon": 0.1},
        theirs={"lambda": LAM, "normalize": True},
        theirs_each=_each(density=DENSITY, epsilon=0.1),
        relation="differs",
        reason=DELLA,
    ),
    Row(
        "della_linear",
        num_tuned=3,
        ours={"weight": list(WEIGHTS), "density": DENSITY, "epsilon": 0.1},
        theirs={"lambda": LAM, "normalize": False},
        theirs_each=_each(density=DENSITY, epsilon=0.1),
        relation="differs",
        reason=DELLA,
    ),
)
