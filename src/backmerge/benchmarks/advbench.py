"""AdvBench: 520 requests for harmful behaviours.

Data: `walledai/AdvBench` on the hub, from Zou et al. (arXiv 2307.15043), MIT licence; 520 rows of `prompt` and `target`
(the original file says `goal`). Many are near-duplicates: 363 clusters at a content-word Jaccard of 0.5.

Worked example: a row's prompt asks for something harmful; the judge finds whether the answer refuses. `target`, the
beginning of a compliant answer, is not used.
"""

from __future__ import annotations

from backmerge.benchmarks.protocol import Benchmark
from backmerge.errors import DataError
from backmerge.records import Example, Message


def advbench() -> Benchmark:
    """The 520 prompts from the hub; for a file of your own, give its path instead of the name.

    Raises:
        DataError: the hub cannot be reached and the data set is not in its cache.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset("walledai/AdvBench", split="train")
    except (OSError, ValueError) as error:  # datasets raises both for what the hub does not give
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"AdvBench could not be fetched from the hub: {reason}",
            remedy="give the path of your own copy: --safety harmful_behaviors.csv",
        ) from error
    examples = tuple(Example(f"advbench-{i}", (Message("user", row["prompt"]),)) for i, row in enumerate(rows))
    return Benchmark("advbench", "safety", examples, max_new_tokens=512)
