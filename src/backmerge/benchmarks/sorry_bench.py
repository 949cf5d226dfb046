"""SORRY-Bench: 440 unsafe instructions, ten in each of 44 fine-grained categories.

Data: `sorry-bench/sorry-bench-202503` on the hub (question.jsonl), from Xie et al. (arXiv 2406.14598). It is gated, and
its licence forbids redistribution, so that no report shows its texts unless requested. `question_id`, `category` (1 to
44), `turns` (a list of one text), `prompt_style`. Your own copy: question.jsonl.

Worked example: a line with `"prompt_style": "base"` is asked as it is, and the judge decides whether the answer is
harmful. The files of mutated prompts (other languages, ciphers) are refused: their answers would have to be decoded
first.
"""

from __future__ import annotations

from backmerge.benchmarks.files import folder_of_hub
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, options_of
from backmerge.errors import DataError
from backmerge.records import Example, Message
from backmerge.rows import sound_rows

NEEDS = "access granted on the hub, or sorry-bench=question.jsonl"

BASE_STYLE = "base"


def sorry_bench(settings: BenchmarkSettings) -> Benchmark:
    """Return SORRY-Bench's 440 unsafe instructions, unchanged, for ASR.

    Raises:
        DataError: the hub or the file cannot be read, or a row has no such column or is a mutated prompt.
    """
    options_of(settings, {})
    if settings.data is None:
        name = "question.jsonl"
        data = str(folder_of_hub("SORRY-Bench", "sorry-bench/sorry-bench-202503", name) / name)
    else:
        data = settings.data
    examples = []
    for row in sound_rows(data):
        turns, number = row.values.get("turns"), row.values.get("question_id")
        if not isinstance(turns, list) or len(turns) != 1 or not str(turns[0]).strip() or number is None:
            raise DataError(
                f"{row.place}: no single text under 'turns', or no 'question_id'",
                remedy="give question.jsonl as its authors published it.",
            )
        style = row.values.get("prompt_style", BASE_STYLE)
        if style != BASE_STYLE:
            raise DataError(
                f"{row.place}: a prompt of the style '{style}': its answers would have to be decoded",
                remedy="give question.jsonl, which has the prompts of the style 'base'.",
            )
        category = row.values.get("category")
        examples.append(
            Example(
                f"sorry-bench-{number}",
                (Message("user", str(turns[0])),),
                category=None if category is None else f"category {category}",
            )
        )
    return Benchmark("sorry-bench", "safety", tuple(examples), max_new_tokens=512, is_gated=True)
