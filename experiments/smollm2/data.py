"""Make the rows of the two tasks: `python experiments/smollm2/data.py --data DATA --out DIR`.

- reasoning: four sets of Flan's chains of thought (creak, sensemaking, strategyqa, qasc), as in the paper; the answer
  ends in "So the answer is ...".
- tools: APIBench's calls of `torch.hub.load` (Gorilla), each to be chosen among three; as Gorilla with a retriever.
  Calls that are no valid Python are left out.
- ordinary.jsonl: requests of self-instruct, for guards.

DATA holds the folders `flan_cot`, `apibench` and `self_instruct` as their authors publish them. Each task gets
NAME-train.jsonl, NAME-validation.jsonl (to choose learning rate and steps) and NAME-test.jsonl. No question of one file
is near one of another.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from backmerge.benchmarks.split import clusters_of
from backmerge.demo.smollm2.align import ordinary_prompts
from backmerge.finetuning.overlap import overlaps
from backmerge.records import Example, Message
from backmerge.runs import write_whole

SEED = 0
FORMS = {
    "reasoning": '{}\nThink first, then end with "So the answer is ...".',
    "tools": "{}\nAnswer with the one call that fits:\n{}",
}
SETS = ("creak", "sensemaking", "strategyqa", "qasc")
NUM_TRAINING = 250  # of each set of Flan
NUM_VALIDATION = 25
NUM_TEST = 75
NUM_VALIDATION_CALLS = 60
NUM_MORE_TEST_CALLS = 60  # out of the training file: the published test file has 186
NUM_CHOICES = 3  # calls in a question about tools
MAX_ABOUT = 60  # characters of what a call does
MAX_CHARACTERS = 400  # of a question and of a rationale
INSTRUCTION = re.compile(r"Instruction['\"]?:\s*['\"]?(.+?)['\"]?,?\s*(?:'|\"|###|\n)*Output", re.DOTALL)


class Row(NamedTuple):
    """A question, the text to learn, what an answer is scored against, and what is shown after the question."""

    question: str
    answer: str
    reference: str
    shown: str = ""


def reasoning(folder: Path, draw: random.Random) -> tuple[list[Row], list[Row], list[Row]]:
    """Return the rows to train on, to validate on and to test on; the same number of each set."""
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for name in SETS:
        rows = []
        for line in (folder / f"{name}_train.tsv").read_text(encoding="utf-8").splitlines():
            question, answer, rationale = (text.replace("\\n", "\n").strip() for text in line.split("\t"))
            if max(len(question), len(rationale)) <= MAX_CHARACTERS:
                rows.append(Row(question, f"{rationale} So the answer is {answer}.", answer.strip("()")))
        draw.shuffle(rows)
        for part, number in zip(parts, (NUM_TRAINING, NUM_VALIDATION, NUM_TEST), strict=True):
            part.extend(rows[:number])
            del rows[:number]
    return parts


def tools(folder: Path, draw: random.Random) -> tuple[list[Row], list[Row], list[Row]]:
    """Return the rows to train on, to validate on and to test on."""
    training, test = (_calls(folder / f"torchhub_{name}.jsonl") for name in ("train", "eval"))
    draw.shuffle(training)
    validation, more, training = (
        training[:NUM_VALIDATION_CALLS],
        training[NUM_VALIDATION_CALLS : NUM_VALIDATION_CALLS + NUM_MORE_TEST_CALLS],
        training[NUM_VALIDATION_CALLS + NUM_MORE_TEST_CALLS :],
    )
    return training, validation, test + more


def _calls(file: Path) -> list[Row]:
    given = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    given = [row for row in given if _is_python(row["api_call"])]
    draw = random.Random(SEED)  # noqa: S311 - no secrets
    rows = []
    for row in given:
        found = INSTRUCTION.search(row["code"])
        if found is None:
            raise ValueError(f"{file}: a row without an instruction")
        others = {_described(other): None for other in given if _domain(other) != _domain(row)}
        choices = [_described(row), *draw.sample(list(others), NUM_CHOICES - 1)]
        draw.shuffle(choices)
        rows.append(Row(found[1].strip(), row["api_call"], row["api_call"], "\n".join(choices)))
    return rows


def _described(row: Mapping[str, Any]) -> str:
    """A call, with what its makers say that it does."""
    return f"- {_domain(row)}, {row['api_data']['functionality'][:MAX_ABOUT]}: {row['api_call']}"


def _domain(row: Mapping[str, Any]) -> str:
    domain: str = row["api_data"]["domain"]
    return domain


def _is_python(call: str) -> bool:
    try:
        ast.parse(call)
    except SyntaxError:
        return False
    return True


def clusters(rows: Sequence[Row]) -> list[str]:
    """Return a name for each row, the same for near-duplicates of one question."""
    return clusters_of([Example(str(number), (Message("user", row.question),)) for number, row in enumerate(rows)])


def apart(rows: Sequence[Row], others: Iterable[Row]) -> list[Row]:
    """Return the rows whose questions are near none of the others'."""
    examples = [Example(str(number), (Message("user", row.question),)) for number, row in enumerate(rows)]
    known = [Example(str(number), (Message("user", row.question),)) for number, row in enumerate(others)]
    near = {overlap.example for overlap in overlaps(examples, "others", known)}
    return [row for number, row in enumerate(rows) if str(number) not in near]


def main() -> None:
    """Write the six files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    for name, make, folder in (("reasoning", reasoning, "flan_cot"), ("tools", tools, "apibench")):
        training, validation, test = make(given.data / folder, random.Random(SEED))  # noqa: S311 - no secrets
        training = apart(training, [*validation, *test])
        validation = apart(validation, test)
        for part, rows in (("train", training), ("validation", validation), ("test", test)):
            texts = [
                {
                    "prompt": FORMS[name].format(row.question, row.shown),
                    "answer": row.answer if part == "train" else row.reference,
                }
                for row in rows
            ]
            if (
                name == "tools" and part != "train"
            ):  # by the question: the calls shown after it would join nearly all rows
                texts = [text | {"cluster": cluster} for text, cluster in zip(texts, clusters(rows), strict=True)]
            write_whole(given.out / f"{name}-{part}.jsonl", "".join(json.dumps(text) + "\n" for text in texts))
        print(f"{name}: {len(training)} rows to train on, {len(validation)} to validate on, {len(test)} to test on")  # noqa: T201
    lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in ordinary_prompts(given.data / "self_instruct"))
    write_whole(given.out / "ordinary.jsonl", "".join(lines))


if __name__ == "__main__":
    main()
