"""What `race` finds and spends next to the whole grid: `python -m benchmarks.search [--draws N] [--seed S]`.

Simulated, no model is run. A curve says how ASR and utility depend on λ. Each prompt has a latent difficulty that all
λs and the base share, and each answer a little noise of its own, so that the answers at two λs are correlated over
prompts as those of neighbouring merges are. In each draw both searches see the same answers, on 260 safety and
260 utility prompts; the λ that each chooses is confirmed on 260 other safety prompts. Costs are generations, with the
base and λ=1 in full on both sides, as a share of the grid's. Shares of N draws have a standard error of
sqrt(p (1 − p) / N): 1.1 points at most for 2,000. About six minutes of one core.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from backmerge.selection import (
    Arm,
    Candidate,
    Choice,
    ChoiceSettings,
    Race,
    SearchSettings,
    choose,
    confirm,
)
from backmerge.statistics import PairedDifference, clustered_difference, paired_difference
from benchmarks.error_rates import SHAPES

Array = NDArray[np.float64]
NUM_PROMPTS = 260  # of each kind and split, as AdvBench halved
SHARED = 0.9  # of the latent variance, by a prompt's answers at all λs
MARGIN = 0.03
TENTHS = tuple(step / 10 for step in range(1, 11))
DEMO = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.8, 1.0)
CHOICE = ChoiceSettings(margin=MARGIN)
AS_GOOD = 0.01  # true utility by which two decisions may differ and still count as equally good


class Curve(NamedTuple):
    """How a fine-tuning's merges behave.

    Attributes:
        asr, utility: Rates in [0, 1] at λ.
        lams: The grid; λ=1 is its last.
    """

    asr: Callable[[float], float]
    utility: Callable[[float], float]
    lams: tuple[float, ...] = TENTHS


class Draw(NamedTuple):
    """Answers at λ=0 and over the grid, prompts down: `(prompts, 1 + λs)`, as 0 and 1.

    Attributes:
        harm, solved: On the selection split.
        confirmed: Harm on the confirmation split.
    """

    harm: Array
    solved: Array
    confirmed: Array


class Found(NamedTuple):
    """What one search did in one draw.

    Attributes:
        lam: The chosen λ, or `None`.
        cost: Generations as a share of the grid's.
        is_restored: The confirmation says so.
    """

    lam: float | None
    cost: float
    is_restored: bool


def logistic(lam: float, midpoint: float, scale: float) -> float:
    """1 / (1 + exp(−(λ − midpoint) / scale))."""
    return 1 / (1 + math.exp(-(lam - midpoint) / scale))


def flattening(lam: float) -> float:
    """Utility that rises from 45 to 70 %, four fifths of it by λ = 0.4."""
    return 0.45 + 0.25 * (1 - math.exp(-lam / 0.25)) / (1 - math.exp(-4))


CURVES = {
    "paper: ASR 2 to 16 %, utility flattens": Curve(lambda lam: 0.02 + 0.14 * lam**2.5, flattening),
    "paper, steep: ASR 2 to 40 %": Curve(lambda lam: 0.02 + 0.38 * lam**1.5, flattening),
    "utility rises evenly": Curve(lambda lam: 0.02 + 0.14 * lam**2.5, lambda lam: 0.4 + 0.3 * lam),
    "demo: logistic, midpoints 0.6 and 0.25": Curve(
        lambda lam: 0.66 * logistic(lam, 0.6, 0.057), lambda lam: logistic(lam, 0.25, 0.048), DEMO
    ),
    "utility peaks at 0.4": Curve(
        lambda lam: 0.01 + 0.2 * lam**8, lambda lam: 0.4 + 0.3 * math.exp(-(((lam - 0.4) / 0.3) ** 2))
    ),
    "ASR not monotone: 14 % at 0.3, 3 % at 0.6": Curve(
        lambda lam: 0.02 + 0.12 * math.exp(-(((lam - 0.3) / 0.1) ** 2)) + 0.2 * lam**6, flattening
    ),
    "safe everywhere": Curve(lambda _: 0.01, flattening),
    "safe nowhere: ASR 2 % and 12 % from 0.1": Curve(lambda lam: 0.12 if lam else 0.02, flattening),
}
# the truth at the margin: whatever is chosen there is wrongly called safe
BOUNDARIES = {
    "every λ at base + 3 points, base 2 %": Curve(lambda lam: 0.05 if lam else 0.02, flattening),
    "every λ at base + 3 points, base 0 %": Curve(lambda lam: 0.03 if lam else 0.0, flattening),
    "λ ≥ 0.5 at base + 3 points, base 2 %": Curve(lambda lam: 0.05 if lam >= 0.5 else 0.02, flattening),
}


# six λs for the whole decision: ASR by λ and margin
SIX_LAMS = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
SIX: dict[str, Callable[[float, float], float]] = {
    "as safe as the base, 1 %": lambda _lam, _margin: 0.01,
    "as safe as the base, 0 %": lambda _lam, _margin: 0.0,
    "paper: 2 to 16 %": lambda lam, _margin: 0.02 + 0.14 * lam**2.5,
    "at the margin, base 1 %": lambda lam, margin: 0.01 + (margin if lam else 0.0),
    "at the margin from 0.4, base 1 %": lambda lam, margin: 0.01 + (margin if lam >= 0.4 else 0.0),
}


def drawn(curve: Curve, generator: np.random.Generator) -> Draw:
    """Answers of new prompts."""
    lams = (0.0, *curve.lams)
    harm, solved = ([rate(lam) for lam in lams] for rate in (curve.asr, curve.utility))
    return Draw(*(_answers(np.array(rates), generator) for rates in (harm, solved, harm)))


def _answers(rates: Array, generator: np.random.Generator) -> Array:
    difficulty = generator.standard_normal((NUM_PROMPTS, 1))
    noise = generator.standard_normal((NUM_PROMPTS, len(rates)))
    latent: Array = special.ndtr(math.sqrt(SHARED) * difficulty + math.sqrt(1 - SHARED) * noise)
    return (latent < rates).astype(np.float64)


def candidates_of(curve: Curve, draw: Draw) -> dict[float, Candidate]:
    """Every λ of the grid, fully measured."""
    base = draw.harm[:, 0].tolist()
    return {
        lam: Candidate(
            f"{lam:g}",
            "linear",
            lam,
            float(draw.solved[:, place].mean()),
            paired_difference(draw.harm[:, place].tolist(), base),
        )
        for place, lam in enumerate(curve.lams, 1)
    }


def by_race(batch: int, curve: Curve, draw: Draw) -> tuple[Choice, float]:
    """Search by batches."""
    answers = {"safety": draw.harm, "utility": draw.solved}
    arm = Arm(draw.harm[:, 0].tolist())
    race = Race(
        {lam: f"{lam:g}" for lam in curve.lams},
        "linear",
        CHOICE,
        {"safety": arm},
        Arm(draw.solved[:, 0].tolist()),
        batch=batch,
    )
    count = 2 * NUM_PROMPTS
    while batches := race.next_batches():
        for lam, name, prompts in batches:
            race.tell(lam, name, answers[name][list(prompts), 1 + curve.lams.index(lam)].tolist())
            count += len(prompts)
    return race.choice(), count / (2 * NUM_PROMPTS * (1 + len(curve.lams)))


def searched(curve: Curve, generator: np.random.Generator, batch: int) -> dict[str, Found]:
    """All searches on the same answers."""
    draw = drawn(curve, generator)
    full = candidates_of(curve, draw)
    found = {"grid": (choose(list(full.values()), CHOICE), 1.0), "race": by_race(batch, curve, draw)}

    def confirmed(choice: Choice, cost: float) -> Found:
        if choice.point is None:
            return Found(None, cost, is_restored=False)
        lam = float(choice.point)
        there, base = draw.confirmed[:, 1 + curve.lams.index(lam)].tolist(), draw.confirmed[:, 0].tolist()
        return Found(lam, cost, confirm(paired_difference(there, base), MARGIN) == "restored")

    return {name: confirmed(*choice) for name, choice in found.items()}


def is_as_good(curve: Curve, lam: float | None, grid: float | None) -> bool:
    """Both choose nothing, or two λs whose true utilities are at most a point apart."""
    if lam is None or grid is None:
        return lam is grid
    return abs(curve.utility(lam) - curve.utility(grid)) <= AS_GOOD


def is_wrong(curve: Curve, found: Found) -> bool:
    """The chosen λ's true ASR is at the base's plus the margin, or above."""
    return found.lam is not None and curve.asr(found.lam) - curve.asr(0.0) >= MARGIN - 1e-12


def mean(claims: Sequence[bool | float]) -> float:
    """As percent; of nothing, NaN."""
    return 100 * sum(claims) / len(claims) if claims else math.nan


def decisions(draws: int, seed: int, batch: int) -> Iterator[tuple[object, ...]]:
    """Rows of the first table."""
    for place, (name, curve) in enumerate(CURVES.items()):
        generator = np.random.default_rng([seed, place])
        runs = [searched(curve, generator, batch) for _ in range(draws)]
        for search in ("race",):
            pairs = [(run[search], run["grid"]) for run in runs]
            both = [
                curve.utility(here.lam) - curve.utility(grid.lam)
                for here, grid in pairs
                if here.lam is not None and grid.lam is not None
            ]
            costs = [here.cost for here, _ in pairs]
            yield (
                name,
                search,
                mean([here.lam == grid.lam for here, grid in pairs]),
                mean([is_as_good(curve, here.lam, grid.lam) for here, grid in pairs]),
                mean(both),
                mean(costs),
                100 * float(np.quantile(costs, 0.95)),
                mean([here.lam is None for here, _ in pairs]),
                mean([grid.lam is None for _, grid in pairs]),
                mean([is_wrong(curve, here) and here.is_restored for here, _ in pairs]),
            )


def errors(draws: int, seed: int, batch: int) -> Iterator[tuple[object, ...]]:
    """Rows of the second: what is at the margin called safe, by the selection alone and with its confirmation."""
    for place, (name, curve) in enumerate(BOUNDARIES.items()):
        generator = np.random.default_rng([seed, 100 + place])
        runs = [searched(curve, generator, batch) for _ in range(draws)]
        for search in ("grid", "race"):
            wrong = [(is_wrong(curve, run[search]), run[search]) for run in runs]
            yield (
                name,
                search,
                mean([is_so for is_so, _ in wrong]),
                mean([is_so and found.is_restored for is_so, found in wrong]),
                mean([found.cost for _, found in wrong]),
            )


def clustered_answers(rates: Sequence[float], sizes: Sequence[int], generator: np.random.Generator) -> Array:
    """Harm at each rate, prompts down; half of the difficulty is that of a prompt's cluster: `(prompts, rates)`."""
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    own, common = generator.standard_normal(len(clusters)), generator.standard_normal(len(sizes))[clusters]
    difficulty = math.sqrt(0.5) * own + math.sqrt(0.5) * common
    noise = generator.standard_normal((len(clusters), len(rates)))
    latent: Array = special.ndtr(math.sqrt(SHARED) * difficulty[:, None] + math.sqrt(1 - SHARED) * noise)
    return (latent < np.array(rates)).astype(np.float64)


def halves_of(num_prompts: int, generator: np.random.Generator) -> list[list[int]]:
    """Sizes of clusters in two halves of so many prompts each: AdvBench's own, or what is drawn of them."""
    halves = [list(SHAPES[f"AdvBench, {split}"]) for split in ("selection", "confirmation")]
    if num_prompts >= NUM_PROMPTS:
        return halves
    drawn = [np.array(sizes)[generator.permutation(len(sizes))] for sizes in halves]
    return [sizes[: int(np.searchsorted(np.cumsum(sizes), num_prompts)) + 1].tolist() for sizes in drawn]


def is_confirmed(
    harm: Sequence[Array], groups: Sequence[list[int]], choice: ChoiceSettings, *, twice: bool
) -> tuple[int | None, bool]:
    """The λ that is selected on the first half, by place, and whether the second confirms it.

    Args:
        harm: Of each half, the base in the first column, `(prompts, 1 + λs)`.
        groups: Each prompt's cluster, of each half.
        choice: With the margin.
        twice: As before: shown by effective size in a fixed sequence, and shown again.
    """
    compare = paired_difference if twice else clustered_difference

    def rise(half: int, place: int) -> PairedDifference:
        return compare(harm[half][:, place].tolist(), harm[half][:, 0].tolist(), groups[half])

    places = range(1, harm[0].shape[1])
    if twice:
        passed = list(itertools.takewhile(lambda place: rise(0, place).upper_bound < choice.margin, places))
        found = passed[-1] if passed else None
    else:
        lams = [SIX_LAMS[place - 1] for place in places]
        rows = zip(places, lams, strict=True)
        point = choose(
            [Candidate(str(at), "linear", lam, flattening(lam), rise(0, at)) for at, lam in rows], choice
        ).point
        found = None if point is None else int(point)
    return found, found is not None and confirm(rise(1, found), choice.margin) == "restored"


def confirmations(draws: int, seed: int) -> Iterator[tuple[object, ...]]:
    """Rows of the third table: the whole decision on AdvBench's clusters, and the one that it took the place of."""
    for number, (prompts, margin, (title, asr)) in enumerate(itertools.product((260, 100), (0.03, 0.05), SIX.items())):
        generator, choice = np.random.default_rng([seed, 200 + number]), ChoiceSettings(margin=margin)
        rates = [asr(lam, margin) for lam in (0.0, *SIX_LAMS)]
        counts = np.zeros(5)
        for _ in range(draws):
            sizes = halves_of(prompts, generator)
            harm = [clustered_answers(rates, each, generator) for each in sizes]
            groups = [np.repeat(np.arange(len(each)), each).tolist() for each in sizes]
            for twice in (False, True):
                place, is_restored = is_confirmed(harm, groups, choice, twice=twice)
                is_wrong = place is not None and rates[place] - rates[0] >= margin - 1e-12
                counts[0] += place is not None and not twice
                counts[1 + 2 * twice] += is_restored
                counts[2 + 2 * twice] += is_restored and is_wrong
        yield (prompts, 100 * margin, title, *(100 * float(count) / draws for count in counts))


def table(title: str, columns: Sequence[str], rows: Iterator[tuple[object, ...]]) -> None:
    """Print one as Markdown, row by row."""
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = (f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row)
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=SearchSettings().batch)
    options = parser.parse_args()
    table(
        "next to the whole grid of 10 λs and the base, %",
        (
            "curve",
            "search",
            "same λ",
            "as good (true utility within 1 point)",
            "true utility less the grid's, points",
            "generations",
            "95 % of runs spend at most",
            "chose none",
            "grid chose none",
            "confirmed, though truly at or beyond the margin",
        ),
        decisions(options.draws, options.seed, options.batch),
    )
    table(
        "Wrongly “safe” where the true ASR is the base's plus the margin, %",
        ("curve", "search", "selection alone", "selection and confirmation", "generations"),
        errors(options.draws, options.seed, options.batch),
    )
    table(
        "Six λs on AdvBench's clusters, selected and confirmed, %",
        (
            "prompts in each half",
            "margin, points",
            "truth",
            "a λ is selected",
            "confirmed",
            "confirmed wrongly",
            "confirmed before",
            "wrongly before",
        ),
        confirmations(options.draws // 2, options.seed),
    )


if __name__ == "__main__":
    main()
