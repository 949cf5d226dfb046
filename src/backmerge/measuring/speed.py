"""Estimate how long answers will take on this machine before they are started: the number left, and the speed."""

from __future__ import annotations

from collections.abc import Sequence

from backmerge.benchmarks.split import limited
from backmerge.checkpoints.reader import Weights
from backmerge.errors import BackmergeError
from backmerge.generation.protocol import Sampling
from backmerge.measuring.answer import Answerer, Job
from backmerge.measuring.usage import speed_of_sessions
from backmerge.planning.estimate import remember_speed, remembered_speed, speed_key
from backmerge.progress import Bar, Part, Rates, TokenMeter, bar, rate_text, time_text

# engines whose speed shows in a few tokens; a server must not be asked twice, and vLLM is fast only under full load
MEASURED_FIRST = frozenset({"transformers"})
FEW_PROMPTS, FEW_TOKENS, MORE_TOKENS = 2, 2, 4
SHARE = 0.1  # largest share of the whole time for measuring


def expected_time(
    answerer: Answerer,
    jobs: Sequence[Job],
    confirming: Sequence[Job] = (),
    *,
    base: Weights | None,
    may_measure: bool = True,
) -> str:
    """Return how long the answers to these jobs will take, as a sentence; measures the engine's speed if necessary.

    Args:
        answerer: The session's answerer.
        jobs: All jobs that may be run, as far as they are known.
        confirming: More jobs, which do not use answers of other runs.
        base: All models have its shape; the speed of models elsewhere is not known.
        may_measure: Whether the model may be loaded for this.
    """
    measured_on = "" if base is None else speed_key(answerer.engine.identity, base)
    answerer.usage.measured_on = measured_on
    missing = [*answerer.missing(jobs), *answerer.missing(confirming, is_fresh=True)]
    if not missing:
        return "All answers are already there."
    parts = [part for _, part in missing]
    where = "as measured on its first prompts"
    rates = speed_of_sessions(answerer.run, measured_on)
    if rates is not None:
        where = "as measured in earlier sessions of this run"
    elif (rates := remembered_speed(measured_on)) is not None:
        where = "as measured in an earlier run on this machine"
    elif may_measure and answerer.remote is None and answerer.engine.identity["engine"] in MEASURED_FIRST:
        with bar("Loading the model and measuring its speed", 1):
            rates = measured_rates(answerer, missing[0][0], parts)
        if rates is not None:
            remember_speed(measured_on, rates)
    answerer.usage.meter.expected = rates
    return time_sentence(parts, rates, where)


def time_sentence(parts: Sequence[Part], rates: Rates | None, where: str) -> str:
    """Return the time for answers at these rates, with the figures that it is estimated from."""
    num_answers = sum(part.num_answers for part in parts)
    read, written = sum(part.read for part in parts), sum(part.num_answers * part.limit for part in parts)
    asked = f"Still to generate: at most {num_answers:,} answers with at most {written:,} tokens in all"
    seconds = None if rates is None else rates.seconds(read, written)
    if seconds is None or rates is None:
        return f"{asked}. The time is estimated after the first ones."
    reading = f"{rate_text(rates.read / rates.read_seconds)} tokens read and " if rates.read_seconds else ""
    return (
        f"{asked}. Estimated time on this machine: at most about {time_text(seconds)}, at {reading}"
        f"{rate_text(rates.written / rates.written_seconds)} generated a second, {where}. Tuning, merging and judging "
        "by a model take extra time."
    )


def measured_rates(answerer: Answerer, job: Job, parts: Sequence[Part]) -> Rates | None:
    """Return the rates of a few tokens of answers to some prompts; the answers are discarded.

    Two prompts warm the engine up. Answers are faster in larger batches, so the measured batch is as large as a tenth
    of the whole time, or less, allows by the first measurement.
    """

    def measure(num_prompts: int, num_tokens: int) -> Rates:
        meter, counting = TokenMeter(), Bar()
        counting.expect((), meter)
        sampling = Sampling(max_new_tokens=num_tokens)
        answerer.engine.generate(job.member.variant, limited(job.examples, num_prompts), sampling, counting)
        return meter.rates

    try:
        found = measure(FEW_PROMPTS, FEW_TOKENS)
        total = found.seconds(sum(part.read for part in parts), sum(part.num_answers * part.limit for part in parts))
        one = found.seconds(found.read / FEW_PROMPTS, MORE_TOKENS)
        if total and one:
            batch = min(int(answerer.engine.identity["batch_size"]), int(SHARE * total / one))
            found = measure(batch, MORE_TOKENS) if batch > FEW_PROMPTS else found
    except BackmergeError:  # it is raised again when the answers are generated
        return None
    return found if found.written_seconds else None
