"""Compare a judge with people: a blinded sample to label, and the attack success rate corrected with the labels.

RUN/labels/to_label.csv     item, prompt, answer, and an empty column; neither the model nor the judge's verdict
RUN/labels/key.jsonl        which item is which model's answer, the judge's verdict, and the chance of being drawn
RUN/labels/corrected.json   rates by the judge and corrected
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from backmerge.errors import DataError, RunError
from backmerge.measuring.recorded import read_records
from backmerge.runs import key_of, write_whole
from backmerge.statistics import Corrected, as_plain, corrected_rate, effective_size

FOLDER, TO_LABEL, KEY, CORRECTED = "labels", "to_label.csv", "key.jsonl", "corrected.json"
COLUMN = "harmful"
ANSWERS = {"yes": True, "y": True, "1": True, "true": True, "no": False, "n": False, "0": False, "false": False}


class Judged(NamedTuple):
    """An answer to a harmful request, with its verdict."""

    model: str
    benchmark: str
    example: str
    sample: int
    question: str
    cluster: str
    answer: str
    harmful: bool

    @property
    def mark(self) -> str:
        """A hash that changes with the answer and the verdict."""
        return key_of(list(self))


def judged_answers(run: Path, model: str, benchmark: str | None) -> list[Judged]:
    """Return a model's scored answers to harmful requests; those of all tuned models if a point has several.

    Raises:
        RunError: the run is unfinished, or has none.
    """
    found = []
    models = set()
    for recorded in read_records(run):
        if recorded.kind != "safety":
            continue
        point = recorded.model.partition("/")[0]
        models.add(point)
        if model not in (point, recorded.model) or benchmark not in (None, recorded.benchmark):
            continue
        rows = zip(recorded.completions, recorded.questions, recorded.clusters, recorded.verdicts, strict=True)
        found += [
            Judged(
                recorded.model,
                recorded.benchmark,
                completion.example,
                completion.sample,
                question,
                f"{recorded.benchmark}/{cluster}",
                completion.text,
                verdict.harmful,
            )
            for completion, question, cluster, verdict in rows
            if verdict.harmful is not None
        ]
    if not found:
        raise RunError(
            f"{run} has no judged answers of '{model}' to harmful requests"
            + (f" of '{benchmark}'" if benchmark else ""),
            remedy=f"its models are: {', '.join(sorted(models)) or 'none'}.",
        )
    return found


def export_sample(
    run: Path, model: str, benchmark: str | None, number: int, seed: int, *, is_by_verdict: bool
) -> tuple[Path, int]:
    """Draw answers for a person to label, and write them without the model's name and the verdict.

    Args:
        run: A finished run.
        model: Name of the model, such as `tuned` or `linear@0.4`.
        benchmark: Use only this one's answers.
        number: Number of answers.
        seed: Seed of the draw.
        is_by_verdict: Whether half of them are answers that the judge calls harmful, which is more informative if these
            are few. The probability of being drawn is recorded and accounted for.

    Returns:
        The file, and how many items it has.

    Raises:
        RunError: there is nothing to draw from, or there are labels already.
    """
    answers = judged_answers(run, model, benchmark)
    place = run / FOLDER
    if (place / KEY).exists():
        raise RunError(f"{place} already has a sample", remedy="label that one, or move the folder away.")
    rng = random.Random(f"backmerge-labels-{seed}")  # noqa: S311 - a sample, not a secret
    strata = [answers]
    if is_by_verdict:
        strata = [[a for a in answers if a.harmful], [a for a in answers if not a.harmful]]
    drawn: list[tuple[Judged, float]] = []
    for stratum in strata:
        wanted = min(len(stratum), number // len(strata))
        drawn += [(answer, wanted / len(stratum)) for answer in rng.sample(stratum, wanted)]
    rng.shuffle(drawn)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["item", "prompt", "answer", COLUMN])
    keys = []
    for item, (answer, chance) in enumerate(drawn, start=1):
        writer.writerow([item, _as_text(answer.question), _as_text(answer.answer), ""])
        keys.append({"item": item, "chance": chance, "mark": answer.mark, "judged": answer.harmful})
    if len(drawn) < 2:
        raise RunError(f"{len(drawn)} answers are too few for a sample", remedy="draw more: --number 100.")
    place.mkdir(mode=0o700, exist_ok=True)
    write_whole(place / TO_LABEL, table.getvalue())
    about = {"model": model, "benchmark": benchmark}
    write_whole(place / KEY, "".join(json.dumps(row) + "\n" for row in (about, *keys)))
    return place / TO_LABEL, len(drawn)


def corrected_by(run: Path, labels: Path) -> dict[str, Any]:
    """Return the model's attack success rate by the judge, and corrected with the labels; also write it to a file.

    Raises:
        RunError: no sample was drawn from this run.
        DataError: a label is neither yes nor no, an item is not in the sample, or nothing is labelled.
    """
    place = run / FOLDER
    if not (place / KEY).is_file():
        raise RunError(f"{run} has no sample to label", remedy="draw one first: backmerge label RUN --model tuned.")
    try:
        about, *keys = (json.loads(line) for line in (place / KEY).read_text(encoding="utf-8").splitlines())
        by_item = {str(key["item"]): {name: key[name] for name in ("chance", "mark", "judged")} for key in keys}
        asked = str(about["model"]), str(about["benchmark"]) if about["benchmark"] is not None else None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RunError(
            f"{place / KEY} is damaged: {error}", remedy=f"move {place} away, draw again, and copy your labels."
        ) from error
    given = _read_labels(labels, by_item)
    answers = judged_answers(run, *asked)
    known = {answer.mark for answer in answers}
    if any(by_item[item]["mark"] not in known for item in given):
        raise RunError(
            f"{run} has changed since the sample was drawn: its answers or verdicts differ",
            remedy=f"move {place} away, and draw again.",
        )
    pairs = [(bool(by_item[item]["judged"]), label) for item, label in given.items()]
    weights = [1 / by_item[item]["chance"] for item in given]
    judged = [answer.harmful for answer in answers]
    clusters = [answer.cluster for answer in answers]
    found: Corrected = corrected_rate(
        judged, pairs, weights, design_effect=len(judged) / effective_size([float(j) for j in judged], clusters)
    )
    results = as_plain({**about, **found._asdict(), "differ": sum(a != b for a, b in pairs)})
    write_whole(place / CORRECTED, json.dumps(results, indent=2) + "\n")
    return results


def _as_text(cell: str) -> str:
    """Return a cell that no spreadsheet interprets as a formula."""
    return f"'{cell}" if cell[:1] in ("=", "+", "-", "@") else cell


def _read_labels(labels: Path, by_item: Mapping[str, Any]) -> dict[str, bool]:
    given: dict[str, bool] = {}
    try:
        with labels.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {labels}: {error}", remedy="give the CSV with the labels filled in.") from error
    for row in rows:
        item, label = str(row.get("item") or "").strip(), str(row.get(COLUMN) or "").strip().casefold()
        if not label:
            continue
        if item not in by_item:
            raise DataError(f"{labels}: the sample has no item '{item}'", remedy="keep the column 'item'.")
        if label not in ANSWERS:
            raise DataError(f"{labels}: item {item} is labelled '{label}'", remedy=f"write yes or no under '{COLUMN}'.")
        given[item] = ANSWERS[label]
    repeated = [item for item, times in Counter(str(row.get("item")) for row in rows).items() if times > 1]
    if repeated:
        raise DataError(f"{labels}: item {repeated[0]} is repeated", remedy="give each item once.")
    if not given:
        raise DataError(f"{labels} has no labels", remedy=f"write yes or no under '{COLUMN}'; blanks are ignored.")
    return given
