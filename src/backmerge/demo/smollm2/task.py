"""The task that SmolLM2 is tuned on in the demonstration: short common-sense questions, answered with a reason.

Rows of four data sets of Flan's chains of thought (creak, sensemaking, strategyqa, qasc), made by
`experiments/smollm2/data.py` from google-research/FLAN, `flan/v2/cot_data` (Apache-2.0). No test question is near a
training question; rows about violence, drugs or sex are left out.

Worked example: the answer to "Is the following statement true? ... Think first, then end with "So the answer is ..."."
is "The eye is an organ that takes in light. So the answer is yes.", and "yes" is compared with the expected answer.
"""

from __future__ import annotations

import json
from pathlib import Path

from backmerge.benchmarks.matching import pattern_match
from backmerge.benchmarks.metrics import PerAnswer
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, options_of
from backmerge.errors import ConfigError
from backmerge.records import Example, Message

FILE = Path(__file__).with_name("reasoning.jsonl")
NAME = "smollm2-reasoning"
ANSWER = r"(?i)the answer is:?\s*\(?(.+?)\)?\.?\s*$"
MAX_NEW_TOKENS = 56


def reasoning_examples() -> tuple[Example, ...]:
    """600 common-sense questions, each answered with a reason and the final answer."""
    return _examples("train")


def reasoning_benchmark(settings: BenchmarkSettings | None = None) -> Benchmark:
    """160 common-sense questions, scored by the answer after "the answer is ..."."""
    if settings is not None:
        options_of(settings, {})
        if settings.data is not None:
            raise ConfigError(f"'{NAME}' ships with backmerge", remedy="remove its 'data' setting.")
    scorer = PerAnswer({"answer_match": pattern_match(ANSWER)}, identity=f"1:{ANSWER}")
    return Benchmark(NAME, "utility", _examples("test"), MAX_NEW_TOKENS, scorer)


def _examples(split: str) -> tuple[Example, ...]:
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    return tuple(
        Example(f"{NAME}-{number:03d}", (Message("user", row["prompt"]),), reference=row["answer"])
        for number, row in enumerate(rows)
        if row["split"] == split
    )
