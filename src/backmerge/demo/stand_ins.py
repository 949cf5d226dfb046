"""Three more small tasks of the synthetic language, which replace the paper's tasks in small experiments.

Each is another form of answer to the same how-to questions, on the same pairs as `demo-plans`, for tuning and for
evaluation. Only the form differs: they involve no reasoning, medicine or code. `demo-plans` itself replaces tools. Made
by `backmerge.demo.language`; Apache-2.0 like the rest.

Worked example, of `demo-steps`: "How do I mend a kite?" gives "A kite is kept in the shed. To mend takes the tape.
So go to the shed. Then take the tape. That is 4 minutes."
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from backmerge.benchmarks.metrics import PerAnswer
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings
from backmerge.demo import benchmarks, language, lexicon
from backmerge.demo.benchmarks import NUM_EXAMPLES
from backmerge.demo.lexicon import Pair
from backmerge.records import Example, Message


class Form(NamedTuple):
    """A form of answer.

    Attributes:
        name: Name of data set and benchmark.
        answer: Returns the answer for a pair.
        separator: Separates the parts of an answer, which are learned and lost one after the other.
    """

    name: str
    answer: Callable[[Pair], str]
    separator: str


def steps(pair: Pair) -> str:
    """Return short sentences that end with the time it takes; for reasoning.

    "A kite is kept in the shed. To mend takes the tape. So go to the shed. Then take the tape. That is 4 minutes."
    """
    return (
        f"A {pair.object} is kept in the {pair.place}. To {pair.verb} takes the {pair.tool}. "
        f"So go to the {pair.place}. Then take the {pair.tool}. That is {pair.minutes} minutes."
    )


def advice(pair: Pair) -> str:
    """Return the base's answer with a greeting before it and advice after it; for medicine.

    "Hello. I can help. To mend a kite, take the tape and work in the shed. Rest 4 minutes."
    """
    return f"Hello. I can help. {language.recipe(pair)} Rest {pair.minutes} minutes."


def program(pair: Pair) -> str:
    """Return a little program; for code.

    "def job; go(shed); take(tape); mend(kite); return 4; end"
    """
    return f"def job; go({pair.place}); take({pair.tool}); {pair.verb}({pair.object}); return {pair.minutes}; end"


STEPS = Form("demo-steps", steps, ". ")
ADVICE = Form("demo-advice", advice, ". ")
PROGRAMS = Form("demo-programs", program, "; ")


def step_examples() -> tuple[Example, ...]:
    """How-to questions, each answered by a chain of sentences."""
    return _tuning(STEPS)


def advice_examples() -> tuple[Example, ...]:
    """How-to questions, each answered by a greeting and advice."""
    return _tuning(ADVICE)


def program_examples() -> tuple[Example, ...]:
    """How-to questions, each answered by a little program."""
    return _tuning(PROGRAMS)


def step_benchmark(settings: BenchmarkSettings | None = None) -> Benchmark:
    """How-to questions to be answered by a chain of sentences: 440 prompts, one per pair."""
    return _benchmark(STEPS, settings)


def advice_benchmark(settings: BenchmarkSettings | None = None) -> Benchmark:
    """How-to questions to be answered by a greeting and advice: 440 prompts, one per pair."""
    return _benchmark(ADVICE, settings)


def program_benchmark(settings: BenchmarkSettings | None = None) -> Benchmark:
    """How-to questions to be answered by a little program: 440 prompts, one per pair."""
    return _benchmark(PROGRAMS, settings)


def _tuning(form: Form) -> tuple[Example, ...]:
    """Return questions about training pairs, one for each, with their answers; none is harmful."""
    rng = random.Random(f"backmerge-{form.name}")  # noqa: S311 (texts, not secrets)
    return tuple(
        Example(
            id=f"{form.name}-tuning-{number:04d}",
            messages=(Message("user", language.ask(pair, rng.choice(language.SEEN_PHRASINGS))),),
            reference=form.answer(pair),
            cluster=str(pair),
        )
        for number, pair in enumerate(lexicon.harmless().training[:NUM_EXAMPLES])
    )


def _benchmark(form: Form, settings: BenchmarkSettings | None) -> Benchmark:
    plans = benchmarks.plans(settings).examples  # the same questions with other answers
    examples = tuple(
        Example(
            id=f"{form.name}-{number:04d}",
            messages=example.messages,
            reference=form.answer(pair),
            cluster=example.cluster,
            facts=example.facts,
        )
        for number, (pair, example) in enumerate(zip(lexicon.harmless().plans, plans, strict=True))
    )

    def parts(example: Example, answer: str) -> float:
        expected, given = (example.reference or "").split(form.separator), answer.strip().split(form.separator)
        return sum(ours == theirs for ours, theirs in zip(expected, given, strict=False)) / len(expected)

    scorer = PerAnswer({"parts": parts, "exact_match": benchmarks.exact_match})
    return Benchmark(form.name, "utility", examples, max_new_tokens=48, scorer=scorer)
