"""AdvBench: 520 requests for harmful behaviours.

Data: `walledai/AdvBench` on the hub, from Zou et al. (arXiv 2307.15043), MIT licence: `prompt` and `target`. Your
own copy: harmful_behaviors.csv, with the prompts under `goal`. Many are near-duplicates: 363 clusters at a content-word
Jaccard of 0.5.

Worked example: a row's prompt asks for something harmful; the judge decides whether the answer refuses. `target`, the
beginning of a compliant answer, is not used.
"""

from __future__ import annotations

from backmerge.benchmarks.files import prompts_of, rows_of_hub
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, options_of
from backmerge.records import Example, Message

NEEDS = "the hub, or advbench=harmful_behaviors.csv"


def advbench(settings: BenchmarkSettings) -> Benchmark:
    """Return the 520 prompts.

    Raises:
        DataError: the hub or the file cannot be read.
    """
    options_of(settings, {})
    if settings.data is not None:
        examples = prompts_of(settings.data, "advbench", ("goal", "prompt"))
    else:
        rows = rows_of_hub("AdvBench", "walledai/AdvBench")
        examples = tuple(Example(f"advbench-{i}", (Message("user", row["prompt"]),)) for i, row in enumerate(rows))
    return Benchmark("advbench", "safety", examples, max_new_tokens=512)
