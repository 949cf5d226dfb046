"""HumanEval as a benchmark: samples are run against the tests, and counted by pass@k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from backmerge.benchmarks.humaneval import MAX_NEW_TOKENS, check_all, humaneval_problems
from backmerge.benchmarks.options import options_of
from backmerge.benchmarks.pass_at_k import pass_at_ks
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, ScoreTable
from backmerge.errors import DataError
from backmerge.records import Example
from backmerge.registry import Permissions
from backmerge.sandbox import Sandbox, make_sandbox

NEEDS = "the hub, or humaneval=HumanEval.jsonl.gz; bubblewrap, or --allow-code-execution"

NUM_SAMPLES = 50
KS = (10, 1)  # the first is the paper's, and what decisions are taken on where there are samples enough


class PassAtK:
    """The chance that one of k samples passes the tests, by the unbiased estimator; for each k up to the samples."""

    def __init__(self, sandbox: Sandbox, num_samples: int) -> None:
        self._sandbox = sandbox
        self._ks = tuple(k for k in KS if k <= num_samples)

    @property
    def metrics(self) -> tuple[str, ...]:
        """`pass@10`, if there are so many samples, and `pass@1`."""
        return tuple(f"pass@{k}" for k in self._ks)

    @property
    def identity(self) -> str:
        """The sandbox's: how strongly it isolates, and which Python it runs."""
        return f"{','.join(self.metrics)}/{self._sandbox.identity}"

    def __call__(
        self, examples: Sequence[Example], answers: Sequence[Sequence[str]], advance: Callable[[int], None]
    ) -> ScoreTable:
        """Runs each sample, equal programs once."""

        def told(steps: int, _: str = "", /) -> None:
            advance(steps)

        is_right = check_all(examples, answers, self._sandbox, told)
        fewest = min(map(len, is_right), default=0)
        if any(k > fewest for k in self._ks):
            raise DataError(
                f"a problem has {fewest} answers, which pass@{max(self._ks)} cannot be told from",
                remedy="give as many answers to each problem.",
            )
        found = [pass_at_ks(samples, self._ks) for samples in is_right]
        return {name: [values[name] for values in found] for name in self.metrics}


def humaneval(settings: BenchmarkSettings, permissions: Permissions) -> Benchmark:
    """The 164 problems: 50 samples at temperature 0.6, top-p 0.9, top-k 50, as in the paper.

    Raises:
        DataError: as `humaneval_problems`.
        RunError: bubblewrap does not work here, and leave to run model-written code without it was not given.
    """
    options_of(settings, {})
    problems = humaneval_problems(None if settings.data is None else Path(settings.data).expanduser())
    num_samples = settings.num_samples or NUM_SAMPLES
    sandbox = make_sandbox(allow_code_execution=permissions.code_execution)
    return Benchmark(
        "humaneval",
        "utility",
        problems,
        MAX_NEW_TOKENS,
        PassAtK(sandbox, num_samples),
        sampling={"temperature": 0.6, "top_p": 0.9, "top_k": 50, "num_samples": num_samples},
    )
