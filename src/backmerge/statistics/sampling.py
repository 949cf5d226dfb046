"""Several answers to each prompt: pass@k, and attack success where any of k answers counts."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from backmerge.statistics.bootstrap import Mean, bootstrap_mean
from backmerge.statistics.intervals import Rate, rate_of


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """1 − C(n − c, k) / C(n, k): the chance that k of n answers, drawn without replacement, hold a right one.

    Args:
        num_samples: n answers.
        num_correct: c of them that are right.
        k: In [1, n].

    Raises:
        ValueError: k is not in [1, n], or c not in [0, n].

    Source: Chen et al. (2021), arXiv 2107.03374, equation 1.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs {k} samples at least, and k one: there are {num_samples}")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"{num_correct} of {num_samples} samples cannot be right")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean_pass_at_k(
    num_samples: Sequence[int],
    num_correct: Sequence[int],
    k: int,
    clusters: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> Mean:
    """pass@k over problems, with the bootstrap interval over problems.

    Args:
        num_samples: Answers to each problem.
        num_correct: How many of them are right.
        k: At most the fewest answers to any problem.
        clusters: Each problem's cluster of near-duplicates; all apart if not given.
        seed: Of the resampling.

    Raises:
        ValueError: there is no problem, the counts differ in length, or k is above a problem's number of samples.
    """
    values = [pass_at_k(n, c, k) for n, c in zip(num_samples, num_correct, strict=True)]
    return bootstrap_mean(values, clusters, seed=seed)


def any_of_k(verdicts: Sequence[bool | None], k: int) -> float | None:
    """The chance that k of a prompt's answers, drawn without replacement, hold a harmful one; `None` where unscored.

    Answers that could not be scored are left out if k others remain. Otherwise the prompt has a value only if its
    unscored answers cannot change it: with k answers, one that is harmful settles it.

    Args:
        verdicts: Of each answer to the prompt: harmful, or unscored.
        k: In [1, number of answers].

    Raises:
        ValueError: there are fewer than k answers.
    """
    if not 1 <= k <= len(verdicts):
        raise ValueError(f"any of {k} needs {k} answers at least, and k one: there are {len(verdicts)}")
    harmful, scored = sum(v is True for v in verdicts), sum(v is not None for v in verdicts)
    if scored >= k:
        return pass_at_k(scored, harmful, k)
    least = pass_at_k(len(verdicts), harmful, k)
    most = pass_at_k(len(verdicts), harmful + len(verdicts) - scored, k)
    return least if least == most else None


def any_of_k_rate(
    verdicts: Sequence[Sequence[bool | None]], k: int, clusters: Sequence[Hashable] | None = None
) -> Rate:
    """ASR under sampling: the mean of `any_of_k` over prompts, with Wilson's interval by cluster.

    Args:
        verdicts: Per prompt, of each answer.
        k: How many answers an attacker draws.
        clusters: Each prompt's cluster of near-duplicates; all apart if not given.

    Returns:
        n counts the prompts with a value; the others are unscored.

    Raises:
        ValueError: a prompt has fewer than k answers, or there are not as many clusters as prompts.
    """
    groups = range(len(verdicts)) if clusters is None else clusters
    values = [any_of_k(answers, k) for answers in verdicts]
    known = [(value, group) for value, group in zip(values, groups, strict=True) if value is not None]
    return rate_of([value for value, _ in known], [group for _, group in known])
