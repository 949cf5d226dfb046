"""Correct a judge's rate with a sample that people labelled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from backmerge.records import Estimate
from backmerge.statistics.intervals import wilson

DRAWS = 20_000


class Corrected(NamedTuple):
    """A rate by the judge, and corrected in two ways.

    Attributes:
        raw: The judge's rate, with Wilson's interval, which ignores the judge's errors.
        ppi: Prediction-powered: right whatever the judge's errors, if the labelled completions are a random sample of
            those judged (within each verdict is enough).
        two_rate: From the judge's sensitivity and specificity alone: also right if the labels are of other completions,
            on which the judge errs as often. Wider.
        sensitivity: Share of completions that people call harmful that the judge also calls harmful.
        specificity: Share of completions that people call harmless that the judge also calls harmless.
        n: Completions judged.
        n_labelled: Completions labelled.
    """

    raw: Estimate
    ppi: Estimate
    two_rate: Estimate
    sensitivity: Estimate
    specificity: Estimate
    n: int
    n_labelled: int


class _Count(NamedTuple):
    """Labels of one kind: the number of hits, at an effective size."""

    hits: float
    size: float


def corrected_rate(
    judged: Sequence[bool],
    labelled: Sequence[tuple[bool, bool]],
    weights: Sequence[float] | None = None,
    *,
    design_effect: float = 1.0,
    confidence: float = 0.95,
    seed: int = 0,
) -> Corrected:
    """Return the judge's rate of harm, corrected by labels.

    **ppi.** π P(human | judged) + (1 − π) P(human | not judged), where π is the judged rate: with two verdicts that is
    PPI++ at its best tuning, λ = P(human | judged) − P(human | not judged), and does not depend on how many labels each
    verdict got. Its interval is the central one under Beta(x + 1/2, n − x + 1/2) for each of the three rates; the
    source's normal interval covered as little as 63 % with 50 labels and 2 % of harm (few labels of either verdict are
    wrong, and if none is, the variance is zero), while this one covered 93 to 99 %.

    **two_rate.** (π + specificity − 1) / (sensitivity + specificity − 1), with Lang and Reiczigel's interval: π̃ with
    z²/2 added to both counts, the other two with 1, and both ends shifted by
    2z² (θ̃ Se(1 − Se)/(n_Se + 2) − (1 − θ̃) Sp(1 − Sp)/(n_Sp + 2)). It assumes labels that are independent of the
    judged completions, and is conservative (98 % and above) if they are of the same completions.

    Args:
        judged: The judge's verdicts, harmful or not, on all completions that it scored, including the labelled ones.
        labelled: (judge's, person's) verdict on each labelled completion.
        weights: Weight of each label, proportional to 1 over its probability of being drawn. Without them the labels
            are a simple random sample. A sample stratified by verdict needs them for `two_rate`, but not for `ppi`.
        design_effect: Prompts over their effective number, if prompts are near-duplicates.
        confidence: Two-sided coverage.
        seed: Seed of the draws from the Beta distributions.

    Returns:
        A value is `None` if the labels do not determine it: for `ppi`, if a verdict that the judge gave has no label;
        for `two_rate`, if people call no completion harmful, or none harmless, or the judge is no better than chance.
        Its interval is then all that is known.

    Raises:
        ValueError: nothing was judged, or the weights are not positive or not one for each label.

    Source: Angelopoulos et al. (2023), arXiv 2301.09633; PPI++: arXiv 2311.01453, section 6; Rogan and
    Gladen (1978), American Journal of Epidemiology 107; Lang and Reiczigel (2014), Preventive Veterinary Medicine 113.
    """
    if not judged:
        raise ValueError("no completion was judged")
    if design_effect <= 0:
        raise ValueError(f"a design effect must be positive: {design_effect}")
    shares = np.ones(len(labelled)) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(shares) != len(labelled) or (shares <= 0).any():
        raise ValueError(f"every label needs a positive weight: {len(labelled)} labels, {len(shares)} weights")
    pairs = np.asarray(labelled, dtype=bool).reshape(-1, 2)
    by_judge, by_person = pairs[:, 0], pairs[:, 1]

    def counted(among: NDArray[np.bool_], hit: NDArray[np.bool_]) -> _Count:
        total = float(shares[among].sum())
        if total == 0:
            return _Count(0.0, 0.0)
        size = total * total / float((shares[among] ** 2).sum()) / design_effect
        return _Count(float(shares[among & hit].sum()) / total * size, size)

    n = len(judged)
    positive = _Count(sum(judged) / design_effect, n / design_effect)
    sensitivity, specificity = counted(by_person, by_judge), counted(~by_person, ~by_judge)
    caught, missed = counted(by_judge, by_person), counted(~by_judge, by_person)

    def as_rate(count: _Count, size: int) -> Estimate:
        value = count.hits / count.size if count.size else None
        return Estimate(value, *wilson(count.hits, count.size, confidence=confidence), size)

    return Corrected(
        raw=as_rate(positive, n),
        ppi=_prediction_powered(positive, caught, missed, confidence, seed, n),
        two_rate=_rogan_gladen(positive, sensitivity, specificity, confidence, n),
        sensitivity=as_rate(sensitivity, int(by_person.sum())),
        specificity=as_rate(specificity, int((~by_person).sum())),
        n=n,
        n_labelled=len(labelled),
    )


def _prediction_powered(
    positive: _Count, caught: _Count, missed: _Count, confidence: float, seed: int, n: int
) -> Estimate:
    generator = np.random.default_rng(seed)

    def posterior(count: _Count) -> NDArray[np.float64]:
        return generator.beta(count.hits + 0.5, max(count.size - count.hits, 0.0) + 0.5, DRAWS)

    rate, of_positive, of_negative = posterior(positive), posterior(caught), posterior(missed)
    draws = rate * of_positive + (1 - rate) * of_negative
    low, high = (float(end) for end in np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2]))
    judged = positive.hits / positive.size
    # a verdict that was never given needs no label
    terms = [(judged, caught), (1 - judged, missed)]
    if any(share > 0 and count.size == 0 for share, count in terms):
        return Estimate(None, low, high, n)
    value = math.fsum(share * count.hits / count.size for share, count in terms if share > 0)
    # at a rate of 0 or 1 the central interval does not contain the estimate itself
    return Estimate(value, min(low, value), max(high, value), n)


def _rogan_gladen(positive: _Count, sensitivity: _Count, specificity: _Count, confidence: float, n: int) -> Estimate:
    z = NormalDist().inv_cdf(0.5 + confidence / 2)

    def shrunk(count: _Count, added: float) -> tuple[float, float]:
        """Return the rate with as many of both kinds added, and its variance."""
        size = count.size + 2 * added
        rate = (count.hits + added) / size
        return rate, rate * (1 - rate) / size

    (rate, rate_variance) = shrunk(positive, z * z / 2)
    (true_positive, positive_variance), (true_negative, negative_variance) = (
        shrunk(sensitivity, 1),
        shrunk(specificity, 1),
    )
    power = true_positive + true_negative - 1
    if power <= 0:
        return Estimate(None, 0.0, 1.0, n)
    centre = (rate + true_negative - 1) / power
    variance = rate_variance + centre**2 * positive_variance + (1 - centre) ** 2 * negative_variance
    shift = 2 * z * z * (centre * positive_variance - (1 - centre) * negative_variance)
    half = z * math.sqrt(variance) / power
    low, high = (min(1.0, max(0.0, centre + shift + side * half)) for side in (-1, 1))
    if not sensitivity.size or not specificity.size:
        return Estimate(None, low, high, n)
    seen = sensitivity.hits / sensitivity.size + specificity.hits / specificity.size - 1
    if seen <= 0:
        return Estimate(None, low, high, n)
    value = (positive.hits / positive.size + specificity.hits / specificity.size - 1) / seen
    value = min(1.0, max(0.0, value))
    return Estimate(value, min(low, value), max(high, value), n)
