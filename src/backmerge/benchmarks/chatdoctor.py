"""ChatDoctor: patients' questions, answered by a doctor; an answer is scored by BERTScore F1 with the doctor's.

Data: `lavita/ChatDoctor-iCliniq` on the hub (7,321 rows of `input`, `answer_icliniq`, and the answers of two models,
which are not used), from Li et al. (arXiv 2303.14070); its card states no licence. The training data is from another
site (`lavita/ChatDoctor-HealthCareMagic-100k`), so these queries are unseen. The instruction in every row of the
training data ("If you are a doctor, please answer the medical questions based on the patient's description.") is the
task's system prompt here, and is not part of the prompts.

Worked example: the prompt "Hello doctor, I have had a dry cough for a week. What should I take?", with the doctor's
answer as reference. The paper reports BERTScore F1 with DeBERTa-xlarge-mnli at layer 40, as the mean over 1,000
queries.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from backmerge.benchmarks.bertscore import DEFAULT_MODEL, BertScorer
from backmerge.benchmarks.metrics import BertScoreF1
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, options_of
from backmerge.errors import DataError
from backmerge.records import Example, Message
from backmerge.rows import sound_rows

NEEDS = "the hub, or chatdoctor=FILE; an encoder for BERTScore"

SYSTEM = "If you are a doctor, please answer the medical questions based on the patient's description."
HUB_NAME = "lavita/ChatDoctor-iCliniq"
NUM_QUERIES = 1000
ANSWER_COLUMNS = ("answer_icliniq", "output")


def chatdoctor(settings: BenchmarkSettings) -> Benchmark:
    """Return queries, scored by BERTScore F1 against the doctor's answer.

    Options: `num_queries`, `seed` (of their sample), `model` and `layer` (of BERTScore).

    Raises:
        DataError: see `chatdoctor_examples`.
    """
    options = options_of(settings, {"num_queries": None, "seed": None, "model": DEFAULT_MODEL, "layer": None})
    path = None if settings.data is None else Path(settings.data).expanduser()
    examples = chatdoctor_examples(path, options["num_queries"], options["seed"])
    return Benchmark(
        "chatdoctor",
        "utility",
        tuple(replace(e, messages=(Message("system", SYSTEM), *e.messages)) for e in examples),
        max_new_tokens=512,
        scorer=BertScoreF1(BertScorer(options["model"], options["layer"])),
        sampling={"repetition_penalty": 1.2},
    )


def chatdoctor_examples(
    path: Path | None = None, num_queries: int | None = None, seed: int | None = None
) -> tuple[Example, ...]:
    """Return queries with the doctors' answers, in the order of the data.

    Args:
        path: A JSON list, JSON Lines or CSV with the columns `input` and `answer_icliniq` (or `output`); by default the
            data set from the hub, without rows that have no query or no answer.
        num_queries: How many; by default 1,000 from the hub, and all of a file.
        seed: Seed of the sample; without it, the first `num_queries` rows.

    Raises:
        DataError: the hub or the file cannot be read, a row of the file has no query or no answer, or there are fewer
            than requested.
    """
    if path is None:
        examples = [
            _example(f"{HUB_NAME}, row {i}", i, row)
            for i, row in enumerate(_hub_rows())
            if _text(row, ("input",)) and _text(row, ANSWER_COLUMNS)
        ]
        num_queries = NUM_QUERIES if num_queries is None else num_queries
    else:
        examples = [_example(row.place, i, row.values) for i, row in enumerate(sound_rows(path))]
    source = HUB_NAME if path is None else str(path)
    if not examples:
        raise DataError(f"{source} contains no rows", remedy="give a file with the columns input and answer_icliniq.")
    if num_queries is None:
        return tuple(examples)
    if not 0 < num_queries <= len(examples):
        raise DataError(
            f"{num_queries} queries were requested, but {source} has only {len(examples)}",
            remedy=f"ask for 1 to {len(examples)}.",
        )
    if seed is None:
        return tuple(examples[:num_queries])
    chosen = random.Random(seed).sample(range(len(examples)), num_queries)  # noqa: S311 - no secret
    return tuple(examples[i] for i in sorted(chosen))


def _hub_rows() -> Sequence[Mapping[str, Any]]:
    from datasets import load_dataset

    try:
        rows: Sequence[Mapping[str, Any]] = load_dataset(HUB_NAME, split="train")
    except (OSError, ValueError) as error:  # datasets raises both if a download fails
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{HUB_NAME} could not be downloaded from the hub: {reason}",
            remedy="give the path of your own copy, with the columns input and answer_icliniq.",
        ) from error
    return rows


def _example(place: str, index: int, row: Mapping[str, Any]) -> Example:
    query, answer = _text(row, ("input",)), _text(row, ANSWER_COLUMNS)
    if not query or not answer:
        raise DataError(
            f"{place}: no text in {'answer_icliniq' if query else 'input'}; its columns are {sorted(map(str, row))}",
            remedy="each row needs the patient's query (input) and the doctor's answer (answer_icliniq, or output).",
        )
    if any("\ud800" <= character <= "\udfff" for character in query + answer):
        raise DataError(
            f"{place}: a text contains half of a surrogate pair, which UTF-8 files cannot store",
            remedy="write the character itself, or both halves of its escape.",
        )
    return Example(f"chatdoctor-{index}", (Message("user", query),), answer)


def _text(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """Return the first of the columns with more than white space, stripped; else an empty text."""
    texts = (row[column].strip() for column in columns if isinstance(row.get(column), str))
    return next((text for text in texts if text), "")
