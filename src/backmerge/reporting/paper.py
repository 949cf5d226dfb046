"""Make the paper's tables from finished runs, in its layout, with the intervals that it does not give.

Source: Farn et al., arXiv 2412.19512, Tables 1 to 3. Every figure comes from the runs; none is from the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from backmerge.reporting.families import (
    Family,
    Pick,
    at,
    benchmarks_of,
    cell_at,
    chosen,
    lams_of,
    models_of,
    remarks,
    score_at,
)
from backmerge.reporting.findings import weaknesses
from backmerge.reporting.finished_runs import Run
from backmerge.reporting.run_tables import INTERVALS, SEEDS, metric_name
from backmerge.reporting.tables import NOTHING, Column, Entry, Named, Table
from backmerge.results import RestoreResults

TITLES = {
    "table1": "Table 1: base, fine-tuned model and merge",
    "table2": "Table 2: methods of merging",
    "table3": "Table 3: other models",
    "figure2": "Figure 2: task score and HEx-PHI over λ",
    "figure3": "Figure 3: task score and AdvBench over λ",
}
SAFETY = {"advbench": "AdvBench", "hexphi": "HEx-PHI"}  # the paper's safety benchmarks
METHODS = {"linear": "Linear", "slerp": "SLERP", "dare_linear": "DARE", "model_stock": "Model Stock"}


class Method(NamedTuple):
    """A merge method, and in each run the point that the rule chose for it."""

    label: str
    method: str
    pick: Pick


class Block(NamedTuple):
    """Runs of the same base, tuned models and prompts that differ in how they merge; usually one."""

    model: str
    task: str
    families: tuple[Family, ...]


def paper_table(families: Sequence[Family], which: str, title: str | None = None) -> Table:
    """Return Table 1, 2 or 3: for each task the base, the fine-tuned model and the merges, by score and ASR.

    Args:
        families: The runs.
        which: `table1` and `table3` show the linear merge, or the chosen one if Linear was not tried; `table2` shows
            the best of every method.
        title: Replaces the table's usual title.
    """
    blocks = blocks_of(families)
    columns, names = _safety_columns(families)
    has_models = which == "table3" or len({block.model for block in blocks}) > 1
    columns = [
        *([Column("model", "model")] if has_models else []),
        Column("task", "task"),
        Column("merge", "method" if which == "table2" else ""),
        Column("lam", "λ", "number"),
        Column("score", "task score", "share"),
        *columns,
    ]
    notes: list[str] = []
    rows = [list(_rows(block, which, names, notes, has_models=has_models)) for block in blocks]
    runs = [run for family in families for run in family.runs]
    caption = f"{title or TITLES[which]}. {INTERVALS}{SEEDS}."
    return Table(which, caption, columns, rows, [*_notes(blocks, runs, names), *notes])


def blocks_of(families: Sequence[Family]) -> list[Block]:
    """Return the rows of a table that belong together; equal names are distinguished by the runs' names."""
    found: list[tuple[tuple[object, ...], list[Family]]] = []
    for family in families:
        first = family.runs[0]
        prompts = sorted((b.name, b.sizes.confirmation) for b in first.results.benchmarks)
        models = frozenset(model for run in family.runs for model in models_of(run))
        key = (first.results.base.fingerprint, models, tuple(prompts))
        labels = {method.label for method in methods_of(family)}
        home = next((group for known, group in found if known == key and labels.isdisjoint(_labels(group))), None)
        if home is None:
            found.append((key, [family]))
        else:
            home.append(family)
    names = [(group[0].runs[0].model, group[0].runs[0].task) for _, group in found]
    return [
        Block(model, task if names.count((model, task)) == 1 else f"{task} ({group[0].name})", tuple(group))
        for (model, task), (_, group) in zip(names, found, strict=True)
    ]


def _labels(group: Sequence[Family]) -> set[str]:
    return {method.label for family in group for method in methods_of(family)}


def methods_of(family: Family) -> list[Method]:
    """Return the best point of every method, if methods were compared; otherwise the chosen one."""
    results = family.runs[0].results
    if results.comparison is not None and all(run.results.comparison for run in family.runs):
        series = [row.series for row in results.comparison.rows]
        return [Method(label_of(results, one), _method(results, one), _best_of(one)) for one in series]
    one = results.choice.series
    if one is None:
        tried = list(dict.fromkeys(p.series for p in results.points if p.role == "merged"))
        one = tried[0] if len(tried) == 1 else ""
    elif one == "tuned":
        return [Method("merge", "", chosen)]
    return [Method(label_of(results, one) if one else "merge", _method(results, one), chosen)]


def label_of(results: RestoreResults, series: str) -> str:
    """Return the paper's name for a series' method, with its parameters if it has any."""
    method = _method(results, series)
    if not series.startswith(method):
        return series  # the label that the user gave
    rest = series.removeprefix(method) if series.startswith(method) else ""
    return f"{METHODS.get(method, method)}{f' {rest}' if rest else ''}"


def _method(results: RestoreResults, series: str) -> str:
    return next((str(p.method or series) for p in results.points if p.series == series), series)


def _best_of(series: str) -> Pick:
    def pick(run: Run) -> str | None:
        compared = run.results.comparison
        assert compared is not None, "the caller asks for the best of a series only where methods were compared"
        return next((row.point for row in compared.rows if row.series == series), None)

    return pick


def _safety_columns(families: Sequence[Family]) -> tuple[list[Column], dict[str, str]]:
    """Return the paper's two sets, if any run has one of them, and all other safety benchmarks."""
    metrics = {name: metric for family in families for name, metric in benchmarks_of(family, "safety")}
    names = {name: metrics.get(name, "asr") for name in SAFETY} if any(name in SAFETY for name in metrics) else {}
    names |= {name: metric for name, metric in metrics.items() if name not in SAFETY}
    return [Column(f"asr_{name}", f"ASR, {SAFETY.get(name, name)}", "share") for name in names], names


def _rows(
    block: Block, which: str, safety: Mapping[str, str], notes: list[str], *, has_models: bool
) -> Iterator[list[Entry]]:
    first = block.families[0]
    shown: list[tuple[str, Family, Pick]] = [
        ("base", first, at("base")),
        (f"fine-tuned{f', mean of {first.num_tuned}' if first.num_tuned > 1 else ''}", first, at("tuned")),
    ]
    for family in block.families:
        methods = methods_of(family)
        linear = [method for method in methods if method.method == "linear"]
        if which != "table2" and linear:
            methods = linear
        for method in methods:
            if any(method.pick(run) is None for run in family.runs):
                notes.append(f"{block.task}: no recipe of {method.label} passed in every run ({_rule(family)}).")
            words = method.label if which == "table2" else f"{method.label} merge".replace("merge merge", "merge")
            shown.append((words, family, method.pick))
    for number, (words, family, pick) in enumerate(shown):
        own = dict(benchmarks_of(family, "safety"))
        yield [
            *([Named(block.model, block.model if number == 0 else "")] if has_models else []),
            Named(block.task, block.task if number == 0 else ""),
            words,
            lams_of(family, pick) if number > 1 else None,
            score_at(family, pick),
            *(cell_at(family, pick, name, metric) if name in own else None for name, metric in safety.items()),
        ]
    notes += _category_means(block, shown)


def _category_means(block: Block, shown: Sequence[tuple[str, Family, Pick]]) -> Iterator[str]:
    """Yield the mean with equal weights for each category, as in the paper, for tasks with several, such as BBH."""
    for name, metric in benchmarks_of(block.families[0], "utility"):
        means = [_category_mean(family, pick, name, metric) for _, family, pick in shown]
        if any(mean is not None for mean in means):
            told = [
                f"{words} {NOTHING if mean is None else f'{mean * 100:.1f}'}"
                for (words, _, _), mean in zip(shown, means, strict=True)
            ]
            yield f"{block.task}, mean over the categories of {name}, equally weighted: {'; '.join(told)}."


def _category_mean(family: Family, pick: Pick, benchmark: str, metric: str) -> float | None:
    found = [
        score.category_mean
        for run in family.runs
        for score in run.results.scores
        if (score.benchmark, score.metric, score.split) == (benchmark, metric, "confirmation")
        and pick(run) in (score.model, score.model.rpartition("/")[0])
    ]
    known = [mean for mean in found if mean is not None]
    return fmean(known) if known and len(known) == len(found) else None


def _rule(family: Family) -> str:
    choice = family.runs[0].results.choice
    return f"rule {choice.rule}, margin {choice.margin * 100:g} points"


def _notes(blocks: Sequence[Block], runs: Sequence[Run], safety: Mapping[str, str]) -> Iterator[str]:
    sizes: dict[str, set[int]] = {}
    for run in runs:
        for b in (b for b in run.results.benchmarks if b.kind != "over_refusal"):
            sizes.setdefault(b.name, set()).add(b.sizes.confirmation)
    measured = {
        block.task: ", ".join(f"{name} ({metric_name(m)})" for name, m in benchmarks_of(block.families[0], "utility"))
        for block in blocks
    }
    yield f"Task score: {'; '.join(f'{task}: {what}' for task, what in measured.items())}."
    listed = (f"{SAFETY.get(name, name)} {'–'.join(map(str, sorted(counts)))}" for name, counts in sizes.items())
    which = "all" if all(run.results.is_whole for run in runs) else "those that λ was not chosen on"
    yield f"Prompts, {which}: {', '.join(listed)}."
    missing = [words for name, words in SAFETY.items() if name not in sizes]
    if missing:
        stand_ins = [name for name in safety if name not in SAFETY]
        instead = f"; in their place: {', '.join(stand_ins)}" if len(missing) == len(SAFETY) and stand_ins else ""
        yield f"Not measured: {' and '.join(missing)}{instead}."
    if any(len(run.results.tuned) > 1 for run in runs) or any(len(f.runs) > 1 for b in blocks for f in b.families):
        yield "For several tuned models: mean ± standard deviation over them; one merge of all of them has none."
    yield from remarks(runs, lambda run: iter([f"λ was chosen by the rule '{run.results.choice.rule}'."]))
    yield from remarks(runs, lambda run: weaknesses(run.results))
