"""Compare recipes of a run with Linear at equal task score: `python experiments/smollm2/paired.py RUN [SERIES]`.

For each other recipe, Linear's is taken that has the most utility among those with no more than its own. Both answered
the same selection prompts. The tables give the differences with 95 % intervals over clusters of near-duplicates, seeds
averaged for each prompt, and a one-sided p of a lower attack success rate (sign flips over clusters, Holm over the
table).
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from backmerge.api import load_results
from backmerge.results import RestoreResults
from backmerge.statistics import bootstrap_difference, holm, sign_flip_p


class Scores(NamedTuple):
    """A recipe's values, seeds averaged, and the clusters, by prompt."""

    values: Mapping[str, float]
    clusters: Mapping[str, str]

    @property
    def mean(self) -> float:
        """Over prompts."""
        return sum(self.values.values()) / len(self.values)


def scores_of(run: Path, file: str, kind: str, metric: str) -> dict[str, Scores]:
    """Return each recipe's scores on the selection prompts of a kind, in [0, 1], by its name."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    clusters: dict[str, str] = {}
    for line in (run / "records" / file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] == kind and row["split"] == "selection":
            value = row["values"][metric] if file == "values.jsonl" else row[metric]
            found[row["model"].partition("/")[0]][row["example"]].append(float(value))
            clusters[row["example"]] = row["cluster"]
    return {
        name: Scores({example: sum(of) / len(of) for example, of in values.items()}, clusters)
        for name, values in found.items()
    }


def difference(first: Scores, second: Scores) -> tuple[str, float]:
    """Return first less second in points with its interval, and a one-sided p of a negative one."""
    examples = sorted(first.values)
    ours, theirs = ([of.values[example] for example in examples] for of in (first, second))
    clusters = [first.clusters[example] for example in examples]
    found = bootstrap_difference(ours, theirs, clusters)
    p = sign_flip_p([b - a for a, b in zip(ours, theirs, strict=True)], clusters)
    return f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]", p


def main(run: Path, reference: str) -> None:
    """Print the table."""
    results = load_results(run)
    if not isinstance(results, RestoreResults):
        raise SystemExit(f"{run} is no run over recipes")
    metric = next(row.metric for row in results.benchmarks if row.kind == "utility")
    task, asr = scores_of(run, "values.jsonl", "utility", metric), scores_of(run, "verdicts.jsonl", "safety", "harmful")
    references = [row.point for row in results.points if row.series == reference]
    rows, p_values = [], []
    for point in (row.point for row in results.points if row.role == "merged" and row.series != reference):
        below = [one for one in references if task[one].mean <= task[point].mean]
        if below:
            other = max(below, key=lambda one: task[one].mean)
            less, p = difference(asr[point], asr[other])
            rows.append((point, other, difference(task[point], task[other])[0], less))
            p_values.append(p)
    print("| recipe | against | task, points more | attack success rate, points | p (Holm) |")  # noqa: T201
    print("|---|---|--:|--:|--:|")  # noqa: T201
    for row, p in zip(rows, holm(p_values), strict=True):
        print(f"| {' | '.join(row)} | {p:.4f} |")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(sys.argv[2:] or ["Linear"]))
