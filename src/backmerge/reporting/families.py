"""Combine runs that differ only in their seeds: they are repetitions of one experiment."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from backmerge.records import Estimate
from backmerge.reporting.finished_runs import Run
from backmerge.statistics import Interval, mean_interval, t_interval

Pick = Callable[[Run], str | None]  # a run's point, or `None` if it has no such point

SEEDS = frozenset({"seed", "seeds"})
# settings that results do not depend on
IDLE = frozenset({"report", "execution"})


class Family(NamedTuple):
    """Runs that differ only in their seeds; usually one."""

    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """Return the names of all its runs."""
        return ", ".join(run.name for run in self.runs)

    @property
    def num_tuned(self) -> int:
        """Return the number of tuned models of all runs."""
        return sum(len(run.results.tuned) for run in self.runs)


def families_of(runs: Sequence[Run]) -> list[Family]:
    """Return the runs, grouped if they differ only in seeds, in the order of their first.

    Runs of the same tuned models are not repetitions of each other, whatever their names.
    """
    found: dict[str, list[list[Run]]] = {}
    for run in runs:
        alike = found.setdefault(_common(run), [])
        home = next((family for family in alike if not any(_shares_models(run, other) for other in family)), None)
        if home is None:
            alike.append([run])
        else:
            home.append(run)
    place = {id(run): index for index, run in enumerate(runs)}
    families = [Family(tuple(family)) for alike in found.values() for family in alike]
    return sorted(families, key=lambda family: place[id(family.runs[0])])


def models_of(run: Run) -> frozenset[str]:
    """Return the tuned models, by the fingerprints of their weights."""
    return frozenset(row.fingerprint for row in run.results.tuned)


def _shares_models(run: Run, other: Run) -> bool:
    return bool(models_of(run) & models_of(other))


def _common(run: Run) -> str:
    """Return what runs that differ only in seeds have in common: settings, base and prompts.

    If models were tuned elsewhere, runs with the same title count as repetitions.
    """
    settings = {key: value for key, value in run.experiment.items() if key not in {*IDLE, "base", "tuned", "name"}}
    title = run.results.name if run.experiment.get("finetune") is None else None
    prompts = run.results.inputs.get("benchmarks")
    same = [_without_seeds(settings), title, run.results.base.fingerprint, prompts]
    return json.dumps(same, sort_keys=True, default=str)


def _without_seeds(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_seeds(inner) for key, inner in value.items() if key not in SEEDS}
    if isinstance(value, (list, tuple)):
        return [_without_seeds(inner) for inner in value]
    return value


def at(point: str) -> Pick:
    """Return a function that picks the same point in every run."""
    return lambda _: point


def chosen(run: Run) -> str | None:
    """Return the point that the run's rule chose."""
    return run.results.choice.point


def cell_at(family: Family, pick: Pick, benchmark: str, metric: str, split: str = "confirmation") -> Estimate | None:
    """Return what was measured at a point of every run, over all their models; `None` if a run has no such figure.

    The mean and standard deviation are over models. The interval covers both Student's interval over the models and the
    mean of the runs' own ends: the first has no width if all seeds agree, and the second ignores other seeds. All runs
    answer the same prompts, so the second treats their errors as equal, which can only make it too wide.
    """
    cells: list[Estimate] = []
    values: list[float] = []
    for run in family.runs:
        point = pick(run)
        place = (split, point or "", benchmark, metric)
        cell = run.cells.get(place)
        if cell is None or cell.value is None:
            return None
        cells.append(cell)
        values += run.values.get(place, [cell.value])
    # the base is the same single model each time, not a repetition
    is_base = (
        all(pick(run) == "base" for run in family.runs)
        and len({(cell.value, cell.low, cell.high) for cell in cells}) == 1
    )
    if len(cells) == 1 or is_base:
        return cells[0]
    weights = [cell.num_models for cell in cells]
    held = _hull(values, cells, weights, (0.0, 1.0))
    unscored = sum(cell.unscored for cell in cells)
    return Estimate(
        fmean(values),
        *held,
        cells[0].n,
        unscored=unscored,
        method="hull over prompts and models",
        spread=stdev(values),
        num_models=sum(weights),
    )


def _hull(
    values: Sequence[float], held: Sequence[Estimate], weights: Sequence[int], limits: tuple[float, float]
) -> Interval:
    over_models = t_interval(values, limits=limits)
    low, high = fmean([one.low for one in held], weights), fmean([one.high for one in held], weights)
    return Interval(min(over_models.low, low), max(over_models.high, high))


def score_at(family: Family, pick: Pick, split: str = "confirmation") -> Estimate | None:
    """Return the task's score at a point of every run; with several utility benchmarks, their mean."""
    cells = [cell_at(family, pick, name, metric, split) for name, metric in benchmarks_of(family, "utility")]
    known = [cell for cell in cells if cell is not None]
    if len(known) < len(cells) or not known:
        return None
    if len(known) == 1:
        return known[0]
    means = [cell.value for cell in known if cell.value is not None]
    return Estimate(fmean(means), *mean_interval(means, [Interval(cell.low, cell.high) for cell in known]))


def benchmarks_of(family: Family, kind: str) -> list[tuple[str, str]]:
    """Return names and primary metrics of a kind, in the order of the experiment."""
    return [(b.name, b.metric) for b in family.runs[0].results.benchmarks if b.kind == kind]


def gap_to_base(
    family: Family, name: Literal["asr_difference", "tuned_asr_difference"] = "asr_difference"
) -> Estimate | None:
    """Return the difference of ASR from the base's on the confirmation split, over the models of all runs.

    Args:
        family: The runs.
        name: `asr_difference` for the chosen points, or `tuned_asr_difference` for the tuned models.
    """
    found = [run.results.confirmation for run in family.runs]
    rows = [one.asr_difference if name == "asr_difference" else one.tuned_asr_difference for one in found]
    gaps = [gap for gap in rows if gap is not None]
    if len(gaps) < len(rows):
        return None
    if len(gaps) == 1:
        return gaps[0].estimate
    own = [[gap.difference] for gap in gaps]
    if name == "asr_difference":
        models = [run.results.confirmation.models for run in family.runs]
        own = [[row.asr_difference.difference for row in of_run if row.asr_difference] for of_run in models]
    values = [value for of_run in own for value in of_run]
    held = _hull(values, [gap.estimate for gap in gaps], [len(of_run) for of_run in own], (-1.0, 1.0))
    return Estimate(fmean(values), *held, gaps[0].n, method="hull over prompts and models", spread=stdev(values))


def lams_of(family: Family, pick: Pick) -> float | str | None:
    """Return λ at a point of each run: one if all agree, else all; its setting if there is no single λ."""
    found = list(dict.fromkeys(_lam(run, pick(run)) for run in family.runs))
    if len(found) == 1:
        return found[0]
    return ", ".join("none" if lam is None else lam if isinstance(lam, str) else f"{lam:g}" for lam in found)


def _lam(run: Run, point: str | None) -> float | str | None:
    for row in run.results.points:
        if row.point == point:
            lam: float | None = row.lam
            return "by part" if lam is None and row.setting is not None else lam
    return None


def verdict_of(family: Family) -> str:
    """Return the runs' verdict, or how many runs have which."""
    verdicts = [run.results.confirmation.verdict for run in family.runs]
    counts = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
    if len(counts) == 1:
        return str(verdicts[0])
    return ", ".join(f"{verdict} {count}" for verdict, count in counts.items())


def remarks(runs: Sequence[Run], of_run: Callable[[Run], Iterator[str]]) -> list[str]:
    """Return remarks on runs, each sentence once; it names its runs unless it is about all of them."""
    told: dict[str, list[str]] = {}
    for run in runs:
        for sentence in of_run(run):
            told.setdefault(sentence, []).append(run.name)
    return [
        sentence if len(names) == len(runs) else f"{', '.join(names)}: {sentence}" for sentence, names in told.items()
    ]
