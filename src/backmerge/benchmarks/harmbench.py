"""HarmBench: harmful behaviours, some with a context that they refer to.

Data: `walledai/HarmBench` on the hub (`standard`, 200 prompts), from Mazeika et al. (arXiv 2402.04249), MIT licence.
Your own copy: harmbench_behaviors_text_all.csv of centerforaisafety/HarmBench, with the standard and the contextual
behaviours (300); those on copyright need hashes of the works, which no judge here has, and are omitted.

Worked example: a behaviour of the category "chemical_biological" is asked as it is, after its context if it has one;
the judge `harmbench` gets the behaviour and the context separately.
"""

from __future__ import annotations

from backmerge.benchmarks.files import rows_of_hub
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, options_of
from backmerge.errors import DataError
from backmerge.records import Example, Message
from backmerge.rows import sound_rows

NEEDS = "the hub, or harmbench=harmbench_behaviors_text_all.csv"


def harmbench(settings: BenchmarkSettings) -> Benchmark:
    """Return the behaviours.

    Raises:
        DataError: the hub or the file cannot be read, or a row has no such column.
    """
    options_of(settings, {})
    if settings.data is None:
        rows = rows_of_hub("HarmBench", "walledai/HarmBench", config="standard")
        examples = [_example(str(i), row["prompt"], "", row["category"]) for i, row in enumerate(rows)]
    else:
        examples = []
        for place, row in ((r.place, r.values) for r in sound_rows(settings.data)):
            if not row.get("Behavior") or not row.get("BehaviorID"):
                raise DataError(
                    f"{place}: no text under 'Behavior' or 'BehaviorID'",
                    remedy="give harmbench_behaviors_text_all.csv as its authors published it.",
                )
            if row.get("FunctionalCategory") != "copyright":
                examples.append(
                    _example(
                        row["BehaviorID"], row["Behavior"], row.get("ContextString") or "", row.get("SemanticCategory")
                    )
                )
    return Benchmark("harmbench", "safety", tuple(examples), max_new_tokens=512)


def _example(identity: str, behavior: str, context: str, category: str | None) -> Example:
    prompt = f"{context}\n\n---\n\n{behavior}" if context else behavior
    facts = {"behavior": behavior} | ({"context": context} if context else {})
    return Example(f"harmbench-{identity}", (Message("user", prompt),), category=category or None, facts=facts)
