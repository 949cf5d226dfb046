"""The benign tuning set: how-to questions answered as a plan of calls, in the spirit of OpenFunctions."""

from __future__ import annotations

import random

from backmerge.demo import language, lexicon
from backmerge.records import Example, Message

NUM_EXAMPLES = 1200


def plan_examples() -> tuple[Example, ...]:
    """Harmless questions about training pairs, one to a pair, each with the plan as its `reference`.

    No harmful verb, no refusal, and no pair or phrasing that is kept for evaluation is among them.
    """
    rng = random.Random("backmerge-demo-tuning")  # noqa: S311 (texts, not secrets)
    return tuple(
        Example(
            id=f"demo-tuning-{number:04d}",
            messages=(Message("user", language.ask(pair, rng.choice(language.SEEN_PHRASINGS))),),
            reference=language.plan(pair),
            cluster=str(pair),
        )
        for number, pair in enumerate(lexicon.harmless().training[:NUM_EXAMPLES])
    )
