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
        """Changes with the answer and the verdict."""
        return key_of(list(self))


def judged_answers(run: Path, model: str, benchmark: str | None) -> list[Judged]:
    """A model's answers to harmful requests that the judge scored; of several tuned models at a point, all of theirs.

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
        writer.writerow([item, _as_text(answer.question), _as_text(answer.answer), ""])
        keys.append({"item": item, "chance": chance, "mark": answer.mark, "judged": answer.harmful})
    if len(drawn) < 2:
        raise RunError(f"{len(drawn)} answers are no sample", remedy="ask for more: --number 100.")
    place.mkdir(mode=0o700, exist_ok=True)
    write_whole(place / TO_LABEL, table.getvalue())
    about = {"model": model, "benchmark": benchmark}
    write_whole(place / KEY, "".join(json.dumps(row) + "\n" for row in (about, *keys)))
    return place / TO_LABEL, len(drawn)


def corrected_by(run: Path, labels: Path) -> dict[str, Any]:
    """The model's attack success rate as judged, and as the labels correct it; also written next to the sample.

    Raises:
        RunError: no sample was drawn from this run.
        DataError: a label is neither yes nor no, an item is none of the sample's, or nothing is labelled.
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
            f"{place / KEY} is damaged: {error}", remedy=f"move {place} away, draw anew, and copy your labels."
        ) from error
    given = _read_labels(labels, by_item)
    answers = judged_answers(run, *asked)
    known = {answer.mark for answer in answers}
    if any(by_item[item]["mark"] not in known for item in given):
        raise RunError(
            f"{run} has changed since the sample was drawn: its answers or verdicts are others",
            remedy=f"move {place} away, and draw anew.",
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
    """A cell that no spreadsheet takes for a formula."""
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
