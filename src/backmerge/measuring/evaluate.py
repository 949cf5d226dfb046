"""Answer, judge, score: three passes over everything that is measured.

So the answering model and the judge's model need not fit on the device together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from backmerge.execution import ExecutionSettings
from backmerge.generation.cache import CompletionCache, cache_directory
from backmerge.generation.protocol import Drawing, Generator
from backmerge.judging.protocol import Judge
from backmerge.measuring.answer import Answerer, Job
from backmerge.measuring.judge import Judges
from backmerge.measuring.remote import RemoteWorkers, remote_workers
from backmerge.measuring.score import Outcome, judge_and_score
from backmerge.measuring.usage import Usage
from backmerge.planning.settings import EvaluateSettings
from backmerge.progress import Advance, bar_of
from backmerge.registry import Permissions
from backmerge.runs import RunDirectory


class Evaluator(Answerer):
    """Gets answers from one engine, judges and scores them; everything in the run's units is read from there.

    Args:
        run: Stores the units.
        engine: Answers prompts.
        judge: Finds refusals and harm.
        drawing: How answers are drawn if a benchmark does not say.
        max_unscored: Largest share of a benchmark that the judge may leave unscored.
        second: Another judge, whose verdicts are shown next to the first one's.
        cache: Answers of earlier runs; without it they are not used.
        max_new_tokens: A generation limit for all benchmarks, if it is lower than their own.
        remote: Processes that make the answers, if not this one; the engine is then only asked for its identity.
        usage: Counts answers, verdicts and seconds.
    """

    def __init__(
        self,
        run: RunDirectory,
        engine: Generator,
        judge: Judge,
        drawing: Drawing,
        max_unscored: float,
        *,
        second: Judge | None = None,
        cache: CompletionCache | None = None,
        max_new_tokens: int | None = None,
        remote: RemoteWorkers | None = None,
        usage: Usage | None = None,
    ) -> None:
        super().__init__(run, engine, drawing, cache=cache, max_new_tokens=max_new_tokens, remote=remote, usage=usage)
        self.judges = Judges(run, judge, second, self.usage)
        self.max_unscored = max_unscored

    def evaluate(
        self, jobs: Sequence[Job], advance: Advance, *, is_fresh: bool = False, is_partial: bool = False
    ) -> list[Outcome]:
        """Generate, judge and score whatever is not done yet.

        Args:
            jobs: The jobs to measure.
            advance: Called with the number of examples that are answered.
            is_fresh: Whether answers of other runs are ignored: a confirmation is always measured again.
            is_partial: Whether the jobs are parts of benchmarks, too small to check how many stay unscored.

        Raises:
            GenerationError: a prompt leaves no room for an answer in a model's context; nothing was generated then.
            RunError: the judge left too many answers unscored.
        """
        answered = self.answer(jobs, advance, is_fresh=is_fresh)
        if self.judges.need_memory_for(answered):
            self.release()
        bar_of(advance)(0, "judging and scoring")
        return judge_and_score(self.judges, answered, self.max_unscored, is_partial=is_partial)


@contextmanager
def evaluator_of(
    run: RunDirectory,
    engine: Generator,
    judges: tuple[Judge, Judge | None],
    settings: EvaluateSettings,
    execution: ExecutionSettings,
    *,
    permissions: Permissions,
    usage: Usage | None = None,
) -> Iterator[Evaluator]:
    """Provide an evaluator from the settings, with the answers of earlier runs if they are wanted.

    The engine, or the workers with theirs, are kept until the block ends, so that a model is not loaded anew for each
    step of a search; then they are released.
    """
    with remote_workers(execution, settings.engine, permissions, run) as remote:
        try:
            yield Evaluator(
                run,
                engine,
                judges[0],
                settings.sampling,
                settings.max_unscored,
                second=judges[1],
                cache=CompletionCache(cache_directory()) if settings.cache else None,
                max_new_tokens=settings.max_new_tokens,
                remote=remote,
                usage=usage,
            )
        finally:
            engine.release()


@contextmanager
def answerer_of(
    run: RunDirectory,
    engine: Generator,
    settings: EvaluateSettings,
    execution: ExecutionSettings,
    *,
    permissions: Permissions,
    usage: Usage,
    log: str,
) -> Iterator[Answerer]:
    """Provide an answerer from the settings, whose answers are judged together with others; see `evaluator_of`."""
    with remote_workers(execution, settings.engine, permissions, run) as remote:
        try:
            yield Answerer(
                run,
                engine,
                settings.sampling,
                cache=CompletionCache(cache_directory()) if settings.cache else None,
                max_new_tokens=settings.max_new_tokens,
                remote=remote,
                usage=usage,
                log=log,
            )
        finally:
            engine.release()
