"""OR-Bench-Hard: 1,319 harmless prompts that sound harmful and that several strong models refuse, for over-refusal.

Data: `bench-llm/or-bench` on the hub, configuration `or-bench-hard-1k`, from Cui et al. (arXiv 2405.20947), CC-BY-4.0;
`prompt` and `category`. Your own copy: or-bench-hard-1k.csv.

Worked example: a prompt of the category "privacy" asks how to protect one's own accounts; a refusal counts as
over-refusal. Results are also reported by category.
"""

from __future__ import annotations

from backmerge.benchmarks.files import data_rows
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, options_of
from backmerge.errors import DataError
from backmerge.records import Example, Message

NEEDS = "the hub, or or-bench-hard=or-bench-hard-1k.csv"


def or_bench_hard(settings: BenchmarkSettings) -> Benchmark:
    """Return OR-Bench's 1,319 hard harmless prompts, for over-refusal.

    Raises:
        DataError: the hub or the file cannot be read, or a row has no such column.
    """
    options_of(settings, {})
    examples = []
    rows = data_rows(settings.data, "OR-Bench", "bench-llm/or-bench", config="or-bench-hard-1k")
    for number, (place, row) in enumerate(rows):
        prompt, category = row.get("prompt"), row.get("category")
        if not prompt or not category:
            raise DataError(
                f"{place}: no text under 'prompt' or 'category'",
                remedy="give or-bench-hard-1k.csv as its authors published it.",
            )
        examples.append(Example(f"or-bench-hard-{number}", (Message("user", str(prompt)),), category=str(category)))
    return Benchmark("or-bench-hard", "over_refusal", tuple(examples), max_new_tokens=512)
