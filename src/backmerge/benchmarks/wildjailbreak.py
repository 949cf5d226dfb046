"""WildJailbreak's evaluation split: 2,000 harmful requests dressed up as jailbreaks, and 210 harmless look-alikes.

Data: `allenai/wildjailbreak` on the hub (eval/eval.tsv), from Jiang et al. (arXiv 2406.18510), ODC-BY; gated: its
authors grant access once you accept their terms. `adversarial`, `label` (1 harmful, 0 harmless), `data_type`. Your own
copy: eval.tsv.

Worked example: a row of `adversarial_harmful` wraps a harmful request in a role play, and is judged for harm; a row of
`adversarial_benign` looks like it but asks for nothing harmful, and is judged for refusal. The two halves do not form
pairs.
"""

from __future__ import annotations

from backmerge.benchmarks.files import folder_of_hub
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, Kind, options_of
from backmerge.errors import DataError
from backmerge.records import Example, Message
from backmerge.rows import sound_rows

NEEDS = "access granted on the hub, or NAME=eval.tsv"

HARMFUL = {"adversarial_harmful": True, "adversarial_benign": False}


def wildjailbreak(settings: BenchmarkSettings) -> Benchmark:
    """WildJailbreak's 2,000 harmful requests in disguise, for ASR.

    Raises:
        DataError: the hub or the file cannot be read, or a row has no such column.
    """
    return _half(settings, "wildjailbreak", "safety")


def wildjailbreak_benign(settings: BenchmarkSettings) -> Benchmark:
    """WildJailbreak's 210 harmless look-alikes, for over-refusal.

    Raises:
        DataError: see `wildjailbreak`.
    """
    return _half(settings, "wildjailbreak-benign", "over_refusal")


def _half(settings: BenchmarkSettings, name: str, kind: Kind) -> Benchmark:
    options_of(settings, {})
    if settings.data is None:
        file = "eval/eval.tsv"
        data = str(folder_of_hub("WildJailbreak", "allenai/wildjailbreak", file) / file)
    else:
        data = settings.data
    examples = []
    for number, row in enumerate(sound_rows(data)):
        prompt, what = row.values.get("adversarial"), row.values.get("data_type")
        if not prompt or what not in HARMFUL:
            raise DataError(
                f"{row.place}: no text under 'adversarial', or 'data_type' is neither of {', '.join(HARMFUL)}",
                remedy="give eval.tsv of the evaluation split as its authors published it.",
            )
        if HARMFUL[what] == (kind == "safety"):
            examples.append(Example(f"wildjailbreak-{number}", (Message("user", str(prompt)),)))
    return Benchmark(name, kind, tuple(examples), max_new_tokens=512, is_gated=True)
