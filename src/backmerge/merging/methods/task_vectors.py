"""The methods that sparsify each model's delta and add up the rest: a table of sparsifier × consensus.

A sparsifier decides which elements of a delta are kept; a consensus combines several deltas into one
(`merging/consensus.py`). Each row of the table makes a method of the two, with the parameters of both. `dare_linear` is
not a row: it takes one tuned model, and works on 16-bit tensors as they are stored.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from backmerge.errors import MergeError
from backmerge.merging.consensus import (
    NO_WEIGHT,
    check_share,
    count_lower,
    count_upper,
    elected,
    for_each,
    shifted,
    summed,
    thresholds,
    where,
)
from backmerge.merging.method import Method, data_of, merge_method
from backmerge.merging.methods.linear import interpolated

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from backmerge.merging.method import Cut, Reduction
    from backmerge.merging.randomness import TensorRandom

ANY_SHAPE, ROWS = "Any shape.", "Shape (rows, columns); a vector is one row."
MASKS = "Draws the masks, a stream for each tuned model."
COUNTS = "Counts of magnitudes over the whole tensor."


class Sparsifier(NamedTuple):
    """A rule for the elements of a delta that are kept.

    Attributes:
        function: `f(delta, number, ..., /, *, parameters) -> Tensor`, for the delta of one tuned model, which may be
            overwritten, and the model's number. Then follow the data that methods may take (see `merging/method.py`).
        about: A description of each of its data and parameters, for the documentation.
        raises: When it raises a `MergeError`, for the documentation.
        cut: See `Method`.
        reductions: See `Method`.
    """

    function: Callable[..., Tensor]
    about: Mapping[str, str] = {}
    raises: str = ""
    cut: Cut = "elements"
    reductions: tuple[Reduction, ...] = ()


def whole(delta: Tensor, number: int, /) -> Tensor:  # noqa: ARG001 - the signature of sparsifiers
    """Keep all of the delta."""
    return delta


def ranks_of_largest(count: int, *, density: float = 0.2) -> list[int]:
    """Return the rank of the smallest magnitude that is kept, ascending from 0, of `count` elements."""
    check_share("density", density)
    return [count - min(count, max(1, int(density * count)))]


def largest(delta: Tensor, number: int, statistics: Sequence[np.ndarray], /, *, density: float = 0.2) -> Tensor:
    """Keep the `density` largest elements, at least one; by default the largest fifth, as in the paper of TIES."""
    if density <= 0:
        return delta.zero_()
    if density >= 1:
        return delta
    count = int(statistics[0][number].sum())
    (least,) = thresholds(statistics, number, ranks_of_largest(count, density=density))
    return delta.mul_(delta.abs() >= least)


def ranks_of_middle(count: int, *, density: float = 0.9, gamma: float = 0.01) -> list[int]:
    """Return the ranks of the smallest and largest magnitude kept, ascending from 0, of `count` elements."""
    check_share("density", density)
    check_share("gamma", gamma)
    num_kept, num_top = int(density * count), int(gamma * count)
    # fewer outliers are dropped if otherwise too little would be kept
    num_bottom = max(0, count - num_kept - num_top)
    return [min(num_bottom, count - 1), max(0, min(num_bottom + num_kept, count) - 1)]


def middle(
    delta: Tensor, number: int, statistics: Sequence[np.ndarray], /, *, density: float = 0.9, gamma: float = 0.01
) -> Tensor:
    """Drop the `gamma` largest elements, and as many of the smallest ones as leave `density` of the delta."""
    count = int(statistics[0][number].sum())
    if int(density * count) == 0:
        return delta.zero_()
    if density >= 1:
        return delta
    least, most = thresholds(statistics, number, ranks_of_middle(count, density=density, gamma=gamma))
    size = delta.abs()
    return delta.mul_((size >= least) & (size <= most))


def thinned(delta: Tensor, number: int, rng: TensorRandom, /, *, drop: float = 0.5) -> Tensor:
    """DARE: keep each element with probability 1 - drop, and divide it by that."""
    check_drop(drop)
    return delta.mul_(rng.keeps(delta, 1 - drop, stream=number)).div_(1 - drop)


def check_drop(drop: float) -> None:
    """Refuse a value that is not a probability, or keeps nothing.

    Raises:
        MergeError: `drop` is outside [0, 1).
    """
    if not 0 <= drop < 1:
        raise MergeError(
            f"drop is {drop}, and must be in [0, 1): kept elements are divided by 1 - drop",
            remedy="for example drop=0.5.",
        )


def pruned(delta: Tensor, number: int, rng: TensorRandom, /, *, density: float = 0.5, epsilon: float = 0.15) -> Tensor:
    """MAGPRUNE: keep each element with a probability that rises with its rank in its row, and divide it by that.

    The smallest of a row is kept with probability density - epsilon, the largest with density + epsilon.
    """
    import torch

    if density >= 1:
        return delta
    low, high = density - epsilon, density + epsilon
    if not 0 < low <= high < 1:
        raise MergeError(
            f"density {density} and epsilon {epsilon}: the probabilities to keep go from density - epsilon to "
            "density + epsilon, and must lie in (0, 1)",
            remedy="give a smaller epsilon.",
        )
    columns = delta.shape[-1]
    order = delta.abs().argsort(dim=-1, stable=True)
    rising = torch.linspace(low, high, columns, dtype=delta.dtype, device=delta.device)
    if columns == 1:
        rising.fill_(density)
    keep = torch.empty_like(delta).scatter_(-1, order, rising.expand_as(delta))
    return delta.mul_(rng.uniform(delta, stream=number) < keep).div_(keep)


WHOLE = Sparsifier(
    whole,
    {"lam": "Scale of the sum, 0 or more; with one tuned model of weight 1, the share of the tuned side."},
)
LARGEST = Sparsifier(
    largest,
    {"statistics": COUNTS, "density": "Share of each delta that is kept, in [0, 1]."},
    "`density` is outside [0, 1]",
    reductions=(count_upper, count_lower(ranks_of_largest)),
)
MIDDLE = Sparsifier(
    middle,
    {**LARGEST.about, "gamma": "Share of each delta that is dropped as outliers, in [0, 1]."},
    "`density` or `gamma` is outside [0, 1]",
    reductions=(count_upper, count_lower(ranks_of_middle)),
)
THINNED = Sparsifier(
    thinned,
    {"rng": MASKS, "drop": "Probability of dropping an element of each delta, in [0, 1)."},
    "`drop` is outside [0, 1)",
)
PRUNED = Sparsifier(
    pruned,
    {
        "base": ROWS,
        "rng": MASKS,
        "density": "Mean probability to keep an element, in (0, 1); 1 or more keeps all.",
        "epsilon": "Half the range of probabilities.",
    },
    "density ± epsilon leaves (0, 1)",
    cut="rows",
)


def _method(
    name: str,
    sparsifier: Sparsifier,
    consensus: Callable[..., Tensor],
    text: str,
    *,
    source: str,
    normalize: bool = False,
    coefficients: Callable[..., Sequence[float]] | None = None,
) -> Method:
    """Make a method of a sparsifier and a consensus: base + consensus of what is left of the deltas.

    Args:
        name: The method's name.
        sparsifier: Each of its parameters becomes one of the method, with a value for each tuned model.
        consensus: `summed` or `elected`.
        text: The docstring's first part.
        source: The docstring's last part.
        normalize: The default of that parameter.
        coefficients: See `Method`.
    """
    # the first two are the delta and its model's number
    extra_data = data_of(sparsifier.function)[2:]
    taken = inspect.signature(sparsifier.function).parameters
    defaults = {key: one.default for key, one in taken.items() if one.kind is one.KEYWORD_ONLY}

    def function(
        base: Tensor,
        tuned: Sequence[Tensor],
        *data: Any,
        lam: float = 1.0,
        weight: Sequence[float] = (1.0,),
        normalize: bool = normalize,
        **given: Sequence[float],
    ) -> Tensor:
        weights = for_each(weight, len(tuned))
        own = {key: for_each(given.get(key, (default,)), len(tuned)) for key, default in defaults.items()}
        # one after the other: a sum needs only one of them in memory
        deltas = (
            sparsifier.function(model - base, number, *data, **{key: each[number] for key, each in own.items()})
            for number, model in enumerate(tuned)
        )
        return shifted(base, consensus(deltas, weights, lam=lam, normalize=normalize))

    parameters = [
        inspect.Parameter("base", inspect.Parameter.POSITIONAL_ONLY, annotation="Tensor"),
        inspect.Parameter("tuned", inspect.Parameter.POSITIONAL_ONLY, annotation="Sequence[Tensor]"),
        *(taken[key] for key in extra_data),
        inspect.Parameter("lam", inspect.Parameter.KEYWORD_ONLY, default=1.0, annotation="float"),
        inspect.Parameter("weight", inspect.Parameter.KEYWORD_ONLY, default=(1.0,), annotation="Sequence[float]"),
        *(taken[key].replace(default=(value,), annotation="Sequence[float]") for key, value in defaults.items()),
        inspect.Parameter("normalize", inspect.Parameter.KEYWORD_ONLY, default=normalize, annotation="bool"),
    ]
    about = {
        "base": ANY_SHAPE,
        "tuned": "One model or more, of the same shape.",
        "lam": "Scale of the merged delta, 0 or more.",
        "weight": "Weight of each tuned model.",
        "normalize": f"Divide by the sum of the weights{' that agree' if consensus is elected else ''}.",
    } | dict(sparsifier.about)
    described = "".join(f"\n    {one.name}: {about[one.name]}" for one in parameters)
    raises = f"Raises:\n    MergeError: {sparsifier.raises}.\n\n" if sparsifier.raises else ""
    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"{textwrap.dedent(text).strip()}\n\nArgs:{described}\n\n{raises}Source: {source}"
    function.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": "Tensor"}
    function.__signature__ = inspect.Signature(parameters, return_annotation="Tensor")  # type: ignore[attr-defined]
    return merge_method(
        has_exact_endpoints=False,
        is_idempotent=True,
        cut=sparsifier.cut,
        reductions=sparsifier.reductions,
        num_tuned=(1, None),
        coefficients=coefficients,
        max_lam=math.inf,
    )(function)


def coefficients(
    gram: np.ndarray, /, *, lam: float = 1.0, weight: Sequence[float] = (1.0,), normalize: bool = False
) -> list[float]:
    """Return lam·wᵢ for each delta, divided by Σ wᵢ if `normalize` is set."""
    weights = for_each(weight, len(gram))
    divisor = sum(weights) if normalize and abs(sum(weights)) >= NO_WEIGHT else 1.0
    return [lam * one / divisor for one in weights]


task_arithmetic = _method(
    "task_arithmetic",
    WHOLE,
    summed,
    "Base + lam · Σ wᵢ·(tunedᵢ - base).",
    source="Ilharco et al., Editing models with task arithmetic (arXiv 2212.04089), section 2.",
    coefficients=coefficients,
)

ties = _method(
    "ties",
    LARGEST,
    elected,
    """
    Base + lam · disjoint mean of trimmed wᵢ·(tunedᵢ - base).

    The `density` largest elements of each delta are kept, tensor by tensor (the paper trims the whole model at once).
    Then for each element the sign of the weighted sum is elected, and the deltas with that sign are averaged. Elements
    that tie with the smallest one kept are all kept, while mergekit picks some of them.
    """,
    source="Yadav et al., TIES-Merging (arXiv 2306.01708), section 3; `weight` as in mergekit.",
    normalize=True,
)

dare_ties = _method(
    "dare_ties",
    THINNED,
    elected,
    """
    Base + lam · Σ of those wᵢ·mᵢ∘(tunedᵢ - base)/(1 - dropᵢ) whose sign is elected.

    mᵢ keeps each element with probability 1 - dropᵢ, and the elements that are kept are rescaled by 1/(1 - dropᵢ) as in
    the paper; mergekit rescales to the delta's L1 norm instead.
    """,
    source="Yu et al. (arXiv 2311.03099), equation 2; election of Yadav et al. (arXiv 2306.01708), section 3.",
)

della = _method(
    "della",
    PRUNED,
    elected,
    "Base + lam · mean of those wᵢ·m∘(tunedᵢ - base)/p whose sign is elected, p the probability that m keeps one.",
    source="Deep et al., DELLA-Merging (arXiv 2406.11617).",
    normalize=True,
)

della_linear = _method(
    "della_linear",
    PRUNED,
    summed,
    """
    Base + lam · Σ wᵢ·m∘(tunedᵢ - base)/p, p the probability that m keeps an element.

    p rises over the ranks of a row, from density - epsilon to density + epsilon. Each element that is kept is divided
    by its own probability, as in the paper, so that the mean over masks is task arithmetic; mergekit rescales to the L1
    norm.
    """,
    source="Deep et al., DELLA-Merging (arXiv 2406.11617), MAGPRUNE.",
)

breadcrumbs = _method(
    "breadcrumbs",
    MIDDLE,
    summed,
    """
    Base + lam · Σ wᵢ·masked(tunedᵢ - base).

    The `gamma` largest elements of each delta are dropped, and then as many of the smallest as leave `density` of it,
    tensor by tensor. Elements that tie with the last one kept, at either end, are all kept, while mergekit picks some
    of them.
    """,
    source="Davari and Belilovsky, Model Breadcrumbs (arXiv 2312.06795), section 3; defaults as mergekit recommends.",
)

breadcrumbs_ties = _method(
    "breadcrumbs_ties",
    MIDDLE,
    elected,
    "Base + lam · Σ of those wᵢ·masked(tunedᵢ - base) whose sign is elected.",
    source="masks of Davari and Belilovsky (arXiv 2312.06795), election of Yadav et al. (arXiv 2306.01708); "
    "mergekit's\n`breadcrumbs_ties`.",
)


@merge_method(has_exact_endpoints=False, is_idempotent=True, is_native=True)
def dare_linear(base: Tensor, tuned: Tensor, rng: TensorRandom, /, *, lam: float, drop: float = 0.5) -> Tensor:
    """Base + lam · m ∘ (tuned - base) / (1 - drop), m keeping each element with probability 1 - drop.

    λ=0 is the base bit for bit; λ=1 is the tuned model in expectation. mergekit rescales to the L1 norm of the delta
    instead, and draws masks whose order depends on the execution; ours follows the paper, and a mask is a function of
    seed, tensor and position.

    Args:
        base: Any shape.
        tuned: Same shape.
        rng: Draws the mask.
        lam: Share of the tuned side, in [0, 1].
        drop: Probability of dropping an element of the delta, in [0, 1).

    Raises:
        MergeError: `drop` is outside [0, 1).

    Source: Yu et al., Language Models are Super Mario (arXiv 2311.03099), equation 2.
    """
    check_drop(drop)
    if lam == 0:
        return base
    share = lam / (1 - drop)
    moved = interpolated(base, tuned, share)
    return where(rng.keeps(base, 1 - drop), moved, base)
