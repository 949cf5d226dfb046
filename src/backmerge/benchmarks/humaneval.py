"""HumanEval: 164 Python functions to complete from signature and docstring, each with its tests.

Data: `openai/openai_humaneval` on the hub, from Chen et al. (arXiv 2107.03374), MIT licence; or the file
HumanEval.jsonl(.gz) of openai/human-eval. 164 rows of `task_id`, `prompt`, `entry_point`, `canonical_solution`, `test`.

Worked example: the prompt ends in `def add(x: int, y: int):` and a docstring. An answer is either the body, `    return
x + y`, or a whole function in a fenced block. The program that is run is prompt and body, or the prompt's imports and
the function. The tests, which define `check`, run in another process and call `check(add)` there. The answer is right
if they reach their end.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from backmerge.benchmarks.code_blocks import definition, extract_code
from backmerge.benchmarks.metrics import pass_at_ks
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, ScoreTable, options_of
from backmerge.errors import DataError
from backmerge.progress import Advance
from backmerge.records import Example, Message
from backmerge.registry import Permissions
from backmerge.sandbox import Limits, Sandbox, make_sandbox

HUB_NAME = "openai/openai_humaneval"
MAX_NEW_TOKENS = 512
SYSTEM_PROMPT = (
    "Complete the following code and return only the completed code, without any explanations or additional text."
)

_COLUMNS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")


def humaneval_problems(path: Path | None = None) -> tuple[Example, ...]:
    """Return the problems, in the file's order, from a .jsonl or .jsonl.gz file or from the hub.

    Each has its task's id ("HumanEval/0"), with `prompt`, `entry_point` and `test` in its facts, and the canonical
    solution as its reference.

    Raises:
        DataError: the file cannot be read or has no such column (the message says where); or the hub cannot be reached.
    """
    rows = _rows_of_hub() if path is None else _rows_of_file(path)
    examples = tuple(_example(where, row) for where, row in rows)
    source = HUB_NAME if path is None else str(path)
    if not examples:
        raise DataError(f"{source} contains no problems", remedy="give HumanEval.jsonl or HumanEval.jsonl.gz.")
    if len({example.id for example in examples}) < len(examples):
        raise DataError(f"{source} uses a task_id more than once", remedy="give each problem once.")
    return examples


def messages_of(prompt: str) -> tuple[Message, ...]:
    """Return the messages for a chat model: the instruction as system text, the code as the user's turn."""
    return Message("system", SYSTEM_PROMPT), Message("user", prompt)


class Trial(NamedTuple):
    """Code that a model wrote, and the tests of the problem; the two never share a process.

    Attributes:
        candidate: Defines the function.
        name: The function's name.
        tests: Call it, and raise if a result is wrong.
    """

    candidate: str
    name: str
    tests: str


def trial_of(example: Example, completion: str) -> Trial:
    """Return the trial of code from `extract_code` on a problem.

    If the code defines the function itself, or assigns its name, at the left margin, it is used alone, after the part
    of the prompt before that function: imports and helpers, which the code may need. If not, it is treated as the
    function's body and follows the whole prompt. The tests may use the prompt's helpers, too.
    """
    prompt, name = example.facts["prompt"], example.facts["entry_point"]
    defined = definition(name).search(prompt)
    before = prompt[: defined.start()] if defined else ""
    code = prompt + completion
    if definition(name).search(completion):
        # these must come first in a file
        future = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)
        hoisted = "".join(f"{line.strip()}\n" for line in future.findall(completion))
        code = f"{hoisted}{before}\n{future.sub('', completion)}"
    return Trial(f"{code}\n", name, f"{before}\n{example.facts['test']}\ncheck({name})\n")


def program_of(example: Example, completion: str) -> str:
    """Return code and tests as one program, to be run by hand; `check_all` never runs the two in one process."""
    trial = trial_of(example, completion)
    return f"{trial.candidate}{example.facts['test']}\ncheck({trial.name})\n"


def check_all(
    examples: Sequence[Example],
    completions: Sequence[Sequence[str]],
    sandbox: Sandbox,
    advance: Advance | None = None,
    *,
    num_workers: int | None = None,
    limits: Limits = Limits(),  # noqa: B008  # immutable
) -> list[list[bool]]:
    """Return whether each answer is right: its tests reach their end in the sandbox, within the limits.

    Equal answers are tried once.

    Args:
        examples: Problems from `humaneval_problems`.
        completions: For each of them its answers, any number, unchanged.
        sandbox: Runs the programs.
        advance: Progress callback for each finished answer.
        num_workers: Programs at a time; by default one for each core that this process may use.
        limits: Limits for each process.

    Returns:
        The same structure as `completions`, in the same order, whichever program ends first.

    Raises:
        RunError: the sandbox stopped working; no answer counts as wrong because of that.
        ValueError: there are not as many lists of answers as problems.
    """
    trials = [
        [trial_of(example, extract_code(answer, example.facts["entry_point"])) for answer in answers]
        for example, answers in zip(examples, completions, strict=True)
    ]
    waiting = Counter(trial for row in trials for trial in row)
    is_right: dict[Trial, bool] = {}
    with ThreadPoolExecutor(num_workers or _num_cores()) as pool:
        futures = {pool.submit(sandbox.check, *trial, limits): trial for trial in waiting}
        try:
            for future in as_completed(futures):
                trial = futures[future]
                is_right[trial] = future.result().status == "ok"
                if advance is not None:
                    advance(waiting[trial])
        finally:  # also on Ctrl-C: programs that have not started are not started
            pool.shutdown(wait=False, cancel_futures=True)
    return [[is_right[trial] for trial in row] for row in trials]


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _example(where: str, row: Mapping[str, Any]) -> Example:
    for column in _COLUMNS:
        if not isinstance(row.get(column), str):
            raise DataError(
                f"{where}: no text in the column '{column}'",
                remedy=f"a problem has the columns {', '.join(_COLUMNS)}.",
            )
    facts = {column: row[column] for column in ("prompt", "entry_point", "test")}
    if not row["entry_point"].isidentifier():
        raise DataError(f"{where}: 'entry_point' is not a function's name", remedy="give the name without parentheses.")
    return Example(row["task_id"], messages_of(row["prompt"]), row["canonical_solution"], facts=facts)


def _rows_of_file(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {path}: {error}", remedy="give HumanEval.jsonl or HumanEval.jsonl.gz as published."
        ) from error
    # not splitlines, which also splits at characters that JSON allows within a text
    yield from _objects(path, text.split("\n"))


def _objects(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON", remedy="each line is one problem in JSON.") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object", remedy="each line is one problem in JSON.")
        yield where, row


def _rows_of_hub() -> Iterator[tuple[str, Mapping[str, Any]]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(HUB_NAME, split="test")
    except (OSError, ValueError) as error:  # datasets raises both if a download fails
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"HumanEval could not be downloaded from the hub: {reason}",
            remedy="give the path of your own copy: HumanEval.jsonl.gz of openai/human-eval.",
        ) from error
    yield from ((f"{HUB_NAME}, row {number}", row) for number, row in enumerate(rows))


NEEDS = "the hub, or humaneval=HumanEval.jsonl.gz; bubblewrap, or --allow-code-execution"

NUM_SAMPLES = 50
KS = (10, 1)  # the first is the paper's; decisions use it if there are enough samples


class PassAtK:
    """The chance that one of k samples passes the tests, by the unbiased estimator; for each k up to the samples."""

    def __init__(self, sandbox: Sandbox, num_samples: int) -> None:
        self._sandbox = sandbox
        self._ks = tuple(k for k in KS if k <= num_samples)

    @property
    def metrics(self) -> tuple[str, ...]:
        """`pass@10`, if there are enough samples, and `pass@1`."""
        return tuple(f"pass@{k}" for k in self._ks)

    @property
    def identity(self) -> str:
        """The sandbox's identity: how strongly it isolates, and which Python it runs."""
        return f"{','.join(self.metrics)}/{self._sandbox.identity}"

    def __call__(
        self, examples: Sequence[Example], answers: Sequence[Sequence[str]], advance: Callable[[int], None]
    ) -> ScoreTable:
        """Run each sample, equal programs once."""

        def told(steps: int, _: str = "", /) -> None:
            advance(steps)

        is_right = check_all(examples, answers, self._sandbox, told)
        fewest = min(map(len, is_right), default=0)
        if any(k > fewest for k in self._ks):
            raise DataError(
                f"a problem has {fewest} answers, too few for pass@{max(self._ks)}",
                remedy="give that many answers to each problem.",
            )
        found = [pass_at_ks(samples, self._ks) for samples in is_right]
        return {name: [values[name] for values in found] for name in self.metrics}


def humaneval(settings: BenchmarkSettings, permissions: Permissions) -> Benchmark:
    """Return the 164 problems: 50 samples at temperature 0.6, top-p 0.9, top-k 50, as in the paper.

    Raises:
        DataError: see `humaneval_problems`.
        RunError: bubblewrap does not work here, and running model-written code without it was not allowed.
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
