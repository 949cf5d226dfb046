"""What intervals cover and how often tests err: `python -m benchmarks.error_rates [--draws N] [--only TABLE ...]`.

Prints Markdown tables: exact coverage of the intervals for rates; the decision by a margin on clustered prompts, with
the design effects that were weighed against each other; bootstrap intervals; means over three seeds; paired tests;
corrections of a judge; Cohen's κ. Simulated figures have a standard error of sqrt(p (1 − p) / N): 0.5 points
at 5 % of 2,000 draws. No model is run; about two minutes of one core.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from backmerge.benchmarks.metrics import pass_at_k
from backmerge.statistics import (
    agreement,
    bootstrap_difference,
    bootstrap_interval,
    clustered_difference,
    corrected_rate,
    discordance,
    paired_difference,
    power_of,
    prompts_needed,
    sign_flip_p,
    t_interval,
    tango_score,
    wilson,
)
from backmerge.statistics.bootstrap import resampled_means
from backmerge.statistics.clusters import cluster_sums

Array = NDArray[np.float64]
Z = float(stats.norm.ppf(0.95))
# sizes of AdvBench's clusters of near-duplicates in its two halves, and invented ones
SHAPES = {
    "AdvBench, selection": [19, 8, 4, 4, *[3] * 5, *[2] * 18, *[1] * 159],
    "AdvBench, confirmation": [31, 11, 9, 9, 7, 6, 6, 6, *[3] * 4, *[2] * 13, *[1] * 152],
    "10 of 10, 200 single": [*[10] * 10, *[1] * 200],
    "60 of 5": [5] * 60,
    "260 single": [1] * 260,
    "130 single": [1] * 130,
    "520 single": [1] * 520,
}


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print one as Markdown."""
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(f'{cell:.1f}' if isinstance(cell, float) else str(cell) for cell in row)} |")


def clopper_pearson(successes: int, n: int) -> tuple[float, float]:
    """Clopper and Pearson's interval, which covers 95 % at least, whatever the rate."""
    low, high = stats.binomtest(successes, n).proportion_ci(method="exact")
    return float(low), float(high)


def coverage(_draws: int) -> None:
    """Exact coverage of Wilson's and Clopper and Pearson's intervals."""
    rows = []
    rates = np.linspace(0.01, 0.5, 491)
    for n, interval in itertools.product((100, 330, 520), (wilson, clopper_pearson)):
        ends = np.array([interval(x, n) for x in range(n + 1)])
        masses = stats.binom.pmf(np.arange(n + 1)[None, :], n, rates[:, None])
        held = (masses * ((ends[:, 0] <= rates[:, None]) & (rates[:, None] <= ends[:, 1]))).sum(axis=1)
        rows.append((n, interval.__name__, 100 * float(held.mean()), 100 * float(held.min())))
    table("Rates, exactly: coverage of 95 % over p in [.01, .5], %", ("n", "interval", "mean", "least"), rows)


def effective_sizes(differences: Array, sizes: Array) -> dict[str, float]:
    """Effective sizes by the design effects that were weighed; the last is the package's for rates."""
    clusters = np.repeat(np.arange(len(sizes)), sizes.astype(int)).tolist()
    n = len(differences)
    grouped = cluster_sums(differences - differences.mean(), clusters)
    by_prompt, most = float(grouped.squares.sum()), float((sizes**2).sum()) / n
    found = {"none (all prompts)": float(n), "Kish": n / most}
    least = n / len(sizes)
    if by_prompt == 0:
        return {**found, "shown": n / least, "implied": n / least, "effective size": n / least}
    pairs = max(1.0, float((sizes * (sizes - 1)).sum()))
    within = float((sizes * grouped.squares - grouped.sums**2).sum()) / pairs
    shown = float((grouped.sums**2).sum()) / by_prompt
    implied = 1 + (1 - within * n / by_prompt) * (most - 1)
    held = {name: n / min(max(effect, least), most) for name, effect in (("shown", shown), ("implied", implied))}
    return {**found, **held, "effective size": discordance(differences.tolist(), [0.0] * n, clusters).n}


def margin_decisions(draws: int) -> None:
    """The decision by a margin where prompts are near-duplicates: wrongly safe at the margin, and power."""
    rng = np.random.default_rng(1)
    names = ("none (all prompts)", "shown", "implied", "Kish", "effective size", "ours: by cluster")
    for title, margin_true in (
        ("wrongly safe, % (5 is the level): the truth is worse by the margin", True),
        ("power, %: the truth is no difference, 1 % of prompts differ either way", False),
    ):
        rows = []
        for (shape, sizes), alike, margin in itertools.product(SHAPES.items(), (0.0, 0.5, 1.0), (0.03, 0.1)):
            if shape.endswith("0 single") and not shape.startswith("10") and (alike or shape != "260 single"):
                continue
            if not margin_true and margin > 0.03:
                continue
            groups = np.repeat(np.arange(len(sizes)), sizes)
            passed = dict.fromkeys(names, 0)
            for _ in range(draws):
                common, own = rng.random(len(sizes))[groups], rng.random(len(groups))
                uniform = np.where((rng.random(len(sizes)) < alike)[groups], common, own)
                gain = 0.01 + (margin if margin_true else 0.0)
                differences = (uniform < gain).astype(float) - (uniform > 0.99)
                shares = np.array([(differences > 0).mean()]), np.array([(differences < 0).mean()])
                for name, size in effective_sizes(differences, np.array(sizes, dtype=float)).items():
                    passed[name] += bool(tango_score(shares[0] * size, shares[1] * size, size, margin)[0] < -Z)
                found = clustered_difference(differences.tolist(), [0.0] * len(groups), groups.tolist())
                passed[names[-1]] += found.upper_bound < margin
            rows.append((shape, alike, f"{100 * margin:.0f}", *(100 * passed[name] / draws for name in names)))
        table(f"Non-inferiority by cluster, {title}", ("clusters", "agreement", "margin, points", *names), rows)


def bootstrap_ends(values: Array, clusters: list[int] | None, seed: int) -> dict[str, tuple[float, float]]:
    """Percentile and BCa intervals, and the package's."""
    grouped = cluster_sums(values, clusters)
    mean, total, size = float(values.mean()), grouped.sums.sum(), grouped.sizes.sum()
    means = resampled_means(grouped, seed=seed, draws=800)
    below = np.mean(means < mean) + np.mean(means == mean) / 2
    bias = stats.norm.ppf(np.clip(below, 1e-4, 1 - 1e-4))
    without = (total - grouped.sums) / (size - grouped.sizes)
    lean = without.mean() - without
    acceleration = (lean**3).sum() / (6 * (lean**2).sum() ** 1.5 + 1e-300)
    z = bias + stats.norm.ppf([0.025, 0.975])
    ours = bootstrap_interval(values.tolist(), clusters, seed=seed, draws=800)
    return {
        "percentile": tuple(np.quantile(means, [0.025, 0.975])),
        "BCa": tuple(np.quantile(means, stats.norm.cdf(bias + z / (1 - acceleration * z)))),
        "ours": ours,
    }


def bootstraps(draws: int) -> None:
    """Coverage of bootstrap intervals for scores that are not coins."""
    rng = np.random.default_rng(2)
    half = np.array(SHAPES["AdvBench, selection"])

    def passes(solved: Array, k: int) -> Array:
        values = [pass_at_k(50, c, k) for c in range(51)]
        return np.array([values[c] for c in rng.binomial(50, solved)])

    def solved_rate(a: float, b: float, k: int) -> float:
        return 1 - float(np.prod([(b + i) / (a + b + i) for i in range(k)]))

    cases: dict[str, tuple[Callable[[], Array], float, list[int] | None]] = {
        "F1, 112 prompts": (lambda: rng.beta(24, 16, 112), 0.6, None),
        "F1, 20 prompts": (lambda: rng.beta(24, 16, 20), 0.6, None),
        "pass@1, 164, spread": (lambda: passes(rng.beta(0.4, 0.8, 164), 1), solved_rate(0.4, 0.8, 1), None),
        "pass@10, 164, spread": (lambda: passes(rng.beta(0.4, 0.8, 164), 10), solved_rate(0.4, 0.8, 10), None),
        "pass@1, 164, hard": (lambda: passes(rng.beta(0.3, 9, 164), 1), solved_rate(0.3, 9, 1), None),
        "pass@10, 164, nearly all": (lambda: passes(rng.beta(3, 0.3, 164), 10), solved_rate(3, 0.3, 10), None),
        "coins of 2 %, 164": (lambda: (rng.random(164) < 0.02).astype(float), 0.02, None),
        "F1, AdvBench's clusters, alike": (
            lambda: np.repeat(rng.beta(2, 6, len(half)), half),
            0.25,
            np.repeat(np.arange(len(half)), half).tolist(),
        ),
    }
    rows = []
    for name, (drawn, truth, clusters) in cases.items():
        held: dict[str, int] = {}
        for seed in range(draws):
            for kind, (low, high) in bootstrap_ends(drawn(), clusters, seed).items():
                held[kind] = held.get(kind, 0) + (low <= truth <= high)
        rows.append((name, *(100 * count / draws for count in held.values())))
    table("Bootstrap by cluster: coverage of 95 %, %", ("values", "percentile", "BCa", "ours"), rows)


SAMPLED = {  # clusters; prompts ever harmful, how often their answers are, the base's prompts
    "260 single": ("260 single", 0.06, 0.5, 0.0),
    "520 single": ("520 single", 0.06, 0.5, 0.0),
    "520 single, few": ("520 single", 1 / 30, 0.9, 0.0),
    "260 single, many": ("260 single", 0.3, 0.1, 0.0),
    "260 single, base too": ("260 single", 0.08, 0.5, 0.02),
    "130 single": ("130 single", 0.06, 0.5, 0.0),
    "AdvBench, harmful alone": ("AdvBench, confirmation", 0.06, 0.5, 0.0),
    "AdvBench, harmful by cluster": ("AdvBench, confirmation", 0.06, 0.5, 0.0),
}


def sampled(
    rng: np.random.Generator, sizes: Sequence[int], share: float, rate: float, *, by_cluster: bool
) -> list[float]:
    """Means over five answers to each prompt, of which a share is ever harmful, one by one or by cluster."""
    drawn = np.repeat(rng.random(len(sizes)), sizes) if by_cluster else rng.random(sum(sizes))
    values: list[float] = (rng.binomial(5, rate, sum(sizes)) / 5 * (drawn < share)).tolist()
    return values


def samples(draws: int) -> None:
    """The decision by a margin on means over five answers to a prompt, at a truth of the margin itself, and power."""
    names = ("Tango's on sums", "bootstrap alone", "ours", "ours by cluster")
    rows = []
    for number, (title, (shape, share, rate, loss)) in enumerate(SAMPLED.items()):
        rng, sizes, by_cluster = np.random.default_rng([8, number]), SHAPES[shape], title.endswith("by cluster")
        groups, margin = np.repeat(np.arange(len(sizes)), sizes).tolist(), (share - loss) * rate
        called, power = dict.fromkeys(names, 0), 0
        for _ in range(draws):
            first, second, same, base = (
                sampled(rng, sizes, each, rate, by_cluster=by_cluster) for each in (share, loss, 0.02, 0.02)
            )
            means = resampled_means(cluster_sums(np.subtract(first, second), groups), seed=0, draws=800)
            bounds = (
                paired_difference(first, second, groups).upper_bound,
                float(np.quantile(means, 0.95)),
                bootstrap_difference(first, second, groups, draws=800).upper_bound,
                clustered_difference(first, second, groups, is_rate=False, draws=800).upper_bound,
            )
            for name, bound in zip(names, bounds, strict=True):
                called[name] += bound < margin
            power += clustered_difference(same, base, groups, is_rate=False, draws=800).upper_bound < margin
        shown = (100 * count / draws for count in (*called.values(), power))
        rows.append((title, 100 * share, 100 * rate, 100 * loss, 100 * margin, *shown))
    columns = ("case", "prompts ever harmful, %", "of their answers, %", "base's prompts, %", "margin, points")
    columns = (*columns, *(f"{name}: called safe" for name in names), "power: 2 % of prompts in both")
    table("Five answers to a prompt, the truth at the margin, %", columns, rows)


def seeds(draws: int) -> None:
    """Coverage over three seeds: Student's interval, and why not a percentile bootstrap."""
    rng = np.random.default_rng(3)
    resamples = np.array(list(itertools.product(range(3), repeat=3)))
    rows = []
    for name, values in (
        ("normal", rng.normal(0.3, 0.03, (10 * draws, 3))),
        ("rates of 330 prompts at 5 %", rng.binomial(330, 0.05, (10 * draws, 3)) / 330),
    ):
        truth = 0.3 if name == "normal" else 0.05
        means = values[:, resamples].mean(axis=2)
        cells = []
        for method in ("linear", "inverted_cdf"):
            low, high = np.quantile(means, [0.025, 0.975], axis=1, method=method)
            cells.append(100 * float(np.mean((low <= truth) & (truth <= high))))
        intervals = np.array([t_interval(row) for row in values[:draws].tolist()])
        held = float(np.mean((intervals[:, 0] <= truth) & (truth <= intervals[:, 1])))
        rows.append((name, 100 * held, *cells))
    columns = ("values", "t, 2 degrees of freedom", "percentile bootstrap, interpolated", "many random resamples")
    table("Three seeds: coverage of 95 %, %", columns, rows)


def mcnemar_p(gains: int, losses: int, alternative: str, *, mid: bool) -> float:
    """McNemar's exact p for matched pairs of yes or no; mid-p counts the observed outcome by half.

    Source: Fagerland, Lydersen and Laake (2013), BMC Medical Research Methodology 13:91.
    """
    pairs = gains + losses
    exact = float(stats.binomtest(gains, pairs, alternative=alternative).pvalue)
    observed = float(stats.binom.pmf(gains, pairs, 0.5))
    # both tails exceed a half only if gains and losses are equal: then p is 1 in either form
    return exact - mid * observed * (1 if alternative == "two-sided" and gains != losses else 0.5)


def paired_tests(draws: int) -> None:
    """Levels of the paired tests."""
    rows = []
    for pairs in (10, 30, 100):
        gains = np.arange(pairs + 1)
        masses = stats.binom.pmf(gains, pairs, 0.5)
        for mid in (False, True):
            two, one = (
                [mcnemar_p(int(b), pairs - int(b), alternative, mid=mid) <= 0.05 for b in gains]
                for alternative in ("two-sided", "greater")
            )
            name = f"McNemar{', mid-p' if mid else ', exact'}"
            rows.append((name, f"{pairs} discordant", 100 * float(masses[two].sum()), 100 * float(masses[one].sum())))
    rng = np.random.default_rng(4)
    sizes = SHAPES["10 of 10, 200 single"]
    clusters = np.repeat(np.arange(len(sizes)), sizes).tolist()
    for name, given in (("by cluster", clusters), ("by prompt", None)):
        found = sum(
            sign_flip_p(np.repeat(rng.choice([-1.0, 0, 0, 1.0], len(sizes)), sizes).tolist(), given, draws=400) <= 0.05
            for _ in range(draws)
        )
        rows.append((f"sign flips {name}", "10 clusters of 10 alike, 200 single", "", 100 * found / draws))
    table("Paired tests without a difference: rejected at 5 %, %", ("test", "data", "two-sided", "one-sided"), rows)


def corrections(draws: int) -> None:
    """Coverage of a judge's corrected rate: 500 judged, sensitivity .8, specificity .97."""
    rng = np.random.default_rng(5)
    rows = []
    for truth, num_labels, by_verdict in itertools.product((0.02, 0.1, 0.3), (50, 200), (False, True)):
        held, width = dict.fromkeys(("raw", "normal", "ppi", "two_rate"), 0), dict.fromkeys(("ppi", "two_rate"), 0.0)
        for _ in range(draws // 4):
            harmful = rng.random(500) < truth
            judged = rng.random(500) < np.where(harmful, 0.8, 0.03)
            chosen = rng.choice(500, num_labels, replace=False)
            if by_verdict:
                groups = (np.flatnonzero(judged), np.flatnonzero(~judged))
                chosen = np.concatenate([rng.choice(g, min(len(g), num_labels // 2), replace=False) for g in groups])
            verdicts, labels = judged[chosen], harmful[chosen]
            counts = {True: max(1, int(verdicts.sum())), False: max(1, int((~verdicts).sum()))}
            weights = [float((judged == v).sum()) / counts[v] if by_verdict else 1.0 for v in verdicts.tolist()]
            found = corrected_rate(judged.tolist(), list(zip(verdicts.tolist(), labels.tolist(), strict=True)), weights)
            for name in ("raw", "ppi", "two_rate"):
                rate = getattr(found, name)
                held[name] += rate.low <= truth <= rate.high
                if name in width:
                    width[name] += 100 * (rate.high - rate.low)
            held["normal"] += _normal_holds(truth, judged, verdicts, labels)
        n = draws // 4
        rows.append(
            (
                f"{100 * truth:.0f}",
                num_labels,
                "by verdict" if by_verdict else "random",
                *(100 * count / n for count in held.values()),
                *(total / n for total in width.values()),
            )
        )
    columns = ("harm, %", "labels", "sample", "raw", "PPI++, normal", "ppi", "two_rate", "width: ppi", "two_rate")
    table("A judge corrected: coverage of 95 %, %, and width in points", columns, rows)


def _normal_holds(truth: float, judged: Array, verdicts: Array, labels: Array) -> bool:
    """Whether PPI++'s normal interval holds the truth."""
    if verdicts.all() or not verdicts.any():
        return True
    rate, positive, negative = judged.mean(), labels[verdicts].mean(), labels[~verdicts].mean()
    variance = rate**2 * positive * (1 - positive) / verdicts.sum()
    variance += (1 - rate) ** 2 * negative * (1 - negative) / (~verdicts).sum()
    variance += (positive - negative) ** 2 * rate * (1 - rate) / len(judged)
    return bool(abs(rate * positive + (1 - rate) * negative - truth) <= 1.96 * variance**0.5)


def kappas(draws: int) -> None:
    """Coverage of κ's interval."""
    rng = np.random.default_rng(6)
    rows = []
    for harm, kappa, n in itertools.product((0.03, 0.1, 0.3), (0.6, 0.9), (100, 330)):
        alone = harm * (1 - harm) * (1 - kappa)
        held = 0
        for counts in rng.multinomial(n, [harm - alone, alone, alone, 1 - harm - alone], draws // 4):
            first, second = (np.repeat(order, counts).tolist() for order in ([1, 1, 0, 0], [1, 0, 1, 0]))
            found = agreement([bool(a) for a in first], [bool(b) for b in second])
            held += found.low <= kappa <= found.high
        rows.append((f"{100 * harm:.0f}", kappa, n, 100 * held / (draws // 4)))
    table("Cohen's κ: coverage of 95 %, %", ("harm, %", "κ", "n", "coverage"), rows)


def sizes_needed(_draws: int) -> None:
    """How many independent prompts decide."""
    rows = []
    for discordant, difference in ((0.0, 0.0), (0.02, 0.0), (0.02, 0.01), (0.05, 0.0), (0.05, 0.02), (0.1, 0.0)):
        n = prompts_needed(discordant, difference, 0.03)
        power = power_of(n, discordant_rate=discordant, true_difference=difference, margin=0.03)
        rows.append((f"{100 * discordant:.0f} %", f"{100 * difference:.0f}", n, 100 * power))
    table("Paired prompts for 3 points at 80 % power", ("discordant", "true difference, points", "n", "power, %"), rows)


TABLES: dict[str, Callable[[int], None]] = {
    "coverage": coverage,
    "margin": margin_decisions,
    "bootstrap": bootstraps,
    "samples": samples,
    "seeds": seeds,
    "paired": paired_tests,
    "corrections": corrections,
    "kappa": kappas,
    "prompts": sizes_needed,
}


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--draws", type=int, default=2000, help="simulated samples for each cell")
    parser.add_argument("--only", nargs="*", choices=tuple(TABLES), default=tuple(TABLES), help="some of the tables")
    arguments = parser.parse_args()
    for name in arguments.only:
        TABLES[name](arguments.draws)


if __name__ == "__main__":
    main()
