"""Commands that are killed, or whose disk fails, at random moments, again and again, end with the same bytes."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backmerge.demo import model_directory
from pipeline.test_resume import contents

# Runs a command to its end, then again and again in other folders, where it is ended at random moments and given once
# more, at most five times in a row, until that has happened as often as asked. It is killed, half of the times at a
# step with files (one is opened for writing, made, renamed, linked or removed) and half at a moment of its processor
# time; or the disk fails from a step on, with an error of the system that is named by its number. Each command is a
# fork of this process, so that its libraries are imported once.
PROGRAM = """
import errno, itertools, os, random, resource, signal, sys, traceback
from pathlib import Path
import matplotlib.pyplot, peft
from backmerge.cli import main
from backmerge.finetuning import trainer
from backmerge.generation import transformers_engine
from backmerge.outputs import damage_of
from backmerge.pipeline import stages
from backmerge.reporting import report

place, times, failure, *arguments = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
CHANGES = {"os.mkdir", "os.rename", "os.link"} | (set() if failure == errno.ENOSPC else {"os.remove", "os.rmdir"})
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def run(out, *, last_step=0, seconds=0.0):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    done = 0
    def step(event, values):
        nonlocal done
        if event not in CHANGES and not (event == "open" and isinstance(values[2], int) and values[2] & WRITES):
            return
        if not isinstance(values[0], (str, os.PathLike)) or not Path(values[0]).is_relative_to(place):
            return
        done += 1
        if last_step and done >= last_step:
            if not failure:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(failure, os.strerror(failure), str(values[0]))
    sys.addaudithook(step)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process: nobody handles it
    sys.argv = ["backmerge", *(argument.replace("OUT", str(out)) for argument in arguments)]
    code = 1
    try:
        main()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        if out.parent.name == "whole":
            used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
            (place / "steps").write_text(f"{done} {used}")
        sys.stderr.flush()
        os._exit(code)

def check(out):
    models = [out, *out.glob("tuned/[!.]*"), *out.glob("merged/[!.]*"), *out.glob("unconfirmed/[!.]*")]
    for model in models:
        if (model / "backmerge.json").exists():
            assert damage_of(model) is None, damage_of(model)

assert run(place / "whole" / "out") == 0
steps, seconds = (place / "steps").read_text().split()
rng, ended = random.Random(failure), 0
for number in itertools.count():
    out = place / f"ended-{number}" / "out"
    for _ in range(5):
        if failure or rng.random() < 0.5:
            status = run(out, last_step=rng.randrange(1, int(steps)))
        else:
            status = run(out, seconds=rng.uniform(0.01, float(seconds)))
        if status == 0:
            break
        assert os.WIFSIGNALED(status) if failure == 0 else os.waitstatus_to_exitcode(status) == 2, status
        ended += 1
        check(out)
    else:
        status = run(out)
    assert status == 0, status
    if ended >= times:
        break
print(ended, number + 1)
"""
QUICK = (
    *("--set", "evaluate.limit=4", "--set", "evaluate.cache=false", "--set", "choice.margin=0.95"),
    *("--set", "choice.over_refusal_margin=0.95"),
    *("--set", "choice.accept=[wide_margin,too_few_prompts,answers_cut,no_gain,nothing_to_restore]"),
)
SWEEP = """
base: demo
tuned: [ADAPTER]
merge: [{method: linear, lam: [0.2, 0.4, 0.6]}, {method: slerp, lam: [0.3]}]
evaluate: {utility: [demo-plans], safety: [demo-harmful], judge: {name: demo-rule}}
"""


def ended(place: Path, times: int, failure: int, *arguments: str) -> None:
    """End a command so many times; each time that it then continues to its end, its files are as if nothing had been.

    Args:
        place: Where its outputs go; `OUT` in the arguments.
        times: How often.
        failure: The error of the system that writing then ends in; 0 to kill the command.
        arguments: The command.
    """
    command = [sys.executable, "-c", PROGRAM, str(place), str(times), str(failure), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    num_ended, num_outputs = map(int, done.stdout.split()[-2:])
    assert num_ended >= times
    whole = contents(place / "whole" / "out")
    for number in range(num_outputs):
        found = contents(place / f"ended-{number}" / "out")
        assert found.keys() == whole.keys()
        assert [name for name in found if found[name] != whole[name]] == []


@pytest.fixture
def commands(tmp_path: Path, make_adapter: Any) -> dict[str, tuple[str, ...]]:
    """A sweep, a restore, a tuning that saves every second step, a merge, and answers that are scored."""
    adapter = str(make_adapter(model_directory(), seed=5))
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace("ADAPTER", adapter))
    (tmp_path / "answers.jsonl").write_text('{"id": "x", "completion": "one"}\n')
    (tmp_path / "prompts.csv").write_text("id,prompt,answer\nx,a,b\n")
    restore = (
        "--utility",
        "demo-plans",
        "--safety",
        "demo-harmful",
        "--judge",
        "demo-rule",
        "--lam",
        "0.5",
        "--guard",
        "none",
    )
    tuning = ("--safety", "none", "--steps", "8", "--device", "cpu", "--set", "save_every=2")
    answers = (str(tmp_path / "answers.jsonl"), "--benchmark", str(tmp_path / "prompts.csv"))
    return {
        "sweep": ("run", str(tmp_path / "sweep.yaml"), *QUICK, "--out", "OUT"),
        "restore": ("restore", "demo", adapter, *restore, "--device", "cpu", *QUICK, "--out", "OUT"),
        "tuning": ("finetune", "demo", "--task", "demo-plans", *tuning, "--out", "OUT"),
        "merge": ("merge", "demo", adapter, "--lam", "0.5", "--out", "OUT"),
        "scoring": ("score", *answers, "--out", "OUT"),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "times"), [("sweep", 50), ("restore", 20), ("tuning", 20)])
def test_killed_commands_end_the_same(
    tmp_path: Path, commands: dict[str, tuple[str, ...]], name: str, times: int
) -> None:
    """Killed at random moments and given again, a command leaves the same bytes; nothing half-written is taken."""
    ended(tmp_path, times, 0, *commands[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sweep", "restore", "tuning", "merge", "scoring"])
@pytest.mark.parametrize("failure", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_a_disk_that_fails_at_any_step_is_a_clear_error(
    tmp_path: Path, commands: dict[str, tuple[str, ...]], name: str, failure: int
) -> None:
    """A full or read-only disk ends with exit code 2 at whichever step; with room again, the command continues."""
    ended(tmp_path, 10, failure, *commands[name])


def remount(disk: Path, how: str) -> None:
    """Mount a file system again with an option."""
    subprocess.run(["mount", "-o", f"remount,{how}", "tmpfs", disk], check=True, capture_output=True)


def run(disk: Path, name: str, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Give a command whose output goes to a folder of the disk."""
    words = [word.replace("OUT", str(disk / name / "out")) for word in command]
    return subprocess.run([sys.executable, "-m", "backmerge", *words], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sweep", "restore", "tuning", "merge", "scoring"])
def test_a_disk_that_is_mounted_read_only_is_a_clear_error(
    small_disk: Path, commands: dict[str, tuple[str, ...]], name: str
) -> None:
    """Nothing can be begun there, and a killed command cannot go on: exit code 2. Mounted for writing again, it can."""
    assert run(small_disk, "whole", commands[name]).returncode == 0
    (small_disk / "begun").mkdir()
    for number in range(2):  # the second time of what the first one, ended after some seconds of CPU time, left behind
        remount(small_disk, "ro")
        before = contents(small_disk)
        ended = run(small_disk, "begun", commands[name])
        assert ended.returncode == 2, ended.stderr[-3000:]
        assert "Read-only file system" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert contents(small_disk) == before
        remount(small_disk, "rw")
        if number == 0:
            words = ("ulimit -t 4; exec " + sys.executable + ' -m backmerge "$@"', "sh")
            rest = [word.replace("OUT", str(small_disk / "begun" / "out")) for word in commands[name]]
            subprocess.run(["sh", "-c", *words, *rest], capture_output=True, check=False)
            if contents(small_disk / "begun") == contents(small_disk / "whole"):
                return  # it was done by then
    assert run(small_disk, "begun", commands[name]).returncode == 0
    assert contents(small_disk / "begun") == contents(small_disk / "whole")
