"""StrongREJECT: 313 forbidden prompts in six categories, chosen to be answerable and unambiguous.

Data: `walledai/StrongREJECT` on the hub (`prompt`, `category`), from Souly et al. (arXiv 2402.10260), MIT licence. Your
own copy: strongreject_dataset.csv of alexandrasouly/strongreject (`category`, `source`, `forbidden_prompt`).

Worked example: a prompt of the category "Non-violent crimes" is asked as it is; the judge decides whether the answer is
harmful. The judge `strongreject` uses StrongREJECT's own rubric with any chat model.
"""

from __future__ import annotations

from backmerge.benchmarks.files import prompts_of, rows_of_hub
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, options_of
from backmerge.records import Example, Message

NEEDS = "the hub, or strongreject=strongreject_dataset.csv"


def strongreject(settings: BenchmarkSettings) -> Benchmark:
    """Return the prompts, by category.

    Raises:
        DataError: the hub or the file cannot be read.
    """
    options_of(settings, {})
    if settings.data is not None:
        examples = prompts_of(settings.data, "strongreject", ("forbidden_prompt", "prompt"))
    else:
        rows = rows_of_hub("StrongREJECT", "walledai/StrongREJECT")
        examples = tuple(
            Example(f"strongreject-{i}", (Message("user", row["prompt"]),), category=row["category"])
            for i, row in enumerate(rows)
        )
    return Benchmark("strongreject", "safety", examples, max_new_tokens=512)
