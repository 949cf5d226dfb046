"""A judge held against people: a blinded sample to label, and the attack success rate corrected by the labels.

RUN/labels/to_label.csv     item, prompt, answer, and an empty column; neither the model nor the judge's verdict
RUN/labels/key.jsonl        which item is which model's answer, what the judge said, and its chance of being drawn
RUN/labels/corrected.json   rates as judged and as corrected
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from backmerge.benchmarks.split import clusters_of
from backmerge.errors import DataError, RunError
from backmerge.pipeline.given import read_records
from backmerge.pipeline.results import plain
from backmerge.records import Example, Message
from backmerge.runs import write_whole
from backmerge.statistics import Corrected, corrected_rate, effective_size

FOLDER, TO_LABEL, KEY, CORRECTED = "labels", "to_label.csv", "key.jsonl", "corrected.json"
COLUMN = "harmful"
ANSWERS = {"yes": True, "y": True, "1": True, "true": True, "no": False, "n": False, "0": False, "false": False}


class Judged(NamedTuple):
    """An answer with its verdict."""

    model: str
    benchmark: str
    example: str
    prompt: str
    answer: str
    harmful: bool


def judged_answers(run: Path, model: str, benchmark: str | None) -> list[Judged]:
    """A model's answers that the judge scored; of merges with several tuned models, all of them.

    Raises:
        RunError: the run is unfinished, or has none.
    """
    found = []
    models = set()
    for (name, of, _), completions, verdicts in read_records(run):
        if not verdicts:
            continue
        models.add(name.partition("/")[0])
        if name.partition("/")[0] != model and name != model:
            continue
        if benchmark is not None and of != benchmark:
            continue
        found += [
            Judged(name, of, completion.example, completion.prompt, completion.text, verdict.harmful)
            for completion, verdict in zip(completions, verdicts, strict=True)
            if verdict.harmful is not None
        ]
    if not found:
        raise RunError(
            f"{run} has no judged answers of '{model}'" + (f" on '{benchmark}'" if benchmark else ""),
            remedy=f"its models are: {', '.join(sorted(models))}.",
        )
    return found


def export_sample(
    run: Path, model: str, benchmark: str | None, number: int, seed: int, *, is_by_verdict: bool
) -> tuple[Path, int]:
    """Draw answers for a person to label, and write them without the model's name and the verdict.

    Args:
        run: A finished run.
        model: Whose answers, such as `tuned` or `linear@0.4`.
        benchmark: Only this one's.
        number: How many.
        seed: Of the draw.
        is_by_verdict: Whether half of them are answers that the judge calls harmful: more is learned where these are
            few. The chance of being drawn is kept and counted.

    Returns:
        The file, and how many items it holds.

    Raises:
        RunError: there is nothing to draw from, or labels are there already.
    """
    answers = judged_answers(run, model, benchmark)
    place = run / FOLDER
    if (place / KEY).exists():
        raise RunError(f"{place} holds a sample already", remedy="label that one, or move the folder away.")
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
        writer.writerow([item, answer.prompt, answer.answer, ""])
        keys.append(
            {"item": item, "chance": chance, "model": answer.model, "benchmark": answer.benchmark}
            | {"example": answer.example, "judged": answer.harmful}
        )
    place.mkdir(mode=0o700, exist_ok=True)
    write_whole(place / TO_LABEL, table.getvalue())
    about = {"model": model, "benchmark": benchmark}
    write_whole(place / KEY, "".join(json.dumps(row) + "\n" for row in (about, *keys)))
    return place / TO_LABEL, len(drawn)


def corrected_by(run: Path, labels: Path) -> dict[str, Any]:
    """The model's attack success rate as judged, and as the labels correct it; also written beside the sample.

    Raises:
        RunError: no sample was drawn from this run.
        DataError: a label is neither yes nor no, an item is none of the sample's, or nothing is labelled.
    """
    place = run / FOLDER
    if not (place / KEY).is_file():
        raise RunError(f"{run} has no sample to label", remedy="draw one first: backmerge label RUN --model tuned.")
    about, *keys = (json.loads(line) for line in (place / KEY).read_text(encoding="utf-8").splitlines())
    by_item = {str(key["item"]): key for key in keys}
    given = _read_labels(labels, by_item)
    answers = judged_answers(run, about["model"], about["benchmark"])
    pairs = [(bool(by_item[item]["judged"]), label) for item, label in given.items()]
    weights = [1 / by_item[item]["chance"] for item in given]
    judged = [answer.harmful for answer in answers]
    clusters = _clusters(answers)
    found: Corrected = corrected_rate(
        judged, pairs, weights, design_effect=len(judged) / effective_size([float(j) for j in judged], clusters)
    )
    results = plain({**about, **found._asdict(), "differ": sum(a != b for a, b in pairs)})
    write_whole(place / CORRECTED, json.dumps(results, indent=2) + "\n")
    return results


def _clusters(answers: Sequence[Judged]) -> list[str]:
    """Answers to one prompt, or to near-duplicates of it, belong together, whichever model gave them."""
    examples = [Example(f"{number}", (Message("user", answer.prompt),)) for number, answer in enumerate(answers)]
    return clusters_of(examples)


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
            raise DataError(f"{labels}: there is no item '{item}' in the sample", remedy="keep the column 'item'.")
        if label not in ANSWERS:
            raise DataError(f"{labels}: item {item} is labelled '{label}'", remedy=f"write yes or no under '{COLUMN}'.")
        given[item] = ANSWERS[label]
    repeated = [item for item, times in Counter(str(row.get("item")) for row in rows).items() if times > 1]
    if repeated:
        raise DataError(f"{labels}: item {repeated[0]} stands there twice", remedy="give each item once.")
    if not given:
        raise DataError(
            f"{labels} holds no labels", remedy=f"write yes or no under '{COLUMN}'; blanks are passed over."
        )
    return given
